//! Dirties memory at a chosen rate, and checks at every revisit and at the end that each page
//! still holds what was written to it.

use super::devices::{Account, Progress};
use super::pattern::mix;
use super::{Spread, Step, Task, assign, stopping, wrong};
use crate::console::report;
use crate::memory::{self, PAGE};
use crate::protocol::{Report, Workload};
use crate::pvh::Range;
use crate::{clock, mmio};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Pages between two looks at the clock.
const BURST: u64 = 16;
/// A tag is written to each of these steps of a page, so that a torn page shows.
const TAG_STEP: usize = 512;
/// Wrong pages that are described one by one.
const MAX_DESCRIBED: u64 = 8;

struct Total {
    written: AtomicU64,
    checked: AtomicU64,
    bad: AtomicU64,
    span: u64,
    unfinished: AtomicUsize,
}

impl Account for Total {
    fn report(&self) -> Report {
        Report::Dirty {
            pages: self.written.load(Relaxed),
            span: self.span,
            bad: self.bad.load(Relaxed),
        }
    }
}

/// Splits the span over the CPUs that work.
pub fn set_up(workload: &Workload, spread: &Spread, progress: &mut Progress) {
    if workload.span == 0 {
        return;
    }
    let workers = spread.workers() as u64;
    let pages = (u64::from(workload.span) << 20) / PAGE;
    let ticks_per_burst = match u64::from(workload.dirty) << 20 {
        0 => 0,
        rate => clock::ticks(1_000_000) * (BURST * PAGE) * workers / rate,
    };
    let total = Arc::new(Total {
        written: AtomicU64::new(0),
        checked: AtomicU64::new(0),
        bad: AtomicU64::new(0),
        span: pages,
        unfinished: AtomicUsize::new(workers as usize),
    });
    for worker in 0..workers {
        let share = pages * (worker + 1) / workers - pages * worker / workers;
        assign(
            spread.cpu(worker as usize),
            Box::new(Dirtier {
                total: total.clone(),
                ranges: memory::take_pages(share * PAGE),
                pages: share,
                range: 0,
                offset: 0,
                position: 0,
                round: 0,
                next: 0,
                ticks_per_burst,
                verifying: None,
            }),
        );
    }
    progress.push(total);
}

struct Dirtier {
    total: Arc<Total>,
    ranges: Vec<Range>,
    pages: u64,
    /// Where the next page is: which range, how far into it, and its number.
    range: usize,
    offset: u64,
    position: u64,
    /// How often all pages have been written.
    round: u64,
    next: u64,
    ticks_per_burst: u64,
    /// The first page that has not been written in the last round, once the end has begun.
    verifying: Option<u64>,
}

impl Dirtier {
    fn step(&mut self) -> u64 {
        let address = self.ranges[self.range].start + self.offset;
        self.offset += PAGE;
        self.position += 1;
        if self.ranges[self.range].start + self.offset == self.ranges[self.range].end {
            self.offset = 0;
            self.range += 1;
        }
        address
    }

    fn rewind(&mut self) {
        (self.range, self.offset, self.position) = (0, 0, 0);
    }

    fn write_burst(&mut self) {
        for _ in 0..BURST.min(self.pages) {
            let round = self.round;
            let address = self.step();
            if round > 0 {
                self.check(address, round - 1);
            }
            write_tags(address, round);
            if self.position == self.pages {
                self.rewind();
                self.round += 1;
            }
        }
        self.total.written.fetch_add(BURST.min(self.pages), Relaxed);
    }

    fn check(&self, address: u64, round: u64) {
        for (at, want) in tags(address, round) {
            let got = mmio::read::<u64>(at);
            if got != want {
                wrong(1);
                if self.total.bad.fetch_add(1, Relaxed) < MAX_DESCRIBED {
                    report(&Report::BadPage {
                        addr: at,
                        want,
                        got,
                    });
                }
                return;
            }
        }
    }

    /// Pages before `written` hold this round's tags, the others the last round's.
    fn verify_burst(&mut self, written: u64) -> Step {
        for _ in 0..BURST {
            if self.position == self.pages || (self.round == 0 && self.position == written) {
                return self.finish();
            }
            let round = if self.position < written {
                self.round
            } else {
                self.round - 1
            };
            let address = self.step();
            self.check(address, round);
            self.total.checked.fetch_add(1, Relaxed);
        }
        Step::Busy
    }

    fn finish(&self) -> Step {
        if self
            .total
            .unfinished
            .fetch_sub(1, core::sync::atomic::Ordering::AcqRel)
            == 1
        {
            report(&Report::Verify {
                pages: self.total.checked.load(Relaxed),
                bad: self.total.bad.load(Relaxed),
            });
        }
        Step::Finished
    }
}

impl Task for Dirtier {
    fn poll(&mut self) -> Step {
        if let Some(written) = self.verifying {
            return self.verify_burst(written);
        }
        if stopping() {
            self.verifying = Some(self.position);
            self.rewind();
            return Step::Busy;
        }
        let now = clock::now();
        if self.round == 0 {
            self.next = now; // the first round fills the span as fast as it goes
        } else if now < self.next {
            return Step::Idle { until: self.next };
        }
        self.write_burst();
        self.next += self.ticks_per_burst;
        if self.next + self.ticks_per_burst < now {
            self.next = now; // what a stop of the machine cost is not made up for
        }
        Step::Busy
    }
}

pub fn tags(address: u64, round: u64) -> impl Iterator<Item = (u64, u64)> {
    let base = mix(address ^ round << 40);
    (address..address + PAGE)
        .step_by(TAG_STEP)
        .map(move |at| (at, base.wrapping_add(at)))
}

pub fn write_tags(address: u64, round: u64) {
    for (at, tag) in tags(address, round) {
        mmio::write(at, tag);
    }
}
