//! Virtio 1.2 drivers: the PCI transport, split virtqueues, and the device types.

pub mod blk;
pub mod counter;
pub mod net;
pub mod queue;
pub mod transport;

/// Feature bits that belong to no device type (section 6).
pub mod feature {
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
}

/// How drivers are to set up their devices; from the command line.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Entries of a ring, at most.
    pub ring: u16,
    /// Queues or queue pairs, at most.
    pub queues: u16,
    pub msix: bool,
    pub event_idx: bool,
    /// Ask devices for interrupts.
    pub interrupts: bool,
    /// How long a request may take.
    pub timeout_us: u64,
}
