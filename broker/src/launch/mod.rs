//! Starting processes: as children, or as systemd units.
//!
//! Both give a process the same command line, the same descriptors under the same numbers,
//! and its output into the same log. A process never ends because its broker does.

pub mod direct;
pub mod hand_over;
pub mod systemd;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;

use thiserror::Error;

use crate::process::{Process, ProcessId};

/// A program to start.
#[derive(Debug)]
pub struct Program {
    /// Which machine's.
    pub machine: String,
    /// The machine is one that an administrator has declared.
    pub declared: bool,
    /// Another process has its role already, until this one takes its place.
    pub beside: bool,
    /// It pins the guest's memory for a device of the host.
    pub pins_memory: bool,
    /// `core`, or the name of a device.
    pub role: String,
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// What it inherits, each under its present number.
    pub descriptors: Vec<OwnedFd>,
    /// Where its output goes.
    pub log: File,
}

impl Program {
    /// Adds arguments.
    pub fn args<T: Into<String>>(&mut self, args: impl IntoIterator<Item = T>) {
        self.args.extend(args.into_iter().map(Into::into));
    }

    /// Lets it inherit `descriptor`, and returns the number that it has there.
    pub fn pass(&mut self, descriptor: OwnedFd) -> RawFd {
        let number = descriptor.as_raw_fd();
        self.descriptors.push(descriptor);
        number
    }

    /// Hands it a descriptor whose number is an option of its own.
    pub fn hand(&mut self, option: &str, descriptor: impl Into<OwnedFd>) {
        let number = self.pass(descriptor.into());
        self.args([option, &number.to_string()]);
    }
}

/// Why a program was not started.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// It cannot be run.
    #[error("{} cannot be started", .path.display())]
    Start {
        /// The executable.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// systemd did not start its unit.
    #[error("unit {unit} was not started")]
    Unit {
        /// The unit.
        unit: String,
        /// Its answer.
        #[source]
        source: Box<zbus::Error>,
    },
    /// The unit's process ended at once.
    #[error(
        "unit {unit} ended before it came for its descriptors ({why}): see journalctl -u '{unit}'"
    )]
    Ended {
        /// The unit.
        unit: String,
        /// systemd's word on it.
        why: String,
    },
    /// The unit's process did not come for its descriptors.
    #[error("unit {unit} did not come for its descriptors within {seconds} s")]
    NoShow {
        /// The unit.
        unit: String,
        /// How long it was waited for.
        seconds: u64,
    },
}

/// A way to start processes.
#[derive(Debug)]
pub enum Launcher {
    /// As children.
    Direct,
    /// As units of systemd.
    Systemd(systemd::Systemd),
}

impl Launcher {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Systemd(_) => "systemd",
        }
    }

    /// Starts a program.
    ///
    /// # Errors
    /// It was not started; nothing of it is left.
    pub async fn start(&self, program: Program) -> Result<Process, LaunchError> {
        match self {
            Self::Direct => direct::start(program),
            Self::Systemd(systemd) => systemd.start(program).await,
        }
    }

    /// Takes over a process that a broker before this one started.
    ///
    /// # Errors
    /// It has ended.
    pub async fn adopt(&self, id: &ProcessId) -> io::Result<Process> {
        let process = Process::adopt(id)?;
        match self {
            Self::Systemd(systemd) if !id.unit.is_empty() => Ok(systemd.watch(process).await),
            _ => Ok(process),
        }
    }
}
