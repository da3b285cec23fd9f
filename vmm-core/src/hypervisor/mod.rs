//! KVM: one VM, its vCPU threads, memory slots, interrupts and doorbells.
//!
//! What a KVM lacks is found by asking it (capabilities, or the answer to the first
//! try), never by its name: nested state, TSC scaling, the interrupt controllers'
//! registers with a split irqchip may all be absent.

mod cpu_level;
mod cpuid;
mod doorbells;
mod interrupts;
mod saved_state;
mod slots;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

use std::io;

use thiserror::Error;

pub use cpu_level::{CpuLevel, LacksLevel};
pub use cpuid::guest_cpuid;
pub use interrupts::Interrupts;
pub use saved_state::{VcpuSavedState, VmSavedState};
pub use slots::MemorySlots;
pub use vcpu::{Ended, Throttle, Vcpu, VcpuBuses, VcpuError, VcpuEvents, VcpuSet};
pub use vm::{Vm, open_kvm};

/// Why KVM cannot be used, or what it refused.
#[derive(Debug, Error)]
pub enum HypervisorError {
    /// The device cannot be opened.
    #[error(
        "{path} cannot be opened; is KVM there (modprobe kvm_intel or kvm_amd), and may this user use it (group kvm)?"
    )]
    Open {
        /// The device's path.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// What was opened is not KVM as it is stable since Linux 2.6.22.
    #[error("{path} is not a KVM device: API version {version}, expected 12")]
    ApiVersion {
        /// The device's path.
        path: String,
        /// What it said.
        version: i32,
    },
    /// A capability without which there is no machine.
    #[error("this KVM lacks {capability}, which Godwit needs")]
    Missing {
        /// KVM's name for it.
        capability: &'static str,
    },
    /// The processor has less than was asked for.
    #[error(transparent)]
    Level(#[from] LacksLevel),
    /// More vCPUs than KVM runs.
    #[error("{wanted} vCPUs wanted, this KVM runs at most {most}")]
    TooManyVcpus {
        /// vCPUs asked for.
        wanted: u32,
        /// vCPUs possible.
        most: usize,
    },
    /// An ioctl failed.
    #[error("KVM refused to {what}")]
    Refused {
        /// What was asked, as a verb phrase.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// A saved state that no KVM made.
    #[error("saved {what} is not valid: {why}")]
    InvalidState {
        /// The part of the state.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// Turns a failed ioctl into an error that says what was asked.
fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> HypervisorError {
    move |errno| HypervisorError::Refused {
        what,
        source: io::Error::from_raw_os_error(errno.errno()),
    }
}
