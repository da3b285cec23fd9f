//! What the control thread, the link and the worker share.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use device_kit::{BalloonProcess, BalloonStatus, ConfigChange, Health, Keepsake, Kept, LinkError};

use crate::config::{Options, PAGE, Space, feature};
use crate::hinting::Hinting;
use crate::metrics::Metrics;
use crate::page_set::PageSet;
use crate::saved_state::{SavedPages, SavedState};
use crate::statistics::{self, MAX_INTERVAL, Timer};

/// Pages of a MiB.
const MIB_PAGES: u32 = 256;

/// What outlives the process: which layout, target and actual size, poison and the last round of
/// hints, how often the guest is asked if the link has said so. Which pages are in the balloon is not
/// kept: they are holes, wherever that is asked.
mod kept {
    pub(super) const WORDS: usize = 4;
    pub(super) const LAYOUT: u64 = u64::from_le_bytes(*b"balloon1");
    pub(super) const LAYOUT_AT: usize = 0;
    pub(super) const SIZES_AT: usize = 1;
    pub(super) const MEMORY_AT: usize = 2;
    pub(super) const INTERVAL_AT: usize = 3;
}

/// What changes.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) target: u32,
    pub(crate) actual: u32,
    pub(crate) poison: u32,
    pub(crate) ballooned: PageSet,
    pub(crate) hinting: Hinting,
    /// What the guest said of its memory last.
    pub(crate) statistics: Vec<(u16, u64)>,
    /// Seconds between two questions for that, when they are others than the options say.
    interval: Option<u32>,
    kept: Option<Kept>,
    /// It is more than what the options say: its own past, or that of a process before it.
    has_past: bool,
}

impl State {
    /// Leaves to a next process what it must know.
    fn remember(&mut self) {
        self.has_past = true;
        if let Some(kept) = &self.kept {
            let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
            kept.set(kept::SIZES_AT, pair(self.target, self.actual));
            kept.set(kept::MEMORY_AT, pair(self.poison, self.hinting.last()));
            let interval = self.interval.map_or((0, 0), |seconds| (seconds, 1));
            kept.set(kept::INTERVAL_AT, pair(interval.0, interval.1));
            kept.set(kept::LAYOUT_AT, kept::LAYOUT);
        }
    }

    /// Is what a process before this one has left, if one has.
    fn recall(&mut self) -> bool {
        let Some(kept) = &self.kept else { return false };
        if self.has_past || kept.get(kept::LAYOUT_AT) != kept::LAYOUT {
            return false;
        }
        let pair = |at| {
            let word = kept.get(at).to_le_bytes();
            let (halves, _) = word.as_chunks();
            (u32::from_le_bytes(halves[0]), u32::from_le_bytes(halves[1]))
        };
        (self.target, self.actual) = pair(kept::SIZES_AT);
        let (poison, last) = pair(kept::MEMORY_AT);
        self.poison = poison;
        let (seconds, is_set) = pair(kept::INTERVAL_AT);
        self.interval = (is_set == 1 && seconds <= MAX_INTERVAL).then_some(seconds);
        // A round that ran has ended with its process, and its number is never used again.
        self.hinting = Hinting::after(last);
        true
    }
}

/// The balloon. Nobody keeps its state locked while it waits for something.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) metrics: Metrics,
    pub(crate) health: Health,
    pub(crate) timer: Timer,
    /// Seconds between two questions for statistics, as the options say.
    interval: u32,
    config_change: ConfigChange,
    features: AtomicU64,
    /// It has moved in, and its rings have not run since.
    arrived: AtomicBool,
    state: Mutex<State>,
}

