//! What the guest program and its host agree on: the command line and the console lines.
//!
//! These files are compiled twice, into this crate and (by path) into the `no_std` guest
//! program, so that the two cannot disagree. They use `core` alone.

mod options;
mod report;
mod text;
mod value;

pub use options::{BadOption, Workload};
pub use report::{BadReport, Report};
pub use text::Text;
pub use value::{Activate, BalloonMode, BlkMode, Idle, Ipv4, NetMode, Value};
