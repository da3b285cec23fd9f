//! Godwit's core process: vCPUs, memory, PCI, front-ends, migration.
fn main() {}
