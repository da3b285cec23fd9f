//! Does what the host asks for, with memory that it has used and does not use any more: gives as
//! much of it as is wanted, and names the rest when free pages are asked for.

use super::Total;
use crate::memory::{self, PAGE};
use crate::protocol::BalloonMode;
use crate::pvh::Range;
use crate::virtio::balloon::{Balloon, DONE, FIRST_ROUND, MAX_PAGES, POISONED, STOP};
use crate::work::{Step, Task, stopping};
use crate::{clock, mmio};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;

/// Time between two looks at what the host wants.
const PERIOD_US: u64 = 2_000;
/// Memory of one hint or report, as of Linux.
const PIECE: u64 = 4 << 20;

pub struct Follow {
    balloon: Balloon,
    total: Arc<Total>,
    ranges: Vec<Range>,
    pages: u64,
    /// Pages in the balloon: the first ones.
    given: u64,
    reports: bool,
    /// What is not given keeps the poison.
    poisons: bool,
    /// The last round, and the next page to be named in it.
    round: u32,
    next_page: Option<u64>,
    next: u64,
    /// Pages that are none of the balloon's business, each with its address.
    kept: Vec<Range>,
}

/// The addresses of all pages of some ranges.
fn pages_of(ranges: &[Range]) -> impl Iterator<Item = u64> + '_ {
    let pages = |range: &Range| (range.start..range.end).step_by(PAGE as usize);
    ranges.iter().flat_map(pages)
}

impl Follow {
    /// With `bytes` that were used once and are not needed any more, and `kept` that are.
    pub fn new(
        balloon: Balloon,
        bytes: u64,
        kept: u64,
        mode: BalloonMode,
        total: Arc<Total>,
    ) -> Self {
        let poisons = mode == BalloonMode::Poison;
        let (ranges, kept) = (memory::take_pages(bytes), memory::take_pages(kept));
        pages_of(&ranges)
            .chain(pages_of(&kept))
            .for_each(|page| mmio::write(page, page | 1));
        if poisons {
            pages_of(&ranges).for_each(|page| mmio::write(page, POISONED));
        }
        Self {
            balloon,
            total,
            ranges,
            pages: bytes / PAGE,
            given: 0,
            reports: mode != BalloonMode::Follow,
            poisons,
            round: 0,
            next_page: None,
            next: 0,
            kept,
        }
    }

    /// The address of a page, and how many follow it without a gap.
    fn place(&self, mut page: u64) -> (u64, u64) {
        for range in &self.ranges {
            let pages = (range.end - range.start) / PAGE;
            if page < pages {
                return (range.start + page * PAGE, pages - page);
            }
            page -= pages;
        }
        (0, 0)
    }

    /// Gives or takes back some pages. Whether there is more to do.
    fn adjust(&mut self) -> bool {
        let target = self.balloon.target().min(self.pages);
        let count = self.given.abs_diff(target).min(MAX_PAGES as u64);
        let (first, more) = if target > self.given {
            (self.given, true)
        } else {
            (self.given - count, false)
        };
        if count == 0 {
            return false;
        }
        let pages: Vec<u64> = (first..first + count).map(|n| self.place(n).0).collect();
        if more {
            self.balloon.inflate(pages.iter().copied());
            self.total.inflated.fetch_add(count, Relaxed);
            self.given += count;
        } else {
            self.balloon.deflate(pages.iter().copied());
            pages.iter().for_each(|page| self.total.check_zero(*page));
            if self.poisons {
                pages.iter().for_each(|page| mmio::write(*page, POISONED));
            }
            self.total.deflated.fetch_add(count, Relaxed);
            self.given -= count;
        }
        self.balloon.set_actual(self.given);
        true
    }

    /// Names pages as far as the queue takes them. Whether there is more to do.
    fn hint(&mut self) -> bool {
        self.balloon.reap();
        let command = self.balloon.command();
        if command == DONE && core::mem::replace(&mut self.round, 0) != 0 {
            self.next_page = None;
            self.total.ended.fetch_add(1, Relaxed);
        }
        if command >= FIRST_ROUND && command != self.round && self.balloon.say(command) {
            self.round = command;
            self.next_page = Some(self.given);
            self.total.rounds.fetch_add(1, Relaxed);
        }
        while let Some(page) = self.next_page {
            let (address, run) = self.place(page);
            if run == 0 {
                if self.balloon.say(STOP) {
                    self.next_page = None;
                }
                break;
            }
            let pages = run.min(PIECE / PAGE);
            if !self.balloon.hint(address, (pages * PAGE) as u32) {
                break;
            }
            self.total.hinted.fetch_add(pages, Relaxed);
            self.next_page = Some(page + pages);
        }
        self.next_page.is_some()
    }

    fn report_all(&mut self) {
        let mut page = 0;
        while page < self.pages {
            let (address, run) = self.place(page);
            let pages = run.min(PIECE / PAGE);
            self.balloon.report(address, (pages * PAGE) as u32);
            // To look at a page is to have it again.
            if self.poisons {
                self.total.check_word(address, POISONED);
            } else {
                self.total.check_zero(address);
            }
            page += pages;
        }
        self.total.reported.fetch_add(self.pages, Relaxed);
    }
}

impl Task for Follow {
    fn poll(&mut self) -> Step {
        if core::mem::take(&mut self.reports) {
            self.report_all();
        }
        self.balloon.tell();
        let now = clock::now();
        if stopping() {
            self.balloon.reap();
            if self.balloon.is_quiet() {
                pages_of(&self.kept).for_each(|page| self.total.check_word(page, page | 1));
                if self.poisons {
                    let free = pages_of(&self.ranges).skip(self.given as usize);
                    free.for_each(|page| self.total.check_word(page, POISONED));
                }
                self.total.finish();
                return Step::Finished;
            }
            return Step::Idle { until: now };
        }
        if now < self.next {
            return Step::Idle { until: self.next };
        }
        let busy = self.adjust() | self.hint();
        if busy {
            return Step::Busy;
        }
        self.next = now + clock::ticks(PERIOD_US);
        Step::Idle { until: self.next }
    }
}
