//! Starts and drives Godwit's processes, for tests, benchmarks and the demo.
//!
//! | module | what it is |
//! |---|---|
//! | [`programs`] | where the built programs are |
//! | [`process`] | one program: started, listened to, ended with its owner |
//! | [`keeper`] | who ends what outlives its broker |
//! | [`console`] | what a guest prints, and what it is told |
//! | [`frontend`] | a vhost-user front-end without a guest, for device processes alone |
//! | [`machine`] | a core with its device processes |
//! | [`network`] | a network of the test's own, with a tap and an echo service |
//!
//! Every wait has a deadline, and no process outlives the value that stands for it.

pub mod console;
pub mod frontend;
pub mod keeper;
pub mod machine;
pub mod network;
pub mod process;
pub mod programs;
