//! Pages that the guest does not use, which therefore are not sent: its balloon names them.
//!
//! ```text
//! source    KVM's log cleared ─ start ─ (head start) ─ pages sent, marked ones left out ─ stop ─ logs read
//! balloon                         └─ guest names pages, balloon marks them in the map ─┘
//! ```
//! A mark says that what a page held *when the round began* is not needed. So, in this order:
//! 1. everything dirty in KVM's log is cleared, and pending: a write from now on is in the next log;
//! 2. the round begins;
//! 3. marked pages are taken out of what is pending, which is older than the round;
//! 4. the round is stopped, and only then the logs are read: what was written since 1 is pending
//!    again, marked or not, and marks of the old round are forgotten.
//!
//! The guest may use a page that it named before anybody has seen the mark. That is a write after
//! 1, which no mark takes away.
//!
//! Whatever way the migration ends, the guest is told that it may use its pages again: here, when
//! this is dropped; at the destination by the balloon itself, which has moved; by a balloon whose
//! core is gone, of its own accord.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use migration::free_pages::{BITMAP_AT, ENDED_AT, MARKED_AT, length};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

use super::ram::{DirtyTracker, PAGE, WORD_PAGES};
use super::unit::Unit;
use crate::hypervisor::HypervisorError;
use crate::memory::Region;
use crate::remote::device1::{Balloon, DeviceLinks};
use crate::transport::{DeviceKind, VirtioDevice as _};

/// A round of fewer bytes is over before the guest has answered.
const LEAST_PENDING: u64 = 8 << 20;
/// How long a guest may take to name the first page: it must get a processor for that, and so must
/// its balloon. One that never does costs this once.
const FIRST_HINT: Duration = Duration::from_secs(1);
/// Hints are waited for as long as they are faster than sending was, looked at so often.
const STEP: Duration = Duration::from_millis(20);
/// So many looks in a row may find them slower …
const SLOW_STEPS: u32 = 5;
/// … and so many may find none, as long as there was no end: then the guest gets no processor, which
/// does not last, and what is sent meanwhile is mostly free pages.
const STARVED_STEPS: u32 = 25;
/// … and no longer than this in all.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Size and seals of the map stay: the balloon cannot cut it off under the core.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SEAL);

/// The map that the balloon marks in ([`migration::free_pages`]).
struct Map {
    map: MmapRegion<()>,
    file: File,
}

impl Map {
    fn new(regions: &[Region]) -> io::Result<Self> {
        let end = regions.iter().map(|r| r.gpa() + r.size()).max();
        let bytes = length(end.unwrap_or(0));
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create("free-pages", flags)?);
        file.set_len(bytes)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS))?;
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), length)
            .map_err(io::Error::other)?;
        Ok(Self { map, file })
    }

    fn word(&self, at: usize) -> u64 {
        let slice = self.map.as_volatile_slice();
        // Aligned; what is outside is not marked.
        slice
            .get_atomic_ref::<AtomicU64>(at)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn marked(&self) -> u64 {
        self.word(MARKED_AT)
    }

    fn ended(&self) -> u32 {
        let slice = self.map.as_volatile_slice();
        let ended = slice.get_atomic_ref::<AtomicU32>(ENDED_AT);
        ended.map_or(0, |round| round.load(Ordering::Acquire))
    }

    /// The marks of the 64 pages from `page` on, a multiple of 64.
    fn marks(&self, page: u64) -> u64 {
        usize::try_from(page / WORD_PAGES * 8).map_or(0, |at| self.word(BITMAP_AT + at))
    }

    /// Forgets all marks; nobody makes any now.
    fn clear(&self) {
        let slice = self.map.as_volatile_slice();
        for at in (BITMAP_AT..slice.len()).step_by(8) {
            if let Ok(word) = slice.get_atomic_ref::<AtomicU64>(at)
                && word.load(Ordering::Relaxed) != 0
            {
                word.store(0, Ordering::Relaxed);
            }
        }
    }
}

/// How far a round was.
#[derive(Debug)]
pub struct HeadStart {
    round: u32,
    begin: Instant,
    /// Pages marked at its begin.
    first: u64,
    /// When it was looked at last, and pages marked then.
    seen: (Instant, u64),
    /// How often in a row naming pages was found slower.
    slow: u32,
    /// How often in a row none was found to be named.
    starved: u32,
}

/// The free pages of one migration.
pub struct FreePages {
    /// None where nobody names any, or not any more.
    source: Option<(Balloon, Map)>,
    /// The round that runs.
    round: Option<u32>,
    /// The guest keeps pages that it named.
    open: bool,
    /// Pages left out.
    skipped: u64,
}

impl FreePages {
    /// Of the first balloon whose process answers; of none, where there is none.
    pub fn new(units: &[impl AsRef<Unit>], links: &DeviceLinks, regions: &[Region]) -> Self {
        let mut balloons = units.iter().map(AsRef::as_ref).filter_map(|unit| {
            let is_balloon = unit.remote.kind() == DeviceKind::BALLOON;
            is_balloon.then(|| links.balloon(&unit.id)).flatten()
        });
        let source = balloons.next().and_then(|balloon| {
            let map = Map::new(regions).inspect_err(|error| {
                tracing::warn!(%error, "free pages are sent too: there is no map for them");
            });
            Some((balloon, map.ok()?))
        });
        Self {
            source,
            round: None,
            open: false,
            skipped: 0,
        }
    }

