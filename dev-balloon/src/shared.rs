//! What the control thread, the link and the worker share.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use device_kit::{BalloonProcess, BalloonStatus, ConfigChange, Health, LinkError};

use crate::config::{PAGE, Space, feature};
use crate::hinting::Hinting;
use crate::metrics::Metrics;
use crate::page_set::PageSet;
use crate::saved_state::{SavedPages, SavedState};
use crate::statistics;

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
}

/// The balloon. Nobody keeps its state locked while it waits for something.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) metrics: Metrics,
    pub(crate) health: Health,
    config_change: ConfigChange,
    features: AtomicU64,
    /// It has moved in, and its rings have not run since.
    arrived: AtomicBool,
    state: Mutex<State>,
}

impl Shared {
    pub(crate) fn new(
        target: u32,
        metrics: Metrics,
        health: Health,
        config_change: ConfigChange,
    ) -> Self {
        Shared {
            metrics,
            health,
            config_change,
            features: AtomicU64::new(0),
            arrived: AtomicBool::new(false),
            state: Mutex::new(State {
                target,
                ..State::default()
            }),
        }
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
        self.state().actual = pages;
        self.health.touch();
    }

    /// The guest says what it fills free pages with.
    pub(crate) fn set_poison(&self, value: u32) {
        self.state().poison = value;
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
            pages: SavedPages::from(&state.ballooned),
        }
    }

    pub(crate) fn load(&self, saved: SavedState) -> Result<(), String> {
        let ballooned = saved.check()?;
        self.metrics.set_held(ballooned.count());
        *self.state() = State {
            target: saved.target,
            actual: saved.actual,
            poison: saved.poison,
            ballooned,
            hinting: match saved.last_round {
                0 => Hinting::default(),
                last => Hinting::arrived(last),
            },
            statistics: saved.statistics,
        };
        self.arrived.store(true, Ordering::Release);
        self.health.touch();
        Ok(())
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
            hinting,
            ..State::default()
        };
        drop(state);
        self.metrics.set_held(0);
        self.health.touch();
    }
}

impl BalloonProcess for Shared {
    fn status(&self) -> BalloonStatus {
        let state = self.state();
        BalloonStatus {
            target: u64::from(state.target) * PAGE,
            actual: u64::from(state.actual) * PAGE,
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
        self.state().target = pages;
        self.config_change.notify();
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
