//! The program as a whole: against a broker of the test's own, and against the real one.

mod common;
mod console;
mod verbs;
