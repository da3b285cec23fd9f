//! Godwit's block device process.
fn main() {}
