//! The work of balloons: one that obeys, and one that does at random what a driver may.

mod follow;
mod random;

use super::devices::Account;
use super::dirty::tags;
use super::{Task, wrong};
use crate::console::report;
use crate::memory::PAGE;
use crate::mmio;
use crate::protocol::{BalloonMode, Report, Workload};
use crate::virtio::balloon::Balloon;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Wrong pages that are described one by one.
const MAX_DESCRIBED: u64 = 8;

/// What was done, in pages.
#[derive(Default)]
struct Total {
    inflated: AtomicU64,
    deflated: AtomicU64,
    reported: AtomicU64,
    hinted: AtomicU64,
    reused: AtomicU64,
    rounds: AtomicU64,
    ended: AtomicU64,
    bad: AtomicU64,
    end: AtomicBool,
}

impl Account for Total {
    fn report(&self) -> Report {
        Report::Balloon {
            inflated: self.inflated.load(Relaxed),
            deflated: self.deflated.load(Relaxed),
            reported: self.reported.load(Relaxed),
            hinted: self.hinted.load(Relaxed),
            reused: self.reused.load(Relaxed),
            rounds: self.rounds.load(Relaxed),
            ended: self.ended.load(Relaxed),
            bad: self.bad.load(Relaxed),
            end: self.end.load(Relaxed),
        }
    }
}

impl Total {
    /// The page must hold what was written in this generation.
    fn check(&self, page: u64, generation: u64) {
        let mut wrong = tags(page, generation).filter(|&(at, want)| mmio::read::<u64>(at) != want);
        if let Some((at, want)) = wrong.next() {
            self.is_bad(at, want);
        }
    }

    /// A page that comes back from the balloon is all zero.
    fn check_zero(&self, page: u64) {
        let mut words = (page..page + PAGE).step_by(8);
        if let Some(at) = words.find(|&at| mmio::read::<u64>(at) != 0) {
            self.is_bad(at, 0);
        }
    }

    /// A word must be this.
    fn check_word(&self, addr: u64, want: u64) {
        if mmio::read::<u64>(addr) != want {
            self.is_bad(addr, want);
        }
    }

    fn is_bad(&self, addr: u64, want: u64) {
        wrong(1);
        if self.bad.fetch_add(1, Relaxed) < MAX_DESCRIBED {
            let got = mmio::read(addr);
            report(&Report::BadPage { addr, want, got });
        }
    }

    fn finish(&self) {
        self.end.store(true, Relaxed);
        report(&self.report());
    }
}

/// The task of the balloon, and where its progress is seen.
pub fn assign(balloon: Balloon, workload: &Workload) -> Arc<dyn Account> {
    let total = Arc::new(Total::default());
    let (cpu, bytes) = (balloon.cpu, u64::from(workload.balloon_mib) << 20);
    let task: Box<dyn Task> = match workload.balloon {
        BalloonMode::Random => Box::new(random::Random::new(balloon, bytes, total.clone())),
        _ => {
            let (mode, kept) = (workload.balloon, u64::from(workload.kept_mib) << 20);
            let follow = follow::Follow::new(balloon, bytes, kept, mode, total.clone());
            Box::new(follow)
        }
    };
    super::assign(cpu, task);
    total
}
