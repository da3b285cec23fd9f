//! What can go wrong with a device of vfio-user.

use std::io;

use thiserror::Error;

use crate::pci::{BarError, MsixError};
use crate::remote::EndpointError;

/// Each says which device.
#[derive(Debug, Error)]
pub enum VfioUserError {
    /// Its process is not reached.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// It cannot be given to a machine.
    #[error("device {device} cannot be given to the machine")]
    Unusable {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: Unusable,
    },
    /// Its process did not do what it was asked.
    #[error("device {device}: its process cannot {what}")]
    Process {
        /// Which device.
        device: String,
        /// A verb phrase.
        what: &'static str,
        /// Why.
        #[source]
        source: vfio_user::Error,
    },
    /// It has no process any more.
    #[error("device {device} has lost its process, and all that it was doing: {why}")]
    Lost {
        /// Which device.
        device: String,
        /// How.
        why: String,
    },
    /// Another process has come, of another device.
    #[error("device {device}: the process that came has another device")]
    Another {
        /// Which device.
        device: String,
    },
    /// No address for a BAR.
    #[error("device {device}")]
    Bar {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: BarError,
    },
    /// Interrupts do not work.
    #[error("interrupts of device {device}")]
    Msix {
        /// Which device.
        device: String,
        /// Why.
        #[source]
        source: MsixError,
    },
    /// The kernel refused something that needs no process.
    #[error("device {device}: cannot {what}")]
    System {
        /// Which device.
        device: String,
        /// A verb phrase.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why a device cannot be given to a machine.
#[derive(Debug, Error)]
pub enum Unusable {
    /// Its process does not describe it.
    #[error(transparent)]
    Process(#[from] vfio_user::Error),
    /// A device on another bus.
    #[error("it is no PCI device")]
    NotPci,
    /// Not all registers are there.
    #[error("its configuration space has {size} bytes, 256 are needed")]
    Config {
        /// Bytes of it.
        size: u64,
    },
    /// A bridge.
    #[error("its header is of type {found}; only type 0 is a device's")]
    HeaderType {
        /// The type.
        found: u8,
    },
    /// A BAR that finds no place below 4 GiB.
    #[error("its BAR {bar} has {size} bytes, at most 512 MiB are possible")]
    BarSize {
        /// Which.
        bar: u32,
        /// Bytes of it.
        size: u64,
    },
    /// A file that does not have what is to be mapped.
    #[error("the file of its BAR {bar} does not have all of it")]
    ShortFile {
        /// Which.
        bar: u32,
    },
    /// Interrupts by pin, or none.
    #[error("it has neither MSI-X nor MSI, and no other interrupts are possible")]
    NoInterrupts,
    /// A table that is nowhere.
    #[error("its {what} at {offset:#x} is not within its BAR {bar}")]
    MsixPlace {
        /// What it is.
        what: &'static str,
        /// Which BAR.
        bar: u8,
        /// Where in it.
        offset: u64,
    },
    /// Fewer interrupts than its registers say.
    #[error("it has {vectors} interrupt vectors, its process serves {served}")]
    Vectors {
        /// As its registers say.
        vectors: u16,
        /// Interrupts.
        served: u32,
    },
}
