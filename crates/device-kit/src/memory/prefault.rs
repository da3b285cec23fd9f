//! The prefault thread: page tables filled before the first request needs them.
//!
//! A page of shared guest memory that this process has not touched costs it a fault at its first
//! request. The thread walks the regions of a memory table with MADV_POPULATE_WRITE, a few
//! megabytes at a time so that it can be cancelled, and away from the control thread, which stays
//! ready to answer. A new table cancels the walk over the old one.
#![expect(unsafe_code, reason = "madvise on guest memory")]

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use clap::ValueEnum;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::{LogBitmap, Memory};
use crate::health::Health;

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

/// Prefaults each memory table that comes. No method waits for the thread, and only
/// [`Prefaulter::finish`] for a walk.
#[derive(Debug)]
pub(crate) struct Prefaulter {
    health: Health,
    work: Mutex<Work>,
}

#[derive(Debug)]
struct Work {
    mode: PrefaultMode,
    memory: Option<Arc<Memory>>,
    walk: Arc<Walk>,
}

/// One walk over one table.
#[derive(Debug, Default)]
struct Walk {
    cancelled: AtomicBool,
    running: AtomicBool,
    /// Bytes that it has been through.
    done: AtomicU64,
}

/// How far the present walk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Bytes of guest memory that are mapped.
    pub(crate) mapped: u64,
    /// How many of them the walk has been through.
    pub(crate) done: u64,
    /// Whether it goes on.
    pub(crate) running: bool,
}

impl Prefaulter {
    pub(crate) fn new(mode: PrefaultMode, health: Health) -> Self {
        let (memory, walk) = (None, Arc::default());
        Prefaulter {
            health,
            work: Mutex::new(Work { mode, memory, walk }),
        }
    }

    /// Walks `memory` from now on, and nothing else.
    pub(crate) fn use_memory(&self, memory: Arc<Memory>) {
        self.change(|work| work.memory = Some(memory));
    }

    /// There is no memory any more.
    pub(crate) fn forget(&self) {
        self.change(|work| work.memory = None);
    }

    /// Walks what there is once more, in this way, and what comes.
    pub(crate) fn set_mode(&self, mode: PrefaultMode) {
        self.change(|work| work.mode = mode);
    }

    /// Walks what there is now once more, to its end and on this thread: what came since the last
    /// walk is mapped when it returns.
    pub(crate) fn finish(&self) {
        let Some(walk) = self.begin(&mut self.work()) else {
            return;
        };
        walk();
    }

    /// Ends the walk under way.
    pub(crate) fn cancel(&self) {
        self.work().walk.cancelled.store(true, Ordering::Relaxed);
    }

    pub(crate) fn progress(&self) -> Progress {
        let work = self.work();
        Progress {
            mapped: work.memory.as_ref().map_or(0, |memory| memory.size()),
            done: work.walk.done.load(Ordering::Relaxed),
            running: work.walk.running.load(Ordering::Relaxed),
        }
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the walk under way and begins the next one. A thread that cannot be started leaves the
    /// pages to be faulted in at their first use.
    fn change(&self, change: impl FnOnce(&mut Work)) {
        let mut work = self.work();
        change(&mut work);
        if let Some(walk) = self.begin(&mut work)
            && let Err(error) = thread::Builder::new().name("prefault".into()).spawn(walk)
        {
            tracing::warn!(%error, "guest memory is not prefaulted");
            self.health
                .error(&format_args!("guest memory is not prefaulted: {error}"));
            work.walk.running.store(false, Ordering::Relaxed);
        }
        drop(work);
        self.health.touch();
    }

    /// Puts a new walk in the place of the one under way; nothing if there is nothing to walk.
    fn begin(&self, work: &mut Work) -> Option<impl FnOnce() + Send + use<>> {
        work.walk.cancelled.store(true, Ordering::Relaxed);
        work.walk = Arc::default();
        let memory = Arc::clone(work.memory.as_ref()?);
        if work.mode == PrefaultMode::Off {
            return None;
        }
        let (mode, walk, health) = (work.mode, Arc::clone(&work.walk), self.health.clone());
        walk.running.store(true, Ordering::Relaxed);
        Some(move || {
            walk.over(&memory, mode, &health);
            walk.running.store(false, Ordering::Relaxed);
            health.touch();
        })
    }
}

impl Walk {
    fn over(&self, memory: &Memory, mode: PrefaultMode, health: &Health) {
        for region in memory.regions() {
            if let Err(Stuck { address, error }) = self.populate(region, mode, health) {
                tracing::debug!(%error, address, "guest memory is not prefaulted from here");
                health.error(&format_args!(
                    "guest memory from {address:#x} on is not prefaulted: {error}"
                ));
            }
        }
    }

    fn populate(
        &self,
        region: &GuestRegionMmap<LogBitmap>,
        mode: PrefaultMode,
        health: &Health,
    ) -> Result<(), Stuck> {
        let size = region.size();
        let (mut at, mut stretch) = (0, 0..0);
        while at < size && !self.cancelled.load(Ordering::Relaxed) {
            // To find a stretch's end takes as long as it is long: once for each, not for each chunk.
            if at >= stretch.end {
                stretch = match mode {
                    PrefaultMode::Off => return Ok(()),
                    PrefaultMode::All => at..size,
                    // Behind the last data there is nothing to do.
                    PrefaultMode::Data => next_data(region, at).unwrap_or(size..size),
                };
            }
            let start = at.max(stretch.start);
            let end = stretch.end.min(start.saturating_add(CHUNK));
            // SAFETY: `start..end` lies in the mapping that `region` keeps alive; populating
            // changes no contents.
            let result = unsafe {
                libc::madvise(
                    region.as_ptr().add(start).cast(),
                    end - start,
                    libc::MADV_POPULATE_WRITE,
                )
            };
            if result != 0 {
                return Err(Stuck {
                    address: region.start_addr().0 + start as u64,
                    error: io::Error::last_os_error(),
                });
            }
            self.done.fetch_add((end - at) as u64, Ordering::Relaxed);
            health.touch();
            at = end;
        }
        Ok(())
    }
}

/// A walk that cannot go on.
struct Stuck {
    /// Guest address.
    address: u64,
    error: io::Error,
}

/// The next range at or after `at`, as offsets into the region, whose pages exist in the file.
fn next_data(region: &GuestRegionMmap<LogBitmap>, at: usize) -> Option<Range<usize>> {
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
    (start >= at && start < region.size() && end > start).then(|| start..end.min(region.size()))
}
