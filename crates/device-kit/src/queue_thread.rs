//! The thread that serves the queues of one worker, and its hand-over to the control thread.
//!
//! Queues and worker are behind one lock. The queue thread holds it while it has something to do
//! and gives it up while it waits; so the control thread starts and stops rings that are at rest
//! without waking anybody. One turn is:
//!
//! ```text
//! wait (kicks, the worker's descriptors, a wake-up)          without the lock
//!   → kicks are read → Worker::ready for each ready descriptor
//!   → Worker::process for each queue that runs → guests are called → stops that can end, end
//! ```
//!
//! What was ready when the wait ended may be gone when the lock is held: a kick descriptor that was
//! replaced meanwhile is known by its number, see [`Token`]. A queue's descriptors stay while it is
//! stopped, so that stopping and starting is a matter of memory alone. The life of a queue in here:
//!
//! ```text
//! (absent) ──start──► running ──stop──► stopping ──nothing in flight──► (absent), base answered
//!                        └──guest breaks the ring──► broken ──stop──► as above, at once or drained
//! ```

use std::convert::Infallible;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use parking_lot::{Mutex, MutexGuard};

use crate::device::{HostError, Progress, Queues, Worker, WorkerError};
use crate::ending::Ending;
use crate::health::Health;
use crate::memory::Memory;
use crate::queue::{Queue, QueueError, QueueIndex, RingLayout};
pub use watch::Interest;
use watch::{Followed, Token, Watch};

mod watch;

/// A queue thread that does not come to the end of its turn for this long is stuck.
const TURN_DEADLINE: Duration = Duration::from_secs(10);
/// Most events that one turn takes.
const EVENTS: usize = 64;

/// Which eventfd of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingEvent {
    /// The guest made requests available.
    Kick,
    /// Requests were answered.
    Call,
    /// The ring is broken.
    Error,
}

#[derive(Debug, Default)]
struct RingEvents {
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
}

/// A queue thread that is stuck in a turn.
#[derive(Debug)]
pub(crate) struct Stuck;

/// What the control thread does with the queues of one thread. Each call waits for the turn that
/// the thread is in.
pub(crate) trait Rings: Send + Sync {
    /// Serves as long as the process lives, on this thread. A failure of the host ends the process.
    fn run(&self);

    /// Serves this queue from now on.
    fn start(&self, queue: Queue) -> Result<(), Stuck>;

    /// Serves it no longer, and answers its base when nothing of it is in flight; now, if it is at
    /// rest.
    fn stop(&self, queue: QueueIndex, base: Sender<u16>) -> Result<(), Stuck>;

    /// Uses this descriptor from now on, and keeps it while the queue is stopped.
    fn set_event(
        &self,
        queue: QueueIndex,
        which: RingEvent,
        fd: Option<OwnedFd>,
    ) -> Result<(), Stuck>;

    /// Uses this memory, where the ring is at this place, or nowhere.
    fn set_memory(
        &self,
        queue: QueueIndex,
        layout: Option<RingLayout>,
        memory: &Arc<Memory>,
    ) -> Result<(), Stuck>;
}

struct Slot {
    index: QueueIndex,
    events: RingEvents,
    /// Which of the kick descriptors that were here in turn is watched.
    generation: u32,
    stopping: Option<Sender<u16>>,
    broken: bool,
}

/// What one thread at a time works with.
struct Serving<W> {
    worker: W,
    /// Same places as `slots`.
    queues: Vec<Option<Queue>>,
    slots: Vec<Slot>,
    /// The worker's descriptors.
    followed: Followed,
    /// There is more to do, without waiting.
    again: bool,
    watch: Arc<Watch>,
    health: Health,
}

/// A worker and its queues, shared by the queue thread and the control thread.
pub(crate) struct QueueThread<W> {
    serving: Mutex<Serving<W>>,
    watch: Arc<Watch>,
    ending: Ending,
}

impl<W: Worker> QueueThread<W> {
    /// Makes what the two threads share.
    pub(crate) fn new(
        worker: W,
        queues: &[QueueIndex],
        ending: Ending,
        health: Health,
    ) -> Result<Arc<Self>, HostError> {
        let watch = Watch::new()
            .map_err(|error| HostError::new("cannot make what a queue thread waits for", error))?;
        let watch = Arc::new(watch);
        let slot = |&index| Slot {
            index,
            events: RingEvents::default(),
            generation: 0,
            stopping: None,
            broken: false,
        };
        let serving = Serving {
            worker,
            queues: queues.iter().map(|_| None).collect(),
            slots: queues.iter().map(slot).collect(),
            followed: Followed::default(),
            again: false,
            watch: Arc::clone(&watch),
            health,
        };
        Ok(Arc::new(QueueThread {
            serving: Mutex::new(serving),
            watch,
            ending,
        }))
    }

