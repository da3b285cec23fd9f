//! Godwit's network device process.
fn main() {}
