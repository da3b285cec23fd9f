//! What a device has that can be moved, on both sides of the socket.

use bitflags::bitflags;
use nix::errno::Errno;

/// State of a device (VFU, «VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE»), numbered as in VFIO. Which state
/// follows which is in Linux's `include/uapi/linux/vfio.h`, `enum vfio_device_mig_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DeviceState {
    /// It failed; only a reset leaves this state.
    Error = 0,
    /// It does nothing, and changes neither itself nor memory.
    Stop = 1,
    /// It runs.
    Running = 2,
    /// Stopped, and its state is read.
    StopCopy = 3,
    /// Stopped, and its state is written.
    Resuming = 4,
    /// It runs, but starts no new access to other devices. Where the other side has no such state
    /// ([`crate::Client::has_p2p`]) nobody asks for it.
    RunningP2p = 5,
    /// It runs, and its state is read ahead.
    PreCopy = 6,
    /// As `PreCopy`, but it starts no new access to other devices.
    PreCopyP2p = 7,
}

impl DeviceState {
    /// All states, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// The state of this number, if there is one.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }

    /// What a device needs to have the state.
    pub(crate) fn needs(self) -> MigrationFlags {
        match self {
            Self::RunningP2p => MigrationFlags::P2P,
            Self::PreCopy => MigrationFlags::PRE_COPY,
            Self::PreCopyP2p => MigrationFlags::PRE_COPY | MigrationFlags::P2P,
            _ => MigrationFlags::empty(),
        }
    }
}

bitflags! {
    /// `VFIO_MIGRATION_*`: which states a device has beside `Running` and `Error`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct MigrationFlags: u64 {
        /// `Stop`, `StopCopy` and `Resuming`; every device that moves has these.
        const STOP_COPY = 1 << 0;
        /// `RunningP2p`, and `PreCopyP2p` with the next.
        const P2P = 1 << 1;
        /// `PreCopy`.
        const PRE_COPY = 1 << 2;
    }
}

/// Addresses, as the device uses them, whose writes it notes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// The first.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// A device that can be moved.
pub trait Migration {
    /// Which states it has.
    fn flags(&self) -> MigrationFlags;

    /// Where it is.
    fn state(&self) -> Result<DeviceState, Errno>;

    /// Goes to a state that it has, by the way that VFIO lays down; it is there when this returns. On
    /// an error it is anywhere on that way, or in [`DeviceState::Error`].
    fn set_state(&mut self, state: DeviceState) -> Result<(), Errno>;

    /// Reads more of its state, in a state that saves, as much as there is room for. Less is read when
    /// there is no more: for the moment while it runs, and for good once it is stopped.
    fn read_state(&mut self, data: &mut [u8]) -> Result<usize, Errno>;

    /// Takes more of the state of another, all of it, in [`DeviceState::Resuming`].
    fn write_state(&mut self, data: &[u8]) -> Result<(), Errno>;
}

/// A device that notes which memory it writes.
pub trait DmaLog {
    /// Begins to note writes to these ranges, or to all memory if there are none, of pages of `page`
    /// bytes, or of another size that it can. That is returned.
    fn start(&mut self, page: u64, ranges: &[DmaRange]) -> Result<u64, Errno>;

    /// Notes nothing any more.
    fn stop(&mut self) -> Result<(), Errno>;

    /// Sets a bit for each page of `page` bytes, a power of two, that was written in a range since the
    /// last time, from the lowest bit of the first number on. All bits are 0 before.
    fn report(&mut self, range: DmaRange, page: u64, bitmap: &mut [u64]) -> Result<(), Errno>;
}
