//! The guest's memory as the synthetic device accesses it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use libc::{PROT_READ, PROT_WRITE};
use vfio_user::{DmaRegion, Errno};
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
    GuestRegionMmap,
};

use super::registers::{Failure, MAX_LENGTH};
use crate::memory;

/// All that is mapped. What came without a file cannot be reached from here, and is not memory.
#[derive(Debug)]
pub(super) struct Dma {
    memory: GuestMemoryMmap,
}

impl Dma {
    /// Nothing.
    pub(super) fn new() -> Self {
        Dma {
            memory: GuestMemoryMmap::new(),
        }
    }

    /// Maps a region.
    ///
    /// # Errors
    /// Its file ends before it, or it cannot be mapped.
    pub(super) fn map(&mut self, region: DmaRegion, file: OwnedFd) -> Result<(), Errno> {
        let mapping = memory::map(&region, file)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(region.address));
        let memory = self
            .memory
            .insert_region(Arc::new(region.ok_or(Errno::EINVAL)?));
        self.memory = memory.map_err(|_| Errno::EINVAL)?;
        Ok(())
    }

    /// Unmaps a region, if it is mapped.
    pub(super) fn unmap(&mut self, address: u64, size: u64) {
        if let Ok((memory, _)) = self.memory.remove_region(GuestAddress(address), size) {
            self.memory = memory;
        }
    }

    /// Copies as if by way of a buffer.
    pub(super) fn copy(&self, source: u64, destination: u64, length: u32) -> Result<(), Failure> {
        if length == 0 || length > MAX_LENGTH {
            return Err(Failure::Length);
        }
        self.check(source, length, PROT_READ)
            .ok_or(Failure::Source)?;
        self.check(destination, length, PROT_WRITE)
            .ok_or(Failure::Destination)?;
        let mut bytes = vec![0; length as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(source))
            .map_err(|_| Failure::Source)?;
        self.memory
            .write_slice(&bytes, GuestAddress(destination))
            .map_err(|_| Failure::Destination)
    }

    /// Whether all of it is mapped, with this protection.
    fn check(&self, start: u64, length: u32, protection: i32) -> Option<()> {
        let last = start.checked_add(u64::from(length) - 1)?;
        let mut at = start;
        loop {
            let region = self.memory.find_region(GuestAddress(at))?;
            if region.prot() & protection == 0 {
                return None;
            }
            let end = region.last_addr().0;
            if end >= last {
                return Some(());
            }
            at = end + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Seek as _, Write as _};

    use super::*;

    const PAGE: u64 = 4096;

    fn region(address: u64, offset: u64, writable: bool) -> DmaRegion {
        DmaRegion {
            address,
            size: PAGE,
            offset,
            readable: true,
            writable,
        }
    }

    /// Two pages of a file, the second of which can only be read.
    fn two_pages() -> (Dma, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * PAGE).unwrap();
        let mut dma = Dma::new();
        for (address, offset, writable) in [(0x10_0000, 0, true), (0x10_1000, PAGE, false)] {
            let file = file.try_clone().unwrap().into();
            dma.map(region(address, offset, writable), file).unwrap();
        }
        (dma, file)
    }

    #[test]
    fn bytes_are_copied_across_regions() {
        let (dma, mut file) = two_pages();
        file.seek(std::io::SeekFrom::Start(PAGE - 2)).unwrap();
        file.write_all(b"abcd").unwrap();
        dma.copy(0x10_0ffe, 0x10_0000, 4).unwrap();
        // What overlaps is read before it is written.
        dma.copy(0x10_0000, 0x10_0002, 4).unwrap();
        let mut found = [0; 6];
        file.rewind().unwrap();
        file.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"ababcd");
    }

    #[test]
    fn what_is_not_there_or_not_writable_is_refused() {
        let (mut dma, _file) = two_pages();
        let whole = 0x2000;
        assert_eq!(dma.copy(0x10_0000, 0x10_0000, 0), Err(Failure::Length));
        assert_eq!(
            dma.copy(0x10_0000, 0x10_0000, MAX_LENGTH + 1),
            Err(Failure::Length)
        );
        assert_eq!(
            dma.copy(0x10_0000, 0x10_0000, whole),
            Err(Failure::Destination)
        );
        assert_eq!(
            dma.copy(0x10_0000, 0x10_0000, whole + 1),
            Err(Failure::Source)
        );
        assert_eq!(dma.copy(u64::MAX, 0x10_0000, 1), Err(Failure::Source));
        assert_eq!(dma.copy(u64::MAX, 0x10_0000, 2), Err(Failure::Source));
        dma.unmap(0x10_1000, PAGE);
        assert_eq!(dma.copy(0x10_0fff, 0x10_0000, 2), Err(Failure::Source));
    }
}
