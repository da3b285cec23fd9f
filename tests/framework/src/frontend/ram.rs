//! Guest memory and dirty log, shared with device processes.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::{VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

/// Makes an anonymous file.
pub(super) fn memory_file(size: u64) -> Result<File> {
    let fd: OwnedFd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC)?;
    let file = File::from(fd);
    file.set_len(size)?;
    Ok(file)
}

/// One region of guest memory in a file that can be handed over.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    next: u64,
}

impl GuestRam {
    /// Memory of `size` bytes at guest address `base`.
    pub fn new(base: u64, size: usize) -> Result<Self> {
        let file = memory_file(size as u64)?;
        let range = (GuestAddress(base), size, Some(FileOffset::new(file, 0)));
        Ok(GuestRam {
            memory: GuestMemoryMmap::from_ranges_with_files([range])?,
            next: base,
        })
    }

    /// The memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Takes `len` bytes that nobody else uses, at a multiple of `align`, a power of two.
    pub fn allocate(&mut self, len: usize, align: u64) -> Result<GuestAddress> {
        let start = self.next.next_multiple_of(align);
        let end = start + len as u64;
        let last = self.memory.last_addr().0;
        anyhow::ensure!(end <= last + 1, "guest memory is used up");
        self.next = end;
        Ok(GuestAddress(start))
    }

    /// Writes bytes.
    pub fn write(&self, at: GuestAddress, data: &[u8]) -> Result<()> {
        Ok(self.memory.write_slice(data, at)?)
    }

    /// Reads bytes.
    pub fn read(&self, at: GuestAddress, len: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, at)?;
        Ok(data)
    }

    /// Bytes of it that the host has spent memory on.
    pub fn allocated(&self) -> Result<u64> {
        let region = self.memory.iter().next().context("memory has a region")?;
        let file = region.file_offset().context("it is in a file")?.file();
        Ok(file.metadata()?.blocks() * 512)
    }

    /// What the front-end says of the region.
    pub fn region(&self) -> Result<VhostUserMemoryRegionInfo> {
        let region = self.memory.iter().next().context("memory has a region")?;
        Ok(VhostUserMemoryRegionInfo::from_guest_region(region)?)
    }

    /// This process's own address of a guest address, which ring addresses are given in.
    pub fn user_address(&self, at: GuestAddress) -> Result<u64> {
        Ok(self.memory.get_host_address(at)?.addr() as u64)
    }
}

/// A dirty log: one bit for each 4 KiB page from guest address 0.
#[derive(Debug)]
pub struct DirtyBitmap {
    file: File,
    map: GuestMemoryMmap,
}

impl DirtyBitmap {
    /// A log for guest addresses below `end`.
    pub fn new(end: u64) -> Result<Self> {
        let size = usize::try_from(end.div_ceil(4096 * 8))?.next_multiple_of(4096);
        let file = memory_file(size as u64)?;
        let range = (
            GuestAddress(0),
            size,
            Some(FileOffset::new(file.try_clone()?, 0)),
        );
        Ok(DirtyBitmap {
            file,
            map: GuestMemoryMmap::from_ranges_with_files([range])?,
        })
    }

    /// What SET_LOG_BASE says of it.
    pub fn region(&self) -> Result<VhostUserDirtyLogRegion> {
        Ok(VhostUserDirtyLogRegion {
            mmap_size: self.file.metadata()?.len(),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        })
    }

    /// Whether the page at a guest address is marked.
    pub fn is_dirty(&self, at: GuestAddress) -> Result<bool> {
        let page = at.0 / 4096;
        let byte: u8 = self.map.load(GuestAddress(page / 8), Ordering::Acquire)?;
        Ok(byte & (1 << (page % 8)) != 0)
    }

    /// Pages that are marked, as guest addresses.
    pub fn dirty_pages(&self) -> Result<Vec<u64>> {
        let region: &GuestRegionMmap = self.map.iter().next().context("log has a region")?;
        (0..region.len() * 8)
            .map(|page| GuestAddress(page * 4096))
            .filter_map(|page| match self.is_dirty(page) {
                Ok(true) => Some(Ok(page.0)),
                Ok(false) => None,
                Err(error) => Some(Err(error)),
            })
            .collect()
    }

    /// Forgets all marks.
    pub fn clear(&self) -> Result<()> {
        let size = usize::try_from(self.file.metadata()?.len())?;
        Ok(self.map.write_slice(&vec![0; size], GuestAddress(0))?)
    }
}
