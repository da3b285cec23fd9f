//! Port and MMIO buses: which device answers an access of a vCPU.
//!
//! Devices have interior mutability, and no lock of the bus is held while one
//! is called: a device may change the bus from inside an access (a BAR moves).

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;

/// A device that answers reads and writes of a range.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what a read at `offset` bytes from the range's start returns.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes a write of `data` at `offset` bytes from the range's start.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be put on a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// Two devices would answer the same address.
    #[error("range {base:#x}+{size:#x} overlaps the range at {other:#x}")]
    Overlap {
        /// First address of the refused range.
        base: u64,
        /// Its size in bytes.
        size: u64,
        /// First address of the range that is there.
        other: u64,
    },
    /// An empty range, or one beyond the address space.
    #[error("range {base:#x}+{size:#x} is empty or wraps")]
    Invalid {
        /// First address of the refused range.
        base: u64,
        /// Its size in bytes.
        size: u64,
    },
}

struct Range {
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// The devices of one address space, by address.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Range>>,
}

impl Bus {
    /// Puts `device` at `base..base + size`.
    pub fn insert(&self, base: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = size
            .checked_sub(1)
            .and_then(|s| base.checked_add(s))
            .ok_or(BusError::Invalid { base, size })?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other, range)) = ranges.range(..=last).next_back()
            && other + (range.size - 1) >= base
        {
            return Err(BusError::Overlap { base, size, other });
        }
        ranges.insert(base, Range { size, device });
        Ok(())
    }

    /// Takes the range that starts at `base` off the bus; whether there was one.
    pub fn remove(&self, base: u64) -> bool {
        self.ranges
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&base)
            .is_some()
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (&base, range) = ranges.range(..=address).next_back()?;
        let offset = address - base;
        (offset.checked_add(len as u64)? <= range.size).then(|| (offset, Arc::clone(&range.device)))
    }

    /// Reads `data.len()` bytes at `address`; all ones where no device answers.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes `data` at `address`; dropped where no device answers.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);
    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset.to_le_bytes()[0]);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_with_its_offset() {
        let bus = Bus::default();
        let echo = Arc::new(Echo::default());
        bus.insert(0x100, 0x10, echo.clone()).unwrap();
        let mut data = [0; 2];
        bus.read(0x104, &mut data);
        assert_eq!(data, [4, 4]);
        bus.write(0x10f, &[9]);
        assert_eq!(*echo.0.lock().unwrap(), [(15, vec![9])]);
    }

    #[test]
    fn nobody_answers_outside_or_across_the_end() {
        let bus = Bus::default();
        let echo = Arc::new(Echo::default());
        bus.insert(0x100, 0x10, echo.clone()).unwrap();
        for address in [0xff, 0x10f, 0x110, u64::MAX] {
            let mut data = [0; 2];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff, 0xff], "{address:#x}");
            bus.write(address, &[1, 2]);
        }
        assert!(echo.0.lock().unwrap().is_empty());
    }

    #[test]
    fn overlapping_and_empty_ranges_are_refused() {
        let bus = Bus::default();
        let echo = Arc::new(Echo::default());
        bus.insert(0x100, 0x10, echo.clone()).unwrap();
        for (base, size) in [(0xf8, 9), (0x100, 1), (0x10f, 1), (0, 0x1000)] {
            let refused = bus.insert(base, size, echo.clone());
            assert_eq!(
                refused,
                Err(BusError::Overlap {
                    base,
                    size,
                    other: 0x100
                })
            );
        }
        assert_eq!(
            bus.insert(5, 0, echo.clone()),
            Err(BusError::Invalid { base: 5, size: 0 })
        );
        assert!(bus.insert(u64::MAX, 2, echo.clone()).is_err());
        bus.insert(0x110, 1, echo.clone()).unwrap();
        assert!(bus.remove(0x100));
        bus.insert(0x108, 8, echo).unwrap();
    }
}
