//! What can end a migration.

use std::io;
use std::time::Duration;

use migration::commit::SourceInput;
use migration::link::LinkError;
use migration::ram::RamError;
use migration::schema::SchemaError;
use thiserror::Error;

use super::barrier::Barrier;
use crate::hypervisor::{HypervisorError, VcpuError};
use crate::memory::LayoutError;
use crate::pci::ConfigError;
use crate::platform::saved_state::InvalidState;
use crate::remote::vhost_user::VhostUserError;
use crate::transport::TransportError;

/// Why a machine did not move.
#[derive(Debug, Error)]
pub enum MigrationError {
    /// A device that cannot move.
    #[error("device {device} cannot move: {why}")]
    CannotMove {
        /// Which device.
        device: String,
        /// What it lacks.
        why: &'static str,
    },
    /// What was handed over does not fit the machine.
    #[error("{0}")]
    Setup(String),
    /// The other side's machine is another one.
    #[error("the machine does not fit its destination: {}", reasons.join("; "))]
    Refused {
        /// Everything that does not fit.
        reasons: Vec<String>,
    },
    /// The other side gave up.
    #[error("the other core gave up: {reason}")]
    GivenUp {
        /// Why.
        reason: String,
    },
    /// Its owner has given it up.
    #[error("nobody awaits the machine any more")]
    NotAwaited,
    /// The other side said something that it should not have.
    #[error("the other core said {said} instead of {expected}")]
    Unexpected {
        /// What came.
        said: &'static str,
        /// What was waited for.
        expected: &'static str,
    },
    /// Memory could not be laid out anew.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The guest is too fast.
    #[error(
        "the guest dirties {} KiB/s and {} KiB/s can be sent: allow a longer downtime, or let \
         the guest be slowed down", dirtied / 1024, sent / 1024
    )]
    NotConverging {
        /// Bytes a second.
        dirtied: u64,
        /// Bytes a second.
        sent: u64,
    },
    /// The guest did something that ends or restarts the machine.
    #[error("the guest {0} while it was to be moved")]
    Guest(String),
    /// Units did not come to a barrier in time.
    #[error("barrier {barrier}: {units:?} did not arrive within {} ms", within.as_millis())]
    Late {
        /// Which barrier.
        barrier: Barrier,
        /// Who is missing.
        units: Vec<String>,
        /// How long they had.
        within: Duration,
    },
    /// A device failed.
    #[error("device {device} did not {what}")]
    Device {
        /// Which device.
        device: String,
        /// What it should have done.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<MigrationError>,
    },
    /// The machine is here, and not all of its devices.
    #[error("{why}; the machine stays paused, resume it when this is mended")]
    StaysPaused {
        /// What ended the migration.
        why: String,
        /// What keeps it from going on.
        #[source]
        source: Box<MigrationError>,
    },
    /// The machine is at its destination, and does not run.
    #[error(
        "the machine is at its destination and stays paused, resume it there when this is mended: {why}"
    )]
    PausedThere {
        /// What the other side says.
        why: String,
    },
    /// The link between the cores failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A memory channel failed.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Memory channels did not come to an end.
    #[error("memory channels stand still")]
    RamStalled,
    /// Saved state does not fit its schema.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// Saved state names devices that there are not.
    #[error("saved state is of devices {found:?}, there are {expected:?}")]
    Units {
        /// In the state.
        found: Vec<String>,
        /// Here.
        expected: Vec<String>,
    },
    /// Saved state has another number of vCPUs.
    #[error("saved state is of {found} vCPUs, there are {expected}")]
    Vcpus {
        /// In the state.
        found: usize,
        /// Here.
        expected: usize,
    },
    /// Saved state is of a machine with firmware, or of one without.
    #[error(
        "saved state is of a machine {} firmware, this one has {}",
        if *here { "without" } else { "with" },
        if *here { "one" } else { "none" }
    )]
    Firmware {
        /// Whether this machine has one.
        here: bool,
    },
    /// A part of the platform cannot have been in the saved state.
    #[error(transparent)]
    Platform(#[from] InvalidState),
    /// PCI configuration space cannot have been in the saved state.
    #[error("the PCI host bridge")]
    Pci(#[from] ConfigError),
    /// KVM refused something.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// vCPUs did not do what they were told.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A transport did not.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A back-end did not.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// The system did not give something.
    #[error("{what} cannot be had")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl MigrationError {
    /// Whether a back-end has said that it cannot, and why.
    pub(super) fn is_declined(&self) -> bool {
        let cause = match self {
            Self::VhostUser(error) => Some(error),
            Self::Transport(TransportError::Device(error)) => error.cause().downcast_ref(),
            _ => None,
        };
        matches!(cause, Some(VhostUserError::Declined { .. }))
    }

    /// Whether a channel failed, of memory or from device to device: maybe since its other end did.
    pub(super) fn is_of_a_channel(&self) -> bool {
        matches!(self, Self::Ram(_) | Self::Device { .. })
    }

    /// Whether the link is lost: the other side may have said why before it closed it.
    pub(super) fn is_of_a_lost_link(&self) -> bool {
        matches!(self, Self::Link(LinkError::Lost(_)))
    }

    /// What it means for the commit.
    pub fn input(&self) -> SourceInput {
        match self {
            Self::Link(LinkError::Deadline { .. }) => SourceInput::Deadline,
            Self::Link(LinkError::Cancelled) => SourceInput::Failed,
            Self::Link(_) | Self::Unexpected { .. } => SourceInput::LinkLost,
            Self::Refused { .. } | Self::GivenUp { .. } => SourceInput::Discarded,
            _ => SourceInput::Failed,
        }
    }
}

/// Wraps a failure to get something from the system.
pub(super) fn system(what: &'static str) -> impl FnOnce(io::Error) -> MigrationError {
    move |source| MigrationError::System { what, source }
}
