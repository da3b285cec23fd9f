//! The bundled bare-metal guest: its program, command line and output.
//!
//! The program (`program/`) is a PVH ELF of its own, built by this crate's build script and found
//! by [`program`]. A [`Workload`] says what it is to do and prints as its command line; what it
//! prints on the serial console is read by [`Report::parse`]. README.md describes both.

mod protocol;

pub use protocol::{
    Activate, BadOption, BadReport, BalloonMode, BlkMode, Idle, Ipv4, NetMode, Report, Text, Value,
    Workload,
};

use std::path::Path;

/// Commands that the guest takes on its console, each a line.
pub mod command {
    /// Finish the work, verify, report, and power off.
    pub const STOP: &str = "stop\n";
    /// Print a report of every work.
    pub const REPORT: &str = "report\n";
    /// Tell what the processor shows.
    pub const CPUID: &str = "cpuid\n";
    /// Reboot the machine.
    pub const RESET: &str = "reset\n";
    /// Power off at once.
    pub const POWEROFF: &str = "poweroff\n";
    /// Read where there is no memory; the guest reports the exception and powers off.
    pub const FAULT: &str = "fault\n";
    /// Triple-fault.
    pub const TRIPLE: &str = "triple\n";
}

/// The guest's ELF file.
pub fn program() -> &'static Path {
    Path::new(env!("TEST_GUEST_PROGRAM"))
}

#[cfg(test)]
mod tests;
