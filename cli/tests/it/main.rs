//! The program as a whole: against a broker of the test's own, and against the real one.
#![expect(clippy::unwrap_used, reason = "a test fails by a panic")]

mod common;
mod console;
mod json;
mod machines;
mod moves;
mod readme;
mod verbs;
