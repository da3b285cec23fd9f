//! What can go wrong with a machine.

use std::io;

use api::Error as CallError;
use thiserror::Error;

use super::chain;
use super::config::ConfigError;
use crate::boot::{BootError, InitrdError, KernelError};
use crate::bus::BusError;
use crate::hypervisor::{HypervisorError, VcpuError};
use crate::interrupt::InterruptError;
use crate::memory::{LayoutError, RamError};
use crate::migration::MigrationError;
use crate::pci::RootError;
use crate::remote::vfio_user::VfioUserError;
use crate::remote::vhost_user::VhostUserError;
use crate::transport::TransportError;

/// Why a machine could not be started, or did not do what it was told.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The machine is elsewhere, maybe.
    #[error("the machine {0}")]
    Elsewhere(&'static str),
    /// A migration that cannot be begun.
    #[error("a migration is under way")]
    Migrating,
    /// A migration failed.
    #[error(transparent)]
    Migration(Box<MigrationError>),
    /// The definition.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initial RAM disk.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// What the kernel finds when it starts.
    #[error(transparent)]
    Boot(Box<BootError>),
    /// RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// RAM cannot be mapped or made present.
    #[error("guest memory cannot be {what}")]
    Map {
        /// `mapped` or `prefaulted`.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The memory layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// KVM.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// vCPUs.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Interrupts.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
    /// A bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The PCI bus.
    #[error(transparent)]
    Pci(#[from] RootError),
    /// A device's transport.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A device in another process.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// A PCI device in another process.
    #[error(transparent)]
    VfioUser(#[from] VfioUserError),
    /// More devices than a bus holds.
    #[error("the PCI bus holds {} devices, no more", crate::pci::MAX_DEVICES)]
    TooManyDevices,
    /// The threads and descriptors by which the machine is controlled.
    #[error("the machine cannot be controlled")]
    Control(#[source] io::Error),
    /// The link to the process of a device.
    #[error(
        "device {device}: its control-fd cannot be used; give one end of a Unix stream connection"
    )]
    Link {
        /// Its name.
        device: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The serial port.
    #[error("serial port to {to} cannot be had")]
    Serial {
        /// Where it leads.
        to: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl From<BootError> for MachineError {
    fn from(error: BootError) -> Self {
        Self::Boot(Box::new(error))
    }
}

impl From<MigrationError> for MachineError {
    fn from(error: MigrationError) -> Self {
        Self::Migration(Box::new(error))
    }
}

/// As the owner hears it.
impl From<MachineError> for CallError {
    fn from(error: MachineError) -> Self {
        let text = chain(&error);
        match error {
            MachineError::Vcpu(VcpuError::Deadline { .. }) => Self::TimedOut(text),
            MachineError::Elsewhere(_) | MachineError::Migrating => Self::InvalidState(text),
            MachineError::Migration(error) if matches!(*error, MigrationError::Setup(_)) => {
                Self::InvalidArgs(text)
            }
            MachineError::Migration(error)
                if matches!(*error, MigrationError::CannotMove { .. }) =>
            {
                Self::NotMigratable(text)
            }
            MachineError::Transport(_) | MachineError::VhostUser(_) | MachineError::VfioUser(_) => {
                Self::DeviceFailed(text)
            }
            _ => Self::Internal(text),
        }
    }
}
