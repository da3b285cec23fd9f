//! A shared mapping of bytes that another process reads and writes at the same time.
#![expect(unsafe_code, reason = "maps memory that is shared with the front-end")]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Part of a file, mapped shared; every access is atomic, since the peer uses it too.
#[derive(Debug)]
pub struct SharedMapping {
    start: NonNull<AtomicU8>,
    len: NonZeroUsize,
}

impl SharedMapping {
    /// Maps `len` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// When the range is empty, does not fit the file or the address space, or the offset is not
    /// a multiple of the page size.
    pub fn new(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let invalid = |what: &str| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{what}: {len:#x} bytes at {offset:#x} of a shared file"),
            )
        };
        let end = offset.checked_add(len).ok_or_else(|| invalid("overflow"))?;
        if end > file.metadata()?.len() {
            return Err(invalid("range past the end"));
        }
        let len = usize::try_from(len)
            .ok()
            .and_then(NonZeroUsize::new)
            .filter(|len| isize::try_from(len.get()).is_ok())
            .ok_or_else(|| invalid("impossible length"))?;
        let offset = i64::try_from(offset).map_err(|_| invalid("impossible offset"))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing else refers to it.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(SharedMapping {
            start: start.cast(),
            len,
        })
    }

    /// All of it.
    pub fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: `start` and `len` are a live mapping of this value, AtomicU8 has no alignment
        // and no invalid bit pattern, and shared atomics may be written by anyone at any time.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len.get()) }
    }

    /// The aligned 16-bit word at byte `at`. Panics where there is none, as a slice would.
    pub fn word16(&self, at: usize) -> &AtomicU16 {
        let bytes = &self.bytes()[at..at + 2];
        assert!(at.is_multiple_of(2), "word at odd byte {at}");
        // SAFETY: the bounds are checked, the mapping is page-aligned so the word is aligned, and
        // every access to this memory is atomic.
        unsafe { &*bytes.as_ptr().cast() }
    }

    /// The aligned 64-bit word at byte `at`. Panics where there is none, as a slice would.
    pub fn word64(&self, at: usize) -> &AtomicU64 {
        let bytes = &self.bytes()[at..at + 8];
        assert!(at.is_multiple_of(8), "word at unaligned byte {at}");
        // SAFETY: as in `word16`.
        unsafe { &*bytes.as_ptr().cast() }
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no borrow of it outlives the value.
        if let Err(error) = unsafe { munmap(self.start.cast(), self.len.get()) } {
            tracing::error!(%error, "cannot unmap shared memory");
        }
    }
}

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for SharedMapping {}
// SAFETY: all access is through shared references to atomics.
unsafe impl Sync for SharedMapping {}
