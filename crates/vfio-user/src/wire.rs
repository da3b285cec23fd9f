//! Messages as bytes (VFU, «Header» and «Commands»). Numbers are little-endian, as on the hosts.

mod capabilities;
mod feature;
mod irqs;
mod layout;
mod region;

use std::fmt;

use nix::errno::Errno;

pub(crate) use capabilities::Capabilities;
use capabilities::DEFAULT_TRANSFER;
pub(crate) use feature::*;
pub(crate) use irqs::SetIrqs;
pub(crate) use layout::{Layout, layout};
pub(crate) use region::{RegionReply, RegionRequest};

/// Version of the protocol, major and minor.
pub(crate) const VERSION: (u16, u16) = (0, 1);
/// Bytes of data in one message, at most, here.
pub(crate) const MOST_TRANSFER: u32 = DEFAULT_TRANSFER;
/// Bytes of a message that is received here, at most: data with what is before them.
pub(crate) const MOST_BYTES: u32 = MOST_TRANSFER + 64;
/// Memory that a device may access consists of pages of this many bytes.
pub(crate) const PAGE: u64 = 4096;

/// In [`Header::flags`]: what the message is.
pub(crate) const KIND: u32 = 0xf;
/// A kind: a command.
pub(crate) const COMMAND: u32 = 0;
/// A kind: the reply to one.
pub(crate) const REPLY: u32 = 1;
/// No reply is wanted.
pub(crate) const NO_REPLY: u32 = 1 << 4;
/// The command has failed.
pub(crate) const ERROR: u32 = 1 << 5;

layout! {
    /// What every message begins with.
    Header { id: u16, command: u16, size: u32, flags: u32, error: u32 }
    /// What VERSION begins with, in both directions; capabilities follow.
    Version { major: u16, minor: u16 }
    /// DMA_MAP.
    DmaMap { argsz: u32, flags: u32, offset: u64, address: u64, size: u64 }
    /// DMA_UNMAP, in both directions.
    DmaUnmap { argsz: u32, flags: u32, address: u64, size: u64 }
    /// DEVICE_GET_INFO, in both directions.
    Info { argsz: u32, flags: u32, regions: u32, irqs: u32 }
    /// DEVICE_GET_IRQ_INFO, in both directions.
    Irq { argsz: u32, flags: u32, index: u32, count: u32 }
    /// What REGION_READ and REGION_WRITE begin with, in both directions; data follow.
    Access { offset: u64, region: u32, count: u32 }
}

impl Header {
    /// The reply that a command has failed.
    pub(crate) fn refusal(self, errno: Errno) -> Self {
        Self {
            size: Self::size(),
            flags: REPLY | ERROR,
            error: errno as u32,
            ..self
        }
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind: &dyn fmt::Display = match self.flags & KIND {
            COMMAND => &"command",
            REPLY => &"reply",
            other => &format!("message of kind {other}"),
        };
        write!(f, "{kind} {} of {}", self.id, Command(self.command))
    }
}

/// In [`DmaMap::flags`]: the device may read it.
pub(crate) const DMA_READABLE: u32 = 1 << 0;
/// In [`DmaMap::flags`]: the device may write it.
pub(crate) const DMA_WRITABLE: u32 = 1 << 1;

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Command(pub u16);

#[rustfmt::skip]
impl Command {
    /// `VFIO_USER_VERSION`.
    pub const VERSION: Self = Self(1);
    /// `VFIO_USER_DMA_MAP`.
    pub const DMA_MAP: Self = Self(2);
    /// `VFIO_USER_DMA_UNMAP`.
    pub const DMA_UNMAP: Self = Self(3);
    /// `VFIO_USER_DEVICE_GET_INFO`.
    pub const DEVICE_GET_INFO: Self = Self(4);
    /// `VFIO_USER_DEVICE_GET_REGION_INFO`.
    pub const DEVICE_GET_REGION_INFO: Self = Self(5);
    /// `VFIO_USER_DEVICE_GET_REGION_IO_FDS`.
    pub const DEVICE_GET_REGION_IO_FDS: Self = Self(6);
    /// `VFIO_USER_DEVICE_GET_IRQ_INFO`.
    pub const DEVICE_GET_IRQ_INFO: Self = Self(7);
    /// `VFIO_USER_DEVICE_SET_IRQS`.
    pub const DEVICE_SET_IRQS: Self = Self(8);
    /// `VFIO_USER_REGION_READ`.
    pub const REGION_READ: Self = Self(9);
    /// `VFIO_USER_REGION_WRITE`.
    pub const REGION_WRITE: Self = Self(10);
    /// `VFIO_USER_DMA_READ`.
    pub const DMA_READ: Self = Self(11);
    /// `VFIO_USER_DMA_WRITE`.
    pub const DMA_WRITE: Self = Self(12);
    /// `VFIO_USER_DEVICE_RESET`.
    pub const DEVICE_RESET: Self = Self(13);
    /// `VFIO_USER_REGION_WRITE_MULTI`.
    pub const REGION_WRITE_MULTI: Self = Self(15);
    /// `VFIO_USER_DEVICE_FEATURE`.
    pub const DEVICE_FEATURE: Self = Self(16);
    /// `VFIO_USER_MIG_DATA_READ`.
    pub const MIG_DATA_READ: Self = Self(17);
    /// `VFIO_USER_MIG_DATA_WRITE`.
    pub const MIG_DATA_WRITE: Self = Self(18);

    fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::VERSION => "VERSION",
            Self::DMA_MAP => "DMA_MAP",
            Self::DMA_UNMAP => "DMA_UNMAP",
            Self::DEVICE_GET_INFO => "DEVICE_GET_INFO",
            Self::DEVICE_GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
            Self::DEVICE_GET_REGION_IO_FDS => "DEVICE_GET_REGION_IO_FDS",
            Self::DEVICE_GET_IRQ_INFO => "DEVICE_GET_IRQ_INFO",
            Self::DEVICE_SET_IRQS => "DEVICE_SET_IRQS",
            Self::REGION_READ => "REGION_READ",
            Self::REGION_WRITE => "REGION_WRITE",
            Self::DMA_READ => "DMA_READ",
            Self::DMA_WRITE => "DMA_WRITE",
            Self::DEVICE_RESET => "DEVICE_RESET",
            Self::REGION_WRITE_MULTI => "REGION_WRITE_MULTI",
            Self::DEVICE_FEATURE => "DEVICE_FEATURE",
            Self::MIG_DATA_READ => "MIG_DATA_READ",
            Self::MIG_DATA_WRITE => "MIG_DATA_WRITE",
            _ => return None,
        })
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "command {}", self.0),
        }
    }
}
