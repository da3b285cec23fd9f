//! Godwit's own commands: demo, test, bench, check.
fn main() {}
