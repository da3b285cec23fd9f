//! Free page hints: rounds that the core begins and stops, in which the guest names pages that it
//! does not use (virtio 1.3, 5.5.6.7).
//!
//! ```text
//!            start            stop              end
//!  Stop/Done ─────► round n ─────────► Stop ─────────► Done
//!                     ▲   start: round n+1  │
//!                     └─────────────────────┘
//! ```
//! Rules, with their reasons:
//! - A hint counts only under the round that runs: a late one of an old round says nothing about
//!   what the guest has written since.
//! - Marking and stopping exclude each other, so that nothing is marked when a stop has returned.
//! - A round's number is never used again: the guest may still answer to an old one.
//! - Hinted pages are marked and otherwise left alone: the guest may use them again before this
//!   process has read the hint.

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;

use device_kit::memory::SharedMapping;
use migration::free_pages::{BITMAP_AT, ENDED_AT, FIRST_ROUND, MARKED_AT, PAGE};

/// Says that no round runs; the guest keeps the pages that it named.
const STOP: u32 = 0;
/// Says that it may use them again.
const DONE: u32 = 1;

/// The core's map of free pages.
#[derive(Debug)]
struct Map {
    mapping: SharedMapping,
    words: u64,
}

impl Map {
    fn new(file: &File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        let words = len.saturating_sub(BITMAP_AT as u64) / 8;
        let mapping = SharedMapping::new(file, 0, BITMAP_AT as u64 + words * 8)?;
        Ok(Self { mapping, words })
    }

    /// Marks pages; those that it has no room for are left out. Returns how many it took.
    fn mark(&self, first: u64, pages: u64) -> u64 {
        const BITS: u64 = u64::BITS as u64;
        let end = first.saturating_add(pages).min(self.words * BITS);
        let mut page = first;
        while page < end {
            let (word, from) = (page / BITS, page % BITS);
            let count = (end - page).min(BITS - from);
            let bits = (!0 >> (BITS - count)) << from;
            // Inside the mapping, which is in this address space.
            let at = BITMAP_AT + usize::try_from(word * 8).unwrap_or(0);
            self.mapping.word64(at).fetch_or(bits, Ordering::AcqRel);
            page += count;
        }
        let marked = end.saturating_sub(first);
        let counter = self.mapping.word64(MARKED_AT);
        counter.fetch_add(marked, Ordering::Release);
        marked
    }

    fn set_ended(&self, round: u32) {
        let ended = self.mapping.word64(ENDED_AT);
        ended.store(round.into(), Ordering::Release);
    }
}

/// What became of a hint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hint {
    /// So many pages were marked.
    Taken(u64),
    /// It is of no round that runs.
    Late,
}

/// Where hinting is.
#[derive(Debug, Default)]
pub(crate) struct Hinting {
    /// What the guest is told.
    command: u32,
    /// The number of the last round.
    last: u32,
    map: Option<Map>,
    /// The round that the guest says its hints are of.
    guest: Option<u32>,
}

impl Hinting {
    /// As it was elsewhere or in another process after round `last`, or before any (0). None runs
    /// now: the guest may use all pages again.
    pub(crate) fn after(last: u32) -> Self {
        Self {
            command: if last == 0 { STOP } else { DONE },
            last,
            ..Self::default()
        }
    }

    /// What the guest is told: a round, or that there is none.
    pub(crate) fn command(&self) -> u32 {
        self.command
    }

    /// The number of the last round.
    pub(crate) fn last(&self) -> u32 {
        self.last
    }

    /// Begins a round that marks in `map`; its number.
    pub(crate) fn start(&mut self, map: &File) -> io::Result<u32> {
        self.map = Some(Map::new(map)?);
        self.last = self.last.checked_add(1).unwrap_or(0).max(FIRST_ROUND);
        self.command = self.last;
        Ok(self.last)
    }

    /// Marks pages of which this process itself knows that they are free.
    pub(crate) fn mark(&self, first: u64, pages: u64) {
        if let Some(map) = &self.map {
            map.mark(first, pages);
        }
    }

    /// Nothing is marked from now on. Whether that is news to the guest.
    pub(crate) fn stop(&mut self) -> bool {
        self.map = None;
        let runs = self.command >= FIRST_ROUND;
        if runs {
            self.command = STOP;
        }
        runs
    }

    /// As [`Self::stop`], and the guest has its pages back. Whether that is news to the guest.
    pub(crate) fn end(&mut self) -> bool {
        self.map = None;
        // Before the first round there is nothing to give back.
        let news = self.last != 0 && self.command != DONE;
        if news {
            self.command = DONE;
        }
        news
    }

    /// A reset: the guest has forgotten all of it.
    pub(crate) fn forget(&mut self) {
        self.map = None;
        self.guest = None;
        self.command = STOP;
    }

