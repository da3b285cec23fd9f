//! Starts and drives Godwit's processes in tests.

pub mod frontend;
