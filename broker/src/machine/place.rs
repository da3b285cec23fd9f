//! Whether a machine is here.
//!
//! ```text
//! new ─ it comes ─► here ⇄ leaving (its job moves it within this host, or to another)
//!                    ▲       │ nobody knows whether it came, or it did
//!                    └───── away
//! ```
//! What is away, or may be, is not started here by mistake; what is new is forgotten unless it comes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Machine;
use crate::jobs::{Job, Kind};

impl Machine {
    /// Says whether it is forgotten unless it comes.
    pub(crate) fn set_new(&self, new: bool) {
        self.new.store(new, Ordering::Relaxed);
    }

    /// Whether it is forgotten unless it comes.
    pub(crate) fn is_new(&self) -> bool {
        self.new.load(Ordering::Relaxed)
    }

    /// Says whether it is at another host, or may be.
    pub(crate) fn set_away(&self, away: bool) {
        self.away.store(away, Ordering::SeqCst);
    }

    /// Whether it is at another host, or may be.
    pub(crate) fn is_away(&self) -> bool {
        self.away.load(Ordering::SeqCst)
    }

    /// Whether a job moves it now, or it is away.
    pub(super) fn is_moving(&self) -> bool {
        let moves = |job: Arc<Job>| job.record().kind == Kind::Migrate;
        self.is_away() || self.job().is_some_and(moves)
    }

    /// Says whether another generation of processes may take the place of the present one.
    pub(crate) fn set_leaving(&self, leaving: bool) {
        self.leaving.send_replace(leaving);
    }
}
