//! Slowing vCPUs down, so that a guest that dirties memory faster than it can be sent can move.
//!
//! In every slice of time each vCPU runs a part and naps the rest. The thread that sends them to
//! nap ends with its [`Throttle`], and vCPUs that are gone are never touched.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::kick::Kick;

/// How long vCPUs run between two naps.
const SLICE: Duration = Duration::from_millis(10);
/// Most of the time that may be taken from a guest, in percent.
pub const MOST_PERCENT: u32 = 99;

/// The vCPUs that there are; emptied before the first of them goes.
#[derive(Clone, Default)]
pub(super) struct Kicks(Arc<Mutex<Vec<Arc<Kick>>>>);

impl Kicks {
    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<Arc<Kick>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a part of their time from all vCPUs of a machine.
pub struct Throttle {
    kicks: Kicks,
    percent: Arc<AtomicU32>,
    /// Its end is the thread's end.
    thread: Option<Sender<()>>,
}

impl Throttle {
    pub(super) fn new(kicks: Kicks) -> Self {
        Self {
            kicks,
            percent: Arc::default(),
            thread: None,
        }
    }

    /// The part that is taken, in percent.
    pub fn percent(&self) -> u32 {
        self.percent.load(Ordering::Relaxed)
    }

    /// From now on takes this part, at most `MOST_PERCENT`; 0 ends it.
    pub fn set(&mut self, percent: u32) -> std::io::Result<()> {
        let percent = percent.min(MOST_PERCENT);
        self.percent.store(percent, Ordering::Relaxed);
        if percent == 0 {
            self.thread = None;
        } else if self.thread.is_none() {
            let (alive, ended) = channel::<()>();
            let (kicks, percent) = (self.kicks.clone(), Arc::clone(&self.percent));
            thread::Builder::new()
                .name("throttle".into())
                .spawn(move || {
                    let mut pause = SLICE;
                    while ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                        let percent = percent.load(Ordering::Relaxed).min(MOST_PERCENT);
                        let nap = SLICE * percent / (100 - percent);
                        for kick in kicks.lock().iter() {
                            kick.send_to_nap(nap);
                        }
                        pause = SLICE + nap;
                    }
                })?;
            self.thread = Some(alive);
        }
        Ok(())
    }
}
