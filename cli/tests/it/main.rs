//! The program as a whole: against a broker of the test's own, and against the real one.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;
mod console;
mod verbs;
