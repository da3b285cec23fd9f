//! What a device needs to interrupt a vCPU and to be rung by one, without KVM.
//!
//! [`crate::hypervisor`] implements these on KVM; tests of devices bring their own.

use std::io;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// A global system interrupt: the number behind which KVM keeps one route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

/// What a message-signalled interrupt writes, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Guest-physical address of the write.
    pub address: u64,
    /// The value written.
    pub data: u32,
}

/// Why the hypervisor did not take an interrupt request.
#[derive(Debug, Error)]
pub enum InterruptError {
    /// Every route is taken.
    #[error("{wanted} interrupt routes wanted, {free} are free")]
    Exhausted {
        /// Routes asked for.
        wanted: usize,
        /// Routes left.
        free: usize,
    },
    /// KVM refused.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was asked, as a verb phrase.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

/// Message-signalled interrupts.
///
/// A vector that may fire is *routed* and *attached*. Masking a vector detaches its
/// eventfd, which then counts what the device signals: that count is the pending bit.
/// Attaching an eventfd that is already readable fires at once, so nothing is lost.
pub trait MsiRouter: Send + Sync {
    /// Takes `count` routes, none of which leads anywhere yet.
    fn allocate(&self, count: usize) -> Result<Vec<Gsi>, InterruptError>;
    /// Gives routes back. They must be detached.
    fn free(&self, gsis: &[Gsi]);
    /// Sets where routes lead, all of them in one call to the hypervisor.
    fn route(&self, changes: &[(Gsi, Option<MsiMessage>)]) -> Result<(), InterruptError>;
    /// From now on a write to `event` fires `gsi`, without this process.
    fn attach(&self, gsi: Gsi, event: &EventFd) -> Result<(), InterruptError>;
    /// A write to `event` is only counted from now on.
    fn detach(&self, gsi: Gsi, event: &EventFd) -> Result<(), InterruptError>;
}

/// Doorbells: guest writes that signal an eventfd without leaving the kernel.
pub trait Doorbells: Send + Sync {
    /// From now on a guest write of any size at guest-physical `address` signals `event`.
    fn register(&self, address: u64, event: &EventFd) -> Result<(), InterruptError>;
    /// Undoes [`Self::register`].
    fn unregister(&self, address: u64, event: &EventFd) -> Result<(), InterruptError>;
}

/// One level-triggered or edge-triggered input of the interrupt controller.
pub trait IrqLine: Send + Sync {
    /// Sets the level of the input.
    fn set_level(&self, high: bool) -> Result<(), InterruptError>;
    /// Raises the input and lowers it again: an edge.
    fn pulse(&self) -> Result<(), InterruptError> {
        self.set_level(true)?;
        self.set_level(false)
    }
}
