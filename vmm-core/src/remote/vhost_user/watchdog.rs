//! One thread that cuts connections whose deadline has passed.
//!
//! The `vhost` crate waits for an answer for ever; a socket that is shut down under it
//! makes it return. Arming costs a lock and no system call, as the thread is woken only
//! when a deadline comes before the one it sleeps to, which a disarmed deadline stays.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Deadlines are ordered by time; the number tells equal ones apart.
type Key = (Instant, u64);

struct Armed {
    socket: Arc<UnixStream>,
    fired: AtomicBool,
}

#[derive(Default)]
struct State {
    armed: BTreeMap<Key, Arc<Armed>>,
    next: u64,
    /// When the thread will look, if nobody wakes it.
    wakes_at: Option<Instant>,
    ended: bool,
    /// Nothing is waited for any more.
    over: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.state();
        while !state.ended {
            let now = Instant::now();
            while let Some(entry) = state.armed.first_entry()
                && entry.key().0 <= now
            {
                entry.remove().fire();
            }
            state.wakes_at = state.armed.keys().next().map(|key| key.0);
            state = match state.wakes_at {
                Some(at) => {
                    let left = at.saturating_duration_since(now);
                    let woken = self.changed.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let woken = self.changed.wait(state);
                    woken.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }
}

impl Armed {
    fn fire(&self) {
        self.fired.store(true, Ordering::Release);
        // It fails only when the peer is gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// Holds the deadlines of every connection of the process.
pub struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Starts the thread.
    pub fn start() -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared::default());
        let runner = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || runner.run())?;
        Ok(Arc::new(Self {
            shared,
            thread: Some(thread),
        }))
    }

    /// Lets every deadline pass now: what is waited for is not worth waiting any more.
    pub fn give_up(&self) {
        for armed in std::mem::take(&mut self.shared.state().armed).values() {
            armed.fire();
        }
    }

    /// As [`Self::give_up`], for all that is waited for later, too.
    pub fn end(&self) {
        self.shared.state().over = true;
        self.give_up();
    }

    /// Shuts `socket` down after `deadline`, unless the guard is dropped before.
    pub(super) fn guard(&self, socket: &Arc<UnixStream>, deadline: Duration) -> Guard<'_> {
        let at = Instant::now() + deadline;
        let armed = Arc::new(Armed {
            socket: Arc::clone(socket),
            fired: AtomicBool::new(false),
        });
        let mut state = self.shared.state();
        if state.over {
            armed.fire();
        }
        let key = (at, state.next);
        state.next += 1;
        state.armed.insert(key, Arc::clone(&armed));
        if state.wakes_at.is_none_or(|wakes| at < wakes) {
            self.shared.changed.notify_one();
        }
        Guard {
            shared: &self.shared,
            key,
            armed,
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watchdog thread panicked");
        }
    }
}

/// A deadline that holds as long as this lives.
pub(super) struct Guard<'a> {
    shared: &'a Shared,
    key: Key,
    armed: Arc<Armed>,
}

impl Guard<'_> {
    /// Whether the deadline has passed.
    pub(super) fn has_fired(&self) -> bool {
        self.armed.fired.load(Ordering::Acquire)
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.shared.state().armed.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_silent_peer_is_cut_off_and_others_are_not() {
        let watchdog = Watchdog::start().unwrap();
        let (silent, _peer) = UnixStream::pair().unwrap();
        let (other, mut other_peer) = UnixStream::pair().unwrap();
        let (silent, other) = (Arc::new(silent), Arc::new(other));
        let long = watchdog.guard(&other, Duration::from_secs(3600));
        let short = watchdog.guard(&silent, Duration::from_millis(20));
        assert_eq!((&*silent).read(&mut [0]).unwrap(), 0);
        assert!(short.has_fired() && !long.has_fired());
        drop((short, long));
        other_peer.set_nonblocking(true).unwrap();
        let nothing = other_peer.read(&mut [0]).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn what_is_given_up_ends_at_once() {
        let watchdog = Watchdog::start().unwrap();
        let (socket, _peer) = UnixStream::pair().unwrap();
        let socket = Arc::new(socket);
        let guard = watchdog.guard(&socket, Duration::from_secs(3600));
        watchdog.give_up();
        assert_eq!((&*socket).read(&mut [0]).unwrap(), 0);
        assert!(guard.has_fired());
    }

    #[test]
    fn after_the_end_nothing_is_waited_for() {
        let watchdog = Watchdog::start().unwrap();
        let (socket, _peer) = UnixStream::pair().unwrap();
        let socket = Arc::new(socket);
        watchdog.end();
        let guard = watchdog.guard(&socket, Duration::from_secs(3600));
        assert_eq!((&*socket).read(&mut [0]).unwrap(), 0);
        assert!(guard.has_fired());
    }

    #[test]
    fn a_dropped_guard_does_nothing() {
        let watchdog = Watchdog::start().unwrap();
        let (socket, _peer) = UnixStream::pair().unwrap();
        let socket = Arc::new(socket);
        drop(watchdog.guard(&socket, Duration::from_millis(1)));
        let later = watchdog.guard(&socket, Duration::from_millis(30));
        assert!(!later.has_fired());
        assert!(watchdog.shared.state().armed.len() == 1);
    }
}