    fn serve(&self) -> Result<Infallible, HostError> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut at_once = {
            let mut serving = self.serving.lock();
            serving.worker.start()?;
            serving.turn(&[])?
        };
        loop {
            let ready = self
                .watch
                .wait(&mut events, at_once)
                .map_err(|error| HostError::new("queue thread cannot wait", error))?;
            let mut serving = self.serving.lock();
            at_once = serving.turn(&events[..ready])?;
            // Who waits for the end of this turn must not wait for that of the next.
            MutexGuard::unlock_fair(serving);
        }
    }

    fn lock(&self) -> Result<MutexGuard<'_, Serving<W>>, Stuck> {
        self.serving.try_lock_for(TURN_DEADLINE).ok_or(Stuck)
    }
}

impl<W: Worker> Rings for QueueThread<W> {
    fn run(&self) {
        let Err(error) = self.serve();
        self.ending.fail(&error);
    }

    fn start(&self, queue: Queue) -> Result<(), Stuck> {
        let mut serving = self.lock()?;
        let mut look = serving.start(queue);
        if look && W::ANY_THREAD {
            look = serving.turn(&[]).unwrap_or_else(|error| {
                self.ending.fail(&error);
                false
            });
        }
        drop(serving);
        if look {
            self.watch.wake();
        }
        Ok(())
    }

    fn stop(&self, queue: QueueIndex, base: Sender<u16>) -> Result<(), Stuck> {
        self.lock()?.stop(queue, base);
        Ok(())
    }

    fn set_event(
        &self,
        queue: QueueIndex,
        which: RingEvent,
        fd: Option<OwnedFd>,
    ) -> Result<(), Stuck> {
        if self.lock()?.set_event(queue, which, fd) {
            self.watch.wake();
        }
        Ok(())
    }

    fn set_memory(
        &self,
        queue: QueueIndex,
        layout: Option<RingLayout>,
        memory: &Arc<Memory>,
    ) -> Result<(), Stuck> {
        self.lock()?.move_ring(queue, layout, memory);
        Ok(())
    }
}

impl<W: Worker> Serving<W> {
    /// True when the ring is to be looked at.
    fn start(&mut self, queue: Queue) -> bool {
        let Some(at) = self.place(queue.index()) else {
            return false;
        };
        self.slots[at].broken = false;
        let queue = self.queues[at].insert(queue);
        // What happened to this ring before is unknown: its guest may wait for a call that was
        // lost with the process before this one, and its kick too.
        let looked = queue.owes_call().and_then(|owes| {
            if owes {
                signal(self.slots[at].events.call.as_ref(), queue.index());
            }
            queue.enable_kicks()
        });
        looked.unwrap_or_else(|error| {
            self.break_queue(at, &error);
            false
        })
    }

    fn stop(&mut self, queue: QueueIndex, base: Sender<u16>) {
        // Without a queue, that nobody answers is the answer.
        if let Some(at) = self.place(queue)
            && self.queues[at].is_some()
        {
            self.slots[at].stopping = Some(base);
            self.end_stops();
        }
    }

    /// True when a kick may have gone to the old descriptor, which is to be made up for.
    fn set_event(&mut self, queue: QueueIndex, which: RingEvent, fd: Option<OwnedFd>) -> bool {
        let Some(at) = self.place(queue) else {
            return false;
        };
        match which {
            RingEvent::Kick => {
                self.forget_kick(at);
                self.slots[at].events.kick = fd;
                self.watch_kick(at);
            }
            RingEvent::Call => self.slots[at].events.call = fd,
            RingEvent::Error => self.slots[at].events.error = fd,
        }
        which == RingEvent::Kick && self.queues[at].is_some()
    }

    /// Waits for the kicks of a queue, also while it is stopped: then they are read and nothing else.
    fn watch_kick(&mut self, at: usize) {
        let slot = &mut self.slots[at];
        slot.generation = slot.generation.wrapping_add(1);
        let token = Token::Kick {
            at,
            generation: slot.generation,
        };
        if let Some(kick) = &slot.events.kick
            && let Err(error) = self.watch.add(kick, EpollFlags::EPOLLIN, token)
        {
            tracing::warn!(%error, "kick descriptor cannot be waited for");
            slot.events.kick = None;
        }
    }

    fn forget_kick(&mut self, at: usize) {
        if let Some(kick) = self.slots[at].events.kick.take() {
            self.watch.remove(&kick);
        }
    }

    fn move_ring(&mut self, index: QueueIndex, layout: Option<RingLayout>, memory: &Arc<Memory>) {
        let Some(at) = self.place(index) else { return };
        let Some(queue) = &mut self.queues[at] else {
            return;
        };
        let moved = match layout {
            Some(layout) => queue.set_memory(layout, Arc::clone(memory)),
            None => Err(queue.lost()),
        };
        if let Err(error) = moved {
            self.break_queue(at, &error);
        }
    }

    /// True when there is more to do, without waiting.
    fn turn(&mut self, events: &[EpollEvent]) -> Result<bool, HostError> {
        self.again = false;
        for event in events {
            match Token::of(event) {
                Token::Wake => self.watch.woken(),
                Token::Kick { at, generation } => self.take_kick(at, generation, event.events()),
                Token::Worker(fd) => self.take_source(fd, event.events())?,
            }
        }
        for at in 0..self.queues.len() {
            self.process(at)?;
        }
        self.end_stops();
        let mut interest = Interest::new(&self.watch, &mut self.followed);
        self.worker.wait_for(&mut interest);
        interest.end().map_err(unwatched)?;
        Ok(self.again)
    }

