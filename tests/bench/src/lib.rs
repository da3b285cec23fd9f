//! Benchmarks: every one speaks one form, a table for people and JSON for programs.
//!
//! All times are of one run on one machine; only ratios of the same run prove anything.

mod boot;
mod bulk;
mod cpu_time;
mod free_pages;
mod lifecycle;
mod machine;
mod memory;
mod peer;
mod report;
mod statistics;
mod switchover;

pub use boot::{Boot, BootPreset};
pub use bulk::Bulk;
pub use free_pages::{FreePages, FreePagesPreset};
pub use lifecycle::{Lifecycle, LifecyclePreset};
pub use report::{Goal, Report};
pub use statistics::Summary;
pub use switchover::{Switchover, SwitchoverPreset};
