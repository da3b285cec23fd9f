//! How the process does: what is told over the control link, and who is told that it changed.
//!
//! Every part of the process has a handle. What is kept is bounded, and taking note of something
//! never waits for whoever listens.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::state::DeviceState;
use tokio::sync::Notify;

/// Longest error text that is kept, in characters.
const MAX_ERROR: usize = 500;

/// A handle; clones are handles to the same.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    standing: Mutex<Standing>,
    changed: Notify,
}

/// What is known at the moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Where the device is in its life.
    pub state: DeviceState,
    /// Whether it is served to a front-end.
    pub connected: bool,
    /// What went wrong last, or empty.
    pub last_error: String,
    /// How many errors there were.
    pub errors: u64,
}

impl Default for Standing {
    fn default() -> Self {
        Standing {
            state: DeviceState::Stop,
            connected: false,
            last_error: String::new(),
            errors: 0,
        }
    }
}

impl Health {
    /// Something went wrong, by one sentence that names it. Logging it is the caller's.
    pub fn error(&self, what: &dyn fmt::Display) {
        let text: String = what.to_string().chars().take(MAX_ERROR).collect();
        let mut standing = self.lock();
        standing.last_error = text;
        standing.errors += 1;
        drop(standing);
        self.touch();
    }

    /// The device is in another state of its life.
    pub fn set_state(&self, state: DeviceState) {
        self.lock().state = state;
        self.touch();
    }

    /// A front-end came or went.
    pub fn set_connected(&self, connected: bool) {
        self.lock().connected = connected;
        self.touch();
    }

    /// Something else that is told has changed.
    pub fn touch(&self) {
        self.0.changed.notify_one();
    }

    /// What is known now.
    pub fn standing(&self) -> Standing {
        self.lock().clone()
    }

    /// Returns when something changed since the last time; for one listener.
    pub(crate) async fn changed(&self) {
        self.0.changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Standing> {
        self.0
            .standing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_is_kept_and_cut() {
        let health = Health::default();
        health.error(&"first");
        health.error(&"ö".repeat(10_000));
        let standing = health.standing();
        assert_eq!(standing.errors, 2);
        assert_eq!(standing.last_error, "ö".repeat(MAX_ERROR));
    }
}