    fn take_source(&mut self, fd: RawFd, flags: EpollFlags) -> Result<(), HostError> {
        for at in (0..self.followed.len()).rev() {
            match self.followed.hit(at, fd, flags) {
                Some((source, true)) => {
                    let mut queues = Queues {
                        queues: &mut self.queues,
                    };
                    let result = self.worker.ready(source, &mut queues);
                    self.survive(result)?;
                }
                Some((_, false)) => self.followed.forget(at, &self.watch).map_err(unwatched)?,
                None => {}
            }
        }
        Ok(())
    }

    fn take_kick(&mut self, at: usize, generation: u32, flags: EpollFlags) {
        let slot = &self.slots[at];
        let Some(kick) = &slot.events.kick else {
            return;
        };
        if slot.generation != generation {
            return;
        }
        if flags.contains(EpollFlags::EPOLLIN) {
            let mut count = [0; 8];
            match nix::unistd::read(kick, &mut count) {
                Ok(8) => {
                    if let Some(queue) = &self.queues[at] {
                        queue.metrics().kicks.inc();
                    }
                    return;
                }
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Ok(_) | Err(_) => {}
            }
        }
        tracing::warn!(queue = %slot.index, "kick descriptor is unusable and no longer watched");
        self.forget_kick(at);
    }

    /// Lets the worker take requests.
    fn process(&mut self, at: usize) -> Result<(), HostError> {
        let slot = &self.slots[at];
        let Some(queue) = &mut self.queues[at] else {
            return Ok(());
        };
        if !slot.broken && slot.stopping.is_none() {
            match serve(&mut self.worker, queue) {
                Ok(more) => self.again |= more,
                Err(error) => self.survive(Err(error))?,
            }
        }
        self.call_guest(at);
        Ok(())
    }

    /// Calls the guest for what was answered, broken or not: the answers are there.
    fn call_guest(&mut self, at: usize) {
        let Some(queue) = &mut self.queues[at] else {
            return;
        };
        match queue.wants_call() {
            Ok(true) => {
                queue.metrics().calls.inc();
                signal(self.slots[at].events.call.as_ref(), queue.index());
            }
            Ok(false) => {}
            Err(error) => self.break_queue(at, &error),
        }
    }

    /// A broken ring is the guest's loss; anything else ends the thread.
    fn survive(&mut self, result: Result<(), WorkerError>) -> Result<(), HostError> {
        match result {
            Ok(()) => Ok(()),
            Err(WorkerError::Host(error)) => Err(error),
            Err(WorkerError::Guest(error)) => {
                if let Some(at) = self.place(error.queue) {
                    self.break_queue(at, &error);
                }
                Ok(())
            }
        }
    }

    fn break_queue(&mut self, at: usize, error: &QueueError) {
        let Some(queue) = &self.queues[at] else {
            return;
        };
        let slot = &mut self.slots[at];
        if !slot.broken {
            tracing::warn!(%error, "ring is broken and not served until it is set up anew");
            self.health.error(error);
            slot.broken = true;
            queue.metrics().broken.inc();
            signal(slot.events.error.as_ref(), queue.index());
        }
    }

    fn end_stops(&mut self) {
        for at in 0..self.queues.len() {
            let drained = self.queues[at]
                .as_ref()
                .is_some_and(|queue| queue.in_flight() == 0);
            if !drained || self.slots[at].stopping.is_none() {
                continue;
            }
            self.call_guest(at);
            let slot = &mut self.slots[at];
            if let (Some(base), Some(queue)) = (slot.stopping.take(), self.queues[at].take()) {
                // Nobody waits for it any more when the control thread gave up.
                let _ = base.send(queue.base());
            }
        }
    }

    fn place(&self, index: QueueIndex) -> Option<usize> {
        self.slots.iter().position(|slot| slot.index == index)
    }
}

/// One look at a queue that runs; true when it is to be looked at again at once.
fn serve<W: Worker>(worker: &mut W, queue: &mut Queue) -> Result<bool, WorkerError> {
    queue.refill_budget();
    queue.disable_kicks()?;
    loop {
        let more = match worker.process(queue)? {
            Progress::Held => return Ok(false),
            Progress::Emptied => queue.enable_kicks()?,
            Progress::Short => queue.enable_kicks_for_more()?,
        };
        if !more || queue.out_of_budget() {
            return Ok(more);
        }
    }
}

fn unwatched(error: Errno) -> HostError {
    HostError::new(
        "the wait for a worker's descriptor cannot be changed",
        error,
    )
}

fn signal(fd: Option<&OwnedFd>, queue: QueueIndex) {
    let Some(fd) = fd else { return };
    match nix::unistd::write(fd, &1u64.to_ne_bytes()) {
        // A counter that is full has been signalled.
        Ok(_) | Err(Errno::EAGAIN) => {}
        Err(error) => tracing::debug!(%queue, %error, "event descriptor cannot be signalled"),
    }
}

#[cfg(test)]
mod tests;