    /// Begins a round, if it is worth one.
    pub fn start(&mut self, tracker: &mut DirtyTracker) -> Result<(), HypervisorError> {
        if tracker.pending_bytes() < LEAST_PENDING {
            return Ok(());
        }
        let Some((balloon, map)) = &self.source else {
            return Ok(());
        };
        tracker.arm()?;
        map.clear();
        match balloon.start_hints(map.file.as_fd()) {
            Ok(round) => {
                self.round = Some(round);
                self.open = true;
            }
            Err(error) => {
                tracing::info!(%error, "free pages are sent too");
                // It may have begun a round whose answer was late.
                self.give_up();
            }
        }
        Ok(())
    }

    /// What is known of a round that has just begun: then the guest may name pages before any is
    /// sent, as long as [`Self::is_ahead`]. `None` when there is no round.
    pub fn head_start(&self) -> Option<HeadStart> {
        let (_, map) = self.source.as_ref()?;
        let now = Instant::now();
        // The pages in the balloon are marked already, which is no answer of the guest.
        Some(HeadStart {
            round: self.round?,
            begin: now,
            first: map.marked(),
            seen: (now, map.marked()),
            slow: 0,
            starved: 0,
        })
    }

    /// Whether naming pages is still faster than sending them, at `rate` bytes a second. To be
    /// asked again and again, with pauses.
    pub fn is_ahead(&self, head: &mut HeadStart, rate: u64) -> bool {
        let Some((_, map)) = &self.source else {
            return false;
        };
        let waited = head.begin.elapsed();
        if map.ended() == head.round || waited >= LONGEST_WAIT {
            return false;
        }
        let (then, before) = head.seen;
        let time = then.elapsed();
        if time < STEP {
            return true;
        }
        let marked = map.marked();
        head.seen = (Instant::now(), marked);
        let named = u128::from(marked.saturating_sub(before) * PAGE) * 1_000_000;
        let is_faster = named >= u128::from(rate) * time.as_micros();
        (head.slow, head.starved) = match (is_faster, named) {
            (true, _) => (0, 0),
            (false, 0) => (head.slow, head.starved + 1),
            (false, _) => (head.slow + 1, 0),
        };
        if marked == head.first {
            return waited < FIRST_HINT;
        }
        head.slow < SLOW_STEPS && head.starved < STARVED_STEPS
    }

    /// Takes the pages that are free now out of `words`, of bits from page `first` on.
    pub fn leave_out(&mut self, first: u64, words: &mut [u64]) {
        let (Some((_, map)), Some(_)) = (&self.source, self.round) else {
            return;
        };
        for (page, word) in (first..).step_by(u64::BITS as usize).zip(words) {
            if *word != 0 {
                let left = *word & !map.marks(page);
                self.skipped += u64::from((*word ^ left).count_ones());
                *word = left;
            }
        }
    }

    /// Ends the round: its marks count no more. To be called before logs are read.
    pub fn stop(&mut self) {
        if self.round.take().is_some()
            && let Some((balloon, _)) = &self.source
            && let Err(error) = balloon.stop_hints()
        {
            tracing::warn!(%error, "free pages are sent too from now on");
            self.give_up();
        }
    }

    /// Bytes left out so far.
    pub fn skipped_bytes(&self) -> u64 {
        self.skipped * PAGE
    }

    /// The machine has moved; its balloon tells the guest there.
    pub fn moved(&mut self) {
        self.open = false;
    }

    /// A balloon that does not do as it is told is asked no more.
    fn give_up(&mut self) {
        self.round = None;
        if let Some((balloon, _)) = self.source.take() {
            self.open = false;
            end(&balloon);
        }
    }
}

fn end(balloon: &Balloon) {
    if let Err(error) = balloon.end_hints() {
        tracing::warn!(%error, "the guest keeps the pages that it has named as free");
    }
}

impl Drop for FreePages {
    fn drop(&mut self) {
        if let (true, Some((balloon, _))) = (self.open, &self.source) {
            end(balloon);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::Ram;

    #[test]
    fn marked_pages_are_left_out_and_forgotten() {
        let regions = Ram::allocate(64 << 20, None).unwrap().regions().unwrap();
        let map = Map::new(&regions).unwrap();
        let at = BITMAP_AT as u64;
        map.file.write_all_at(&[0b101], at).unwrap();
        map.file
            .write_all_at(&[0xff], at + 64 * 256 / 8 - 1)
            .unwrap();
        map.file
            .write_all_at(&[7, 0, 0, 0], ENDED_AT as u64)
            .unwrap();
        assert_eq!((map.marks(0), map.marks(64), map.ended()), (0b101, 0, 7));
        assert_eq!(map.marks(64 * 256 - 64), 0xff << 56);
        assert_eq!(map.marks(64 * 256), 0, "there is no such page");
        assert!(map.file.set_len(0).is_err(), "it can be cut off");
        map.clear();
        assert_eq!((map.marks(0), map.marks(64 * 256 - 64)), (0, 0));
    }
}
