//! Giving guest memory back to the host: a hole is punched into the file behind it, for every
//! process that maps it. What is read there afterwards is zero.
#![expect(unsafe_code, reason = "madvise on mapped guest memory")]

use std::io;
use std::os::fd::AsFd;

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::{LOG_PAGE, LogBitmap, Memory};

impl Memory {
    /// The page of the file behind the memory that holds guest address `at`: where it begins, and
    /// its length. Less than that cannot be given back. `None` where there is no memory.
    pub fn page_around(&self, at: GuestAddress) -> Option<(GuestAddress, u64)> {
        let region = self.guest.find_region(at)?;
        let page = page_size(region);
        let offset = (at.0 - region.start_addr().0) / page * page;
        Some((GuestAddress(region.start_addr().0 + offset), page))
    }

    /// Gives the pages that lie wholly within `len` bytes at `start` back to the host, and returns
    /// how many bytes that were. What is no memory is passed over. Nothing is logged: that
    /// is for whoever minds what a page holds afterwards.
    ///
    /// # Errors
    /// The file behind the memory knows no holes, or the memory is locked.
    pub fn discard(&self, start: GuestAddress, len: u64) -> io::Result<u64> {
        let end = start.0.saturating_add(len);
        let mut discarded = 0;
        for region in self.guest.iter() {
            let page = page_size(region);
            let first = region.start_addr().0;
            // A region begins with a page of its file, whatever its guest address.
            let from = start.0.saturating_sub(first).next_multiple_of(page);
            let to = end.saturating_sub(first).min(region.len()) / page * page;
            if from < to {
                let offset = usize::try_from(from).map_err(io::Error::other)?;
                let len = usize::try_from(to - from).map_err(io::Error::other)?;
                remove(region, offset, len)?;
                discarded += to - from;
            }
        }
        Ok(discarded)
    }
}

fn page_size(region: &GuestRegionMmap<LogBitmap>) -> u64 {
    let huge = region
        .file_offset()
        .and_then(|file| fstatfs(file.file().as_fd()).ok())
        .filter(|stat| stat.filesystem_type() == HUGETLBFS_MAGIC)
        .and_then(|stat| u64::try_from(stat.block_size()).ok());
    huge.unwrap_or(LOG_PAGE).max(LOG_PAGE)
}

/// `offset` and `len` are inside the region.
fn remove(region: &GuestRegionMmap<LogBitmap>, offset: usize, len: usize) -> io::Result<()> {
    let start = region.as_ptr().wrapping_add(offset);
    // SAFETY: the range is inside a shared mapping of guest memory that `region` keeps; its bytes
    // are read and written by others at any time already, and become zero.
    match unsafe { libc::madvise(start.cast(), len, libc::MADV_REMOVE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
