//! The dirty log: which guest pages this process wrote, told to the front-end.
//!
//! The front-end shares one bitmap for all of guest memory (SET_LOG_BASE); bit *n* stands for the
//! 4 KiB page at guest address *n* × 4096. It counts only while logging is on (LOG_ALL in
//! SET_FEATURES). One [`DirtyLog`] lives as long as the session, and every memory table of it
//! refers to the same one: a new table cannot lose the log.
//!
//! Writes reach the log by two ways. Those that go through `vm-memory` (rings, headers, status
//! bytes) are marked by the [`LogBitmap`] of their region. Those that it cannot see (io_uring,
//! `readv` into guest memory) are marked by [`super::Memory::mark_dirty`], *after* they happened:
//! a page marked too early can be copied and cleared before the data arrives.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

use super::mapping::SharedMapping;

/// Bytes of guest memory that one bit stands for.
pub const LOG_PAGE: u64 = 4096;

/// The log of one session; shared by its memory tables and queue threads.
#[derive(Debug, Default)]
pub struct DirtyLog {
    on: AtomicBool,
    bitmap: RwLock<Option<SharedMapping>>,
}

impl DirtyLog {
    /// Takes the front-end's bitmap, or forgets it.
    pub(crate) fn set_bitmap(&self, bitmap: Option<SharedMapping>) {
        *self.bitmap.write().unwrap_or_else(PoisonError::into_inner) = bitmap;
    }

    /// Whether the front-end has given a bitmap.
    pub(crate) fn has_bitmap(&self) -> bool {
        self.bitmap
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Turns logging on or off.
    pub(crate) fn set_on(&self, on: bool) {
        self.on.store(on, Ordering::SeqCst);
    }

    /// Whether writes are logged.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    /// Marks every page that `len` bytes at guest address `start` touch. Pages that the bitmap
    /// does not reach are left out.
    pub fn mark(&self, start: u64, len: u64) {
        if len == 0 || !self.is_on() {
            return;
        }
        let bitmap = self.bitmap.read().unwrap_or_else(PoisonError::into_inner);
        let Some(bits) = bitmap.as_ref().map(SharedMapping::bytes) else {
            return;
        };
        let first = start / LOG_PAGE;
        let last = start.saturating_add(len - 1) / LOG_PAGE;
        for page in first..=last {
            let Some(byte) = usize::try_from(page / 8).ok().and_then(|at| bits.get(at)) else {
                return;
            };
            set(byte, page);
        }
    }

    fn is_marked(&self, address: u64) -> bool {
        let bitmap = self.bitmap.read().unwrap_or_else(PoisonError::into_inner);
        let page = address / LOG_PAGE;
        bitmap
            .as_ref()
            .and_then(|bits| bits.bytes().get(usize::try_from(page / 8).ok()?))
            .is_some_and(|byte| byte.load(Ordering::Relaxed) & (1 << (page % 8)) != 0)
    }
}

/// Always a locked operation, even when the bit is seen set: the front-end may be taking the bit
/// this instant, and only an atomic write orders our data before its copy of the page.
fn set(byte: &AtomicU8, page: u64) {
    byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
}

/// The view of the [`DirtyLog`] that one memory region has: offsets into it become guest pages.
#[derive(Clone, Debug, Default)]
pub struct LogBitmap {
    log: Arc<DirtyLog>,
    /// Guest address of offset 0.
    base: u64,
}

impl LogBitmap {
    pub(crate) fn new(log: Arc<DirtyLog>, base: u64) -> Self {
        LogBitmap { log, base }
    }
}

impl<'a> WithBitmapSlice<'a> for LogBitmap {
    type S = LogSlice<'a>;
}

impl Bitmap for LogBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> LogSlice<'_> {
        LogSlice {
            log: &self.log,
            base: self.base.saturating_add(offset as u64),
        }
    }
}

/// Part of a [`LogBitmap`]. It borrows: memory is sliced at every access, on every queue thread,
/// and a counted reference there would be a cache line that all of them fight for.
#[derive(Clone, Copy, Debug)]
pub struct LogSlice<'a> {
    log: &'a DirtyLog,
    base: u64,
}

impl<'a> WithBitmapSlice<'_> for LogSlice<'a> {
    type S = LogSlice<'a>;
}

impl Bitmap for LogSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log
            .mark(self.base.saturating_add(offset as u64), len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.is_marked(self.base.saturating_add(offset as u64))
    }

    fn slice_at(&self, offset: usize) -> Self {
        LogSlice {
            log: self.log,
            base: self.base.saturating_add(offset as u64),
        }
    }
}

impl BitmapSlice for LogSlice<'_> {}

/// `vm-memory` asks for it; a bitmap made this way belongs to no session and logs nothing.
impl NewBitmap for LogBitmap {
    fn with_len(_len: usize) -> Self {
        LogBitmap::default()
    }
}
