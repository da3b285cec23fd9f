//! The registers of one queue.

use std::io;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::RingBase;

/// Why a queue cannot be used as it is set up.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum QueueError {
    /// Not a power of two, or too many.
    #[error("queue size {size} is not a power of two up to {max}")]
    Size {
        /// Descriptors asked for.
        size: u16,
        /// Most there can be.
        max: u16,
    },
    /// An area whose address is not aligned, or that wraps.
    #[error("queue {area} at {address:#x} is not {align}-byte aligned or goes beyond 2^64")]
    Area {
        /// Which part of the ring.
        area: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// The alignment it needs (virtio 1.3, 2.7).
        align: u64,
    },
}

pub(super) struct Queue {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) base: RingBase,
    /// Rung by the guest; the same for the life of the device.
    pub(super) kick: Arc<EventFd>,
}

impl Queue {
    pub(super) fn new(max_size: u16) -> io::Result<Self> {
        Ok(Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            base: RingBase(0),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    pub(super) fn reset(&mut self) {
        self.size = self.max_size;
        self.enabled = false;
        (self.descriptors, self.driver, self.device) = (0, 0, 0);
        self.base = RingBase(0);
    }

    pub(super) fn is_size_valid(&self, size: u16) -> bool {
        size.is_power_of_two() && size <= self.max_size
    }

    /// Whether the split ring's layout can be (virtio 1.3, 2.7). Whether it lies in
    /// memory is for the device to find out, which has the memory.
    pub(super) fn check(&self) -> Result<(), QueueError> {
        let areas = [self.descriptors, self.driver, self.device];
        self.check_layout(self.size, areas)
    }

    /// As [`Self::check`], for a layout that this queue does not have yet.
    pub(super) fn check_layout(&self, size: u16, areas: [u64; 3]) -> Result<(), QueueError> {
        if !self.is_size_valid(size) {
            let max = self.max_size;
            return Err(QueueError::Size { size, max });
        }
        let size = u64::from(size);
        let areas = [
            ("descriptor table", areas[0], 16, 16 * size),
            ("driver area", areas[1], 2, 6 + 2 * size),
            ("device area", areas[2], 4, 6 + 8 * size),
        ];
        for (area, address, align, bytes) in areas {
            if !address.is_multiple_of(align) || address.checked_add(bytes).is_none() {
                return Err(QueueError::Area {
                    area,
                    address,
                    align,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_checked() {
        let mut queue = Queue::new(256).unwrap();
        queue.check().unwrap();
        queue.size = 3;
        assert_eq!(queue.check(), Err(QueueError::Size { size: 3, max: 256 }));
        queue.size = 512;
        assert!(queue.check().is_err());
        queue.size = 256;
        queue.descriptors = 8;
        assert_eq!(
            queue.check().unwrap_err().to_string(),
            "queue descriptor table at 0x8 is not 16-byte aligned or goes beyond 2^64"
        );
        queue.descriptors = 0;
        queue.device = !3;
        assert!(queue.check().is_err());
    }
}
