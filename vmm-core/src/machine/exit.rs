//! How a machine ends, and what the process says about it.

use std::fmt;

use crate::hypervisor::Ended;

/// Why a machine is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The guest switched itself off.
    PoweredOff,
    /// The owner or a signal ended it.
    Terminated,
    /// The machine runs elsewhere.
    Moved,
    /// The guest cannot go on.
    GuestFailed {
        /// On this vCPU.
        vcpu: u32,
        /// For this.
        ended: Ended,
    },
    /// The core itself failed.
    Internal(String),
}

impl Reason {
    /// The exit status: 0 for an end that somebody asked for, 3 for a guest that cannot
    /// go on, 1 for anything else.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::PoweredOff | Self::Terminated | Self::Moved => 0,
            Self::Internal(_) => 1,
            Self::GuestFailed { .. } => 3,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => write!(f, "the guest powered off"),
            Self::Moved => write!(f, "the machine has moved"),
            Self::Terminated => write!(f, "terminated"),
            Self::GuestFailed { vcpu, ended } => write!(f, "vCPU {vcpu}: {ended}"),
            Self::Internal(why) => write!(f, "{why}"),
        }
    }
}