    /// The guest says of which round its hints are from now on.
    pub(crate) fn said(&mut self, command: u32) {
        if command == STOP
            && self.guest == Some(self.command)
            && let Some(map) = &self.map
        {
            map.set_ended(self.command);
        }
        self.guest = (command >= FIRST_ROUND).then_some(command);
    }

    /// The guest names `len` bytes at guest address `start`; only whole pages count.
    pub(crate) fn hint(&self, start: u64, len: u64) -> Hint {
        let Some(map) = self
            .map
            .as_ref()
            .filter(|_| self.guest == Some(self.command))
        else {
            return Hint::Late;
        };
        let (first, end) = (start.div_ceil(PAGE), start.saturating_add(len) / PAGE);
        Hint::Taken(map.mark(first, end.saturating_sub(first)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use migration::free_pages::length;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn map(pages: u64) -> File {
        let file = File::from(memfd_create("map", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(length(pages * PAGE)).unwrap();
        file
    }

    fn words(file: &File, at: u64, count: usize) -> Vec<u64> {
        let mut bytes = vec![0; count * 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
        bytes.chunks(8).map(word).collect()
    }

    #[test]
    fn whole_pages_are_marked_and_none_that_there_is_not() {
        let file = map(128);
        let mut hinting = Hinting::default();
        assert_eq!(hinting.start(&file).unwrap(), 2);
        hinting.said(2);
        // Half of page 1, pages 2 and 3.
        assert_eq!(hinting.hint(PAGE + 1, 3 * PAGE - 1), Hint::Taken(2));
        assert_eq!(hinting.hint(62 * PAGE, 4 * PAGE), Hint::Taken(4));
        assert_eq!(hinting.hint(127 * PAGE, u64::MAX), Hint::Taken(1));
        assert_eq!(hinting.hint(128 * PAGE, PAGE), Hint::Taken(0));
        assert_eq!(hinting.hint(u64::MAX, u64::MAX), Hint::Taken(0));
        assert_eq!(hinting.hint(0, PAGE - 1), Hint::Taken(0));
        let marked = [0b1100 | 0b11 << 62, 0b11 | 1 << 63];
        assert_eq!(words(&file, 4096, 2), marked);
        assert_eq!(words(&file, 8, 1), [7]);
    }

    #[test]
    fn only_hints_of_the_round_that_runs_count() {
        let file = map(64);
        let mut hinting = Hinting::default();
        assert_eq!(hinting.hint(0, PAGE), Hint::Late);
        let first = hinting.start(&file).unwrap();
        assert_eq!(hinting.hint(0, PAGE), Hint::Late, "no round was named");
        hinting.said(first + 1);
        assert_eq!(hinting.hint(0, PAGE), Hint::Late, "it is another round");
        hinting.said(first);
        assert_eq!(hinting.hint(0, PAGE), Hint::Taken(1));
        assert!(hinting.stop() && !hinting.stop());
        assert_eq!(hinting.hint(PAGE, PAGE), Hint::Late, "it was stopped");
        let second = hinting.start(&file).unwrap();
        assert!(second > first);
        assert_eq!(hinting.hint(PAGE, PAGE), Hint::Late, "of the old round");
        hinting.said(first);
        assert_eq!(hinting.hint(PAGE, PAGE), Hint::Late, "of the old round");
        hinting.said(second);
        assert_eq!(hinting.hint(PAGE, PAGE), Hint::Taken(1));
        assert!(hinting.end() && !hinting.end());
        assert_eq!((hinting.command(), words(&file, 4096, 1)), (DONE, vec![3]));
    }

    #[test]
    fn the_end_of_the_round_that_runs_is_told() {
        let file = map(64);
        let mut hinting = Hinting::default();
        let round = hinting.start(&file).unwrap();
        hinting.said(STOP);
        assert_eq!(words(&file, 0, 1), [0], "it was never begun");
        hinting.said(round);
        hinting.said(STOP);
        assert_eq!(words(&file, 0, 1), [u64::from(round)]);
        hinting.stop();
        let next = hinting.start(&file).unwrap();
        hinting.said(STOP);
        assert_eq!(
            words(&file, 0, 1),
            [u64::from(round)],
            "{next} was not begun"
        );
    }

    #[test]
    fn a_guest_that_was_never_asked_is_told_nothing() {
        let mut hinting = Hinting::default();
        assert!(!hinting.stop() && !hinting.end());
        assert_eq!(hinting.command(), STOP);
        assert_eq!(Hinting::after(u32::MAX).start(&map(1)).unwrap(), 2);
        assert!(Map::new(&File::from(memfd_create("x", MFdFlags::empty()).unwrap())).is_err());
    }
}
