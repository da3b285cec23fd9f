//! The prefault thread: page tables filled before the first request needs them.
//!
//! A page of shared guest memory that this process has not touched costs it a fault at its first
//! request. The thread walks the regions of a memory table with MADV_POPULATE_WRITE, a few
//! megabytes at a time so that it can be cancelled, and away from the control thread, which stays
//! ready to answer. A new table cancels the walk over the old one.
#![expect(unsafe_code, reason = "madvise on guest memory")]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use clap::ValueEnum;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::{LogBitmap, Memory};

/// Bytes populated by one call: about a millisecond of pages that are already allocated.
const CHUNK: usize = 4 << 20;

/// What of guest memory is mapped ahead of its first use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PrefaultMode {
    /// Nothing.
    Off,
    /// What holds data already; memory that the guest never touched is not allocated.
    #[default]
    Data,
    /// All of it, allocated now: for a machine whose contents are still to arrive.
    All,
}

/// A walk under way; dropping it cancels.
#[derive(Debug)]
pub(crate) struct Prefault {
    cancel: Arc<AtomicBool>,
}

impl Prefault {
    /// Starts walking `memory`. A thread that cannot be started leaves the pages to be faulted in
    /// at their first use.
    pub(crate) fn start(memory: Arc<Memory>, mode: PrefaultMode) -> Self {
        let cancel = Arc::new(AtomicBool::new(false));
        if mode != PrefaultMode::Off {
            let flag = Arc::clone(&cancel);
            let walk = move || {
                for region in memory.regions() {
                    populate(region, mode, &flag);
                }
            };
            if let Err(error) = thread::Builder::new().name("prefault".into()).spawn(walk) {
                tracing::warn!(%error, "guest memory is not prefaulted");
            }
        }
        Prefault { cancel }
    }
}

impl Drop for Prefault {
    fn drop(&mut self) {
        self.cancel.store(true, Ordering::Relaxed);
    }
}

fn populate(region: &GuestRegionMmap<LogBitmap>, mode: PrefaultMode, cancel: &AtomicBool) {
    let mut at = 0;
    while at < region.size() && !cancel.load(Ordering::Relaxed) {
        let (start, end) = match mode {
            PrefaultMode::Off => return,
            PrefaultMode::All => (at, region.size()),
            PrefaultMode::Data => match next_data(region, at) {
                Some(range) => range,
                None => return,
            },
        };
        let end = end.min(start.saturating_add(CHUNK));
        // SAFETY: `start..end` lies in the mapping that `region` keeps alive; populating changes
        // no contents.
        let result = unsafe {
            libc::madvise(
                region.as_ptr().add(start).cast(),
                end - start,
                libc::MADV_POPULATE_WRITE,
            )
        };
        if result != 0 {
            let error = std::io::Error::last_os_error();
            let address = region.start_addr().0 + start as u64;
            tracing::debug!(%error, address, "guest memory is not prefaulted from here");
            return;
        }
        at = end;
    }
}

/// The next range at or after `at`, as offsets into the region, whose pages exist in the file.
fn next_data(region: &GuestRegionMmap<LogBitmap>, at: usize) -> Option<(usize, usize)> {
    let file = region.file_offset()?;
    let base = i64::try_from(file.start()).ok()?;
    let seek = |from: usize, whence| {
        let from = base.checked_add(i64::try_from(from).ok()?)?;
        // SAFETY: no memory is involved; the offset that it moves is nobody's: the file is mapped.
        let found = unsafe { libc::lseek(file.file().as_raw_fd(), from, whence) };
        usize::try_from(found.checked_sub(base)?).ok()
    };
    let start = seek(at, libc::SEEK_DATA)?;
    let end = seek(start, libc::SEEK_HOLE)?;
    (start >= at && start < region.size() && end > start).then(|| (start, end.min(region.size())))
}
