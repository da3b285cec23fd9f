//! Where BARs are put at first.

use std::sync::{Mutex, PoisonError};

use thiserror::Error;
use vm_allocator::{AddressAllocator, AllocPolicy};

use crate::layout::MMIO32;

/// Which of a function's six base address registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarIndex {
    /// At 0x10.
    Bar0 = 0,
    /// At 0x14.
    Bar1 = 1,
    /// At 0x18.
    Bar2 = 2,
    /// At 0x1c.
    Bar3 = 3,
    /// At 0x20.
    Bar4 = 4,
    /// At 0x24.
    Bar5 = 5,
}

impl BarIndex {
    /// All six.
    pub const ALL: [Self; 6] = [
        Self::Bar0,
        Self::Bar1,
        Self::Bar2,
        Self::Bar3,
        Self::Bar4,
        Self::Bar5,
    ];

    /// Offset of the register.
    pub fn register(self) -> u8 {
        0x10 + 4 * self as u8
    }
}

/// Why there is no address for a BAR.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BarError {
    /// The size is no power of two of at least 16 bytes.
    #[error("BAR size {size:#x} is not a power of two of 16 bytes or more")]
    Size {
        /// Bytes asked for.
        size: u32,
    },
    /// The window is full.
    #[error("no room for a BAR of {size:#x} bytes in {:#x}..{:#x}", MMIO32.start, MMIO32.end)]
    Full {
        /// Bytes asked for.
        size: u32,
    },
}

/// Gives addresses in [`MMIO32`], each aligned to its size.
pub struct BarAllocator {
    free: Mutex<AddressAllocator>,
}

impl BarAllocator {
    /// The whole window is free.
    pub fn new() -> Result<Self, BarError> {
        let free = AddressAllocator::new(MMIO32.start, MMIO32.end - MMIO32.start)
            .map_err(|_| BarError::Full { size: 0 })?;
        Ok(Self {
            free: Mutex::new(free),
        })
    }

    /// An address for a BAR of `size` bytes.
    pub fn allocate(&self, size: u32) -> Result<u32, BarError> {
        if !size.is_power_of_two() || size < 16 {
            return Err(BarError::Size { size });
        }
        let range = self
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .allocate(size.into(), size.into(), AllocPolicy::FirstMatch)
            .map_err(|_| BarError::Full { size })?;
        u32::try_from(range.start()).map_err(|_| BarError::Full { size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_aligned_and_apart() {
        let bars = BarAllocator::new().unwrap();
        assert_eq!(bars.allocate(0x1000).unwrap(), 0xc000_0000);
        assert_eq!(bars.allocate(0x8000).unwrap(), 0xc000_8000);
        assert_eq!(bars.allocate(0x1000).unwrap(), 0xc000_1000);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let bars = BarAllocator::new().unwrap();
        assert_eq!(bars.allocate(24), Err(BarError::Size { size: 24 }));
        bars.allocate(1 << 28).unwrap();
        bars.allocate(1 << 28).unwrap();
        let full = bars.allocate(0x1000).unwrap_err();
        assert_eq!(
            full.to_string(),
            "no room for a BAR of 0x1000 bytes in 0xc0000000..0xe0000000"
        );
    }
}