impl Shared {
    pub(crate) fn new(
        options: &Options,
        metrics: Metrics,
        health: Health,
        config_change: ConfigChange,
    ) -> nix::Result<Self> {
        let timer = Timer::new()?;
        timer.set(options.statistics_interval)?;
        Ok(Shared {
            metrics,
            health,
            timer,
            interval: options.statistics_interval,
            config_change,
            features: AtomicU64::new(0),
            arrived: AtomicBool::new(false),
            state: Mutex::new(State {
                target: options.target * MIB_PAGES,
                ..State::default()
            }),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Features in force.
    pub(crate) fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    pub(crate) fn accept(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    /// The configuration space as it is now.
    pub(crate) fn space(&self) -> Space {
        let state = self.state();
        Space {
            target: state.target,
            actual: state.actual,
            hint_command: state.hinting.command(),
            poison: state.poison,
        }
    }

    /// The guest says how many pages it has given.
    pub(crate) fn set_actual(&self, pages: u32) {
        let mut state = self.state();
        state.actual = pages;
        state.remember();
        drop(state);
        self.health.touch();
    }

    /// The guest says what it fills free pages with.
    pub(crate) fn set_poison(&self, value: u32) {
        let mut state = self.state();
        state.poison = value;
        state.remember();
    }

    /// Whether a free page must keep its content, which is not zero.
    pub(crate) fn keeps_free_pages(&self) -> bool {
        self.features() & feature::PAGE_POISON != 0 && self.state().poison != 0
    }

    pub(crate) fn save(&self) -> SavedState {
        let state = self.state();
        SavedState {
            target: state.target,
            actual: state.actual,
            poison: state.poison,
            last_round: state.hinting.last(),
            statistics: state.statistics.clone(),
            statistics_interval: state.interval,
            pages: SavedPages::from(&state.ballooned),
        }
    }

    pub(crate) fn load(&self, saved: SavedState) -> Result<(), String> {
        let ballooned = saved.check()?;
        self.metrics.set_held(ballooned.count());
        let mut state = self.state();
        *state = State {
            kept: state.kept.take(),
            has_past: true,
            target: saved.target,
            actual: saved.actual,
            poison: saved.poison,
            ballooned,
            hinting: Hinting::after(saved.last_round),
            statistics: saved.statistics,
            interval: saved.statistics_interval,
        };
        state.remember();
        self.set_timer(&state);
        drop(state);
        self.arrived.store(true, Ordering::Release);
        self.health.touch();
        Ok(())
    }

    /// Lets the timer run as the state says.
    fn set_timer(&self, state: &State) {
        if let Err(error) = self.timer.set(state.interval.unwrap_or(self.interval)) {
            let what = format!("the guest is not asked for statistics: no timer: {error}");
            self.health.error(&what);
        }
    }

    /// Whether it has just moved in: then the guest is told to look at its configuration.
    pub(crate) fn take_arrived(&self) -> bool {
        let arrived = self.arrived.swap(false, Ordering::AcqRel);
        if arrived {
            self.config_change.notify();
        }
        arrived
    }

    /// The guest starts anew, with all of its memory. What the host wants stays, and so do the
    /// features, until the front-end says others.
    pub(crate) fn reset(&self) {
        self.arrived.store(false, Ordering::Release);
        let mut state = self.state();
        state.hinting.forget();
        let hinting = std::mem::take(&mut state.hinting);
        *state = State {
            target: state.target,
            interval: state.interval,
            hinting,
            kept: state.kept.take(),
            ..State::default()
        };
        state.remember();
        drop(state);
        self.metrics.set_held(0);
        self.health.touch();
    }
}

impl Keepsake for Shared {
    fn words(&self) -> usize {
        kept::WORDS
    }

    fn keep(&self, kept: Kept) {
        let mut state = self.state();
        state.kept = Some(kept);
        let recalled = state.recall();
        state.remember();
        self.set_timer(&state);
        drop(state);
        if recalled {
            self.arrived.store(true, Ordering::Release);
            self.health.touch();
        }
    }
}

impl BalloonProcess for Shared {
    fn status(&self) -> BalloonStatus {
        let state = self.state();
        BalloonStatus {
            target: u64::from(state.target) * PAGE,
            actual: u64::from(state.actual) * PAGE,
            statistics_interval: state.interval.unwrap_or(self.interval),
        }
    }

    fn set_target(&self, bytes: u64) -> Result<(), LinkError> {
        let pages = u32::try_from(bytes / PAGE)
            .ok()
            .filter(|_| bytes.is_multiple_of(PAGE));
        let Some(pages) = pages else {
            return Err(LinkError::InvalidArgs(format!(
                "a balloon of {bytes} bytes is not possible: give a multiple of {PAGE} below 16 TiB"
            )));
        };
        let mut state = self.state();
        state.target = pages;
        state.remember();
        drop(state);
        self.config_change.notify();
        self.health.touch();
        Ok(())
    }

    fn set_statistics_interval(&self, seconds: u32) -> Result<(), LinkError> {
        if seconds > MAX_INTERVAL {
            return Err(LinkError::InvalidArgs(format!(
                "statistics every {seconds} s are not possible: give 0 to {MAX_INTERVAL}"
            )));
        }
        let mut state = self.state();
        state.interval = Some(seconds);
        state.remember();
        self.set_timer(&state);
        drop(state);
        self.health.touch();
        Ok(())
    }

    fn guest_statistics(&self) -> BTreeMap<String, u64> {
        let state = self.state();
        let named = |(tag, value): &(u16, u64)| Some((statistics::name(*tag)?.to_owned(), *value));
        state.statistics.iter().filter_map(named).collect()
    }

    fn start_hints(&self, map: OwnedFd) -> Result<u32, LinkError> {
        let refuse = |why: &str| Err(LinkError::InvalidState(why.to_owned()));
        if self.features() & feature::FREE_PAGE_HINT == 0 {
            return refuse("the guest has no driver that gives free page hints");
        }
        if self.keeps_free_pages() {
            return refuse("the guest relies on the content of its free pages");
        }
        let mut state = self.state();
        let started = state.hinting.start(&File::from(map));
        let round = started.map_err(|error| {
            LinkError::InvalidArgs(format!("the map of free pages cannot be used: {error}"))
        })?;
        state.remember();
        // A driver that need not tell may have taken some of them back already.
        if self.features() & feature::MUST_TELL_HOST != 0 {
            for (first, pages) in state.ballooned.runs() {
                state.hinting.mark(first, pages);
            }
        }
        drop(state);
        self.config_change.notify();
        Ok(round)
    }

    fn stop_hints(&self) {
        if self.state().hinting.stop() {
            self.config_change.notify();
        }
    }

    fn end_hints(&self) {
        if self.state().hinting.end() {
            self.config_change.notify();
        }
    }
}
