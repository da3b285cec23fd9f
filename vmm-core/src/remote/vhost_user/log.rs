//! The dirty log: a bit for each page that a back-end has written (VU, «Migration»).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::FrontendReq;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes as _, FileOffset, VolatileMemory};

use super::VhostUserError;
use super::connection::Connection;
use crate::memory::Region;

/// Bytes of guest memory for a bit.
const PAGE: u64 = 4096;
const PAGES_PER_WORD: u64 = u64::BITS as u64;

/// Bytes of the bitmap that are looked through at once.
const BLOCK: usize = 512;
const PAGES_PER_BYTE: u64 = u8::BITS as u64;

/// A bitmap by guest-physical page number, shared with back-ends.
pub struct DirtyLog {
    map: MmapRegion<()>,
    file: File,
    words: u64,
}

impl DirtyLog {
    /// A log with room for every page of `regions`, all clean.
    pub fn new(regions: &[Region]) -> io::Result<Self> {
        let end = regions.iter().map(|r| r.gpa() + r.size()).max();
        let words = end.unwrap_or(PAGE).div_ceil(PAGE * PAGES_PER_WORD);
        let bytes = words * 8;
        let file = File::from(memfd_create("dirty-log", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(bytes)?;
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), length)
            .map_err(io::Error::other)?;
        Ok(Self { map, file, words })
    }

    /// Bytes of the bitmap.
    pub fn size(&self) -> u64 {
        self.words * 8
    }

    /// Whether it has room for every page of `regions`.
    pub(super) fn covers(&self, regions: &[Region]) -> bool {
        let end = self.words * PAGES_PER_WORD * PAGE;
        regions.iter().all(|r| r.gpa() + r.size() <= end)
    }

    /// Takes the dirty pages and leaves them clean: `dirty` is called with the number of
    /// a first page and the bits of 64 pages from it on, where any is dirty.
    pub fn take(&self, mut dirty: impl FnMut(u64, u64)) {
        let slice = self.map.as_volatile_slice();
        let mut block = [0; BLOCK];
        for start in (0..self.map.len()).step_by(BLOCK) {
            let end = self.map.len().min(start + BLOCK);
            let block = &mut block[..end - start];
            // Most of it is clean, and faster to look through in large pieces.
            let read = slice.read_slice(block, start);
            if read.is_ok() && block.iter().all(|byte| *byte == 0) {
                continue;
            }
            for at in (start..end).step_by(8) {
                // Aligned and inside by construction.
                if let Ok(bits) = slice.get_atomic_ref::<AtomicU64>(at)
                    && bits.load(Ordering::Relaxed) != 0
                {
                    let page = at as u64 * PAGES_PER_BYTE;
                    dirty(page, bits.swap(0, Ordering::AcqRel));
                }
            }
        }
    }

    /// SET_LOG_BASE: from now on the back-end marks here. It answers with 8 or with 16
    /// bytes, or any other number: only that it answers matters.
    pub(super) fn set(&self, connection: &mut Connection) -> Result<(), VhostUserError> {
        let mut body = self.size().to_ne_bytes().to_vec();
        body.extend(0u64.to_ne_bytes());
        let fd = Some(self.file.as_raw_fd());
        let (request, name) = (FrontendReq::SET_LOG_BASE as u32, "SET_LOG_BASE");
        connection.order(request, name, &body, fd)?;
        connection
            .answer(request, name, connection.deadline())
            .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Ram;
    use std::os::unix::fs::FileExt;

    #[test]
    fn marked_pages_are_taken_once() {
        let regions = Ram::allocate(64 << 20, None).unwrap().regions().unwrap();
        let log = DirtyLog::new(&regions).unwrap();
        assert_eq!(log.size(), 64 * 256 / 8);
        assert!(log.covers(&regions));
        for page in [0u64, 3, 64, 64 * 256 - 1] {
            let mut byte = [0];
            log.file.read_exact_at(&mut byte, page / 8).unwrap();
            byte[0] |= 1 << (page % 8);
            log.file.write_all_at(&byte, page / 8).unwrap();
        }
        let mut taken = Vec::new();
        log.take(|first, bits| taken.push((first, bits)));
        let last = 64 * 256 - 64;
        assert_eq!(taken, [(0, 0b1001), (64, 1), (last, 1 << 63)]);
        log.take(|first, _| panic!("page {first} was taken before"));
    }

    #[test]
    fn a_log_that_is_too_small_is_noticed() {
        let small = Ram::allocate(1 << 20, None).unwrap().regions().unwrap();
        let large = Ram::allocate(4 << 20, None).unwrap().regions().unwrap();
        assert!(!DirtyLog::new(&small).unwrap().covers(&large));
    }
}
