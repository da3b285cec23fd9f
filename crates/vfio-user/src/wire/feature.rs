//! DEVICE_FEATURE, MIG_DATA_READ and MIG_DATA_WRITE (VFU, sections of these names).

use nix::errno::Errno;

use super::{Layout, layout};
use crate::migration::DmaRange;

layout! {
    /// What DEVICE_FEATURE begins with, in both directions; data follow.
    Feature { argsz: u32, flags: u32 }
    /// Data of [`MIGRATION`] that is got.
    MigrationData { flags: u64 }
    /// Data of [`DEVICE_STATE`].
    StateData { state: u32, descriptor: u32 }
    /// What the data of [`LOG_START`] begins with; ranges follow.
    LogStart { page: u64, ranges: u32, reserved: u32 }
    /// One of them.
    LogRange { address: u64, size: u64 }
    /// What the data of [`LOG_REPORT`] begins with; a bitmap follows in the reply.
    LogReport { address: u64, size: u64, page: u64 }
    /// What MIG_DATA_READ and MIG_DATA_WRITE begin with, in both directions; data follow.
    StateBytes { argsz: u32, size: u32 }
}

/// A feature: `VFIO_DEVICE_FEATURE_MIGRATION`.
pub(crate) const MIGRATION: u32 = 1;
/// A feature: `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`.
pub(crate) const DEVICE_STATE: u32 = 2;
/// A feature: `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`.
pub(crate) const LOG_START: u32 = 6;
/// A feature: `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`.
pub(crate) const LOG_STOP: u32 = 7;
/// A feature: `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`.
pub(crate) const LOG_REPORT: u32 = 8;

/// In [`Feature::flags`]: the feature.
pub(crate) const FEATURE: u32 = 0xffff;
/// In [`Feature::flags`]: it is read.
pub(crate) const GET: u32 = 1 << 16;
/// In [`Feature::flags`]: it is written.
pub(crate) const SET: u32 = 1 << 17;
/// In [`Feature::flags`]: it is asked whether that can be done.
pub(crate) const PROBE: u32 = 1 << 18;

/// No descriptor.
pub(crate) const NO_DESCRIPTOR: u32 = u32::MAX;

impl LogRange {
    /// A range with an end, of one byte or more.
    pub(crate) fn range(self) -> Result<DmaRange, Errno> {
        let Self { address, size } = self;
        match address.checked_add(size) {
            Some(_) if size > 0 => Ok(DmaRange { address, size }),
            _ => Err(Errno::EINVAL),
        }
    }
}

impl Feature {
    /// With as many bytes of data as this in the reply.
    pub(crate) fn with(flags: u32, data: usize) -> Self {
        let argsz = u32::try_from(Self::SIZE + data).unwrap_or(u32::MAX);
        Self { argsz, flags }
    }
}

impl StateBytes {
    /// With as many bytes of data as this.
    pub(crate) fn of(data: usize) -> Self {
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        Self {
            argsz: length(Self::SIZE + data),
            size: length(data),
        }
    }

    /// Whether it is about as many bytes as this.
    pub(crate) fn has(self, data: usize) -> bool {
        self.size as usize == data
    }
}

impl LogReport {
    /// Numbers of 64 bits that have a bit for each page.
    pub(crate) fn words(&self) -> usize {
        let words = self.size.div_ceil(self.page.max(1)).div_ceil(64);
        usize::try_from(words).unwrap_or(usize::MAX)
    }
}
