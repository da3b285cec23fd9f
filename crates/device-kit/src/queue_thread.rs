//! The thread that serves the queues of one worker.
//!
//! It owns its queues and its worker; the control thread owns everything else and sends it
//! commands. There is no lock on the way of a request. One turn is:
//!
//! ```text
//! wait (commands, kicks, the worker's descriptors)
//!   → commands → kicks are read → Worker::ready for each ready descriptor
//!   → Worker::process for each queue that runs → guests are called → stops that can end, end
//! ```
//!
//! It waits by `poll`, whose list is made anew each turn: a kick descriptor that is replaced or
//! closed leaves nothing behind. The life of a queue in here:
//!
//! ```text
//! (absent) ──start──► running ──stop──► stopping ──nothing in flight──► (absent), base answered
//!                        └──guest breaks the ring──► broken ──stop──► as above, at once or drained
//! ```
#![expect(unsafe_code, reason = "poll on descriptors that come and go")]

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::{HostError, Interest, Progress, Queues, Source, Worker, WorkerError};
use crate::ending::Ending;
use crate::health::Health;
use crate::memory::Memory;
use crate::queue::{Queue, QueueError, QueueIndex, RingLayout};

/// The eventfds of a ring.
#[derive(Debug, Default)]
pub(crate) struct RingEvents {
    /// The guest made requests available.
    pub(crate) kick: Option<OwnedFd>,
    /// Requests were answered.
    pub(crate) call: Option<OwnedFd>,
    /// The ring is broken.
    pub(crate) error: Option<OwnedFd>,
}

/// What the control thread asks for.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve this queue from now on.
    Start {
        queue: Box<Queue>,
        events: RingEvents,
    },
    /// Serve it no longer; answer its base when nothing of it is in flight.
    Stop {
        queue: QueueIndex,
        base: Sender<u16>,
    },
    /// Use this descriptor instead.
    SetEvent {
        queue: QueueIndex,
        which: RingEvent,
        fd: Option<OwnedFd>,
    },
    /// Use this memory; each ring is at its new place, or nowhere.
    SetMemory {
        memory: Arc<Memory>,
        layouts: Vec<(QueueIndex, Option<RingLayout>)>,
        done: Sender<()>,
    },
}

/// Which eventfd of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingEvent {
    Kick,
    Call,
    Error,
}

/// The control thread's handle: sends commands and wakes the thread.
#[derive(Debug)]
pub(crate) struct Mailbox {
    sender: Sender<Command>,
    wake: Arc<EventFd>,
}

impl Mailbox {
    /// Sends a command; false when the thread is gone.
    pub(crate) fn send(&self, command: Command) -> bool {
        self.sender.send(command).is_ok() && self.wake.write(1).is_ok()
    }
}

struct Slot {
    events: RingEvents,
    stopping: Option<Sender<u16>>,
    broken: bool,
}

pub(crate) struct QueueThread<W> {
    worker: W,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    /// Same places as `slots`.
    queues: Vec<Option<Queue>>,
    slots: Vec<Slot>,
    /// There is more to do, without waiting.
    again: bool,
    ending: Ending,
    health: Health,
}

impl<W: Worker> QueueThread<W> {
    /// Makes a thread's state, to be moved to the thread, and the control thread's handle to it.
    pub(crate) fn new(
        worker: W,
        queue_count: usize,
        ending: Ending,
        health: Health,
    ) -> Result<(Self, Mailbox), HostError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_flags(flags)
            .map_err(|error| HostError::new("cannot make an eventfd for a queue thread", error))?;
        let wake = Arc::new(wake);
        let (sender, commands) = std::sync::mpsc::channel();
        let mailbox = Mailbox {
            sender,
            wake: Arc::clone(&wake),
        };
        let slot = || Slot {
            events: RingEvents::default(),
            stopping: None,
            broken: false,
        };
        let thread = QueueThread {
            worker,
            commands,
            wake,
            queues: (0..queue_count).map(|_| None).collect(),
            slots: (0..queue_count).map(|_| slot()).collect(),
            again: false,
            ending,
            health,
        };
        Ok((thread, mailbox))
    }

    /// Serves until the control thread's handle is gone. A failure of the host ends the process.
    pub(crate) fn run(mut self) {
        let result = self.worker.start().and_then(|()| {
            let mut wait = Wait::default();
            while self.obey()? {
                wait.collect(&self)?;
                self.turn(&wait)?;
            }
            Ok(())
        });
        if let Err(error) = result {
            self.ending.fail(&error);
        }
    }

    /// Carries out what was asked; false when nobody can ask any more.
    fn obey(&mut self) -> Result<bool, HostError> {
        let _ = self.wake.read();
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.carry_out(command)?,
                Err(std::sync::mpsc::TryRecvError::Empty) => return Ok(true),
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return Ok(false),
            }
        }
    }

    fn carry_out(&mut self, command: Command) -> Result<(), HostError> {
        match command {
            Command::Start { queue, events } => {
                if let Some(at) = self.queues.iter().position(Option::is_none) {
                    // What happened to this ring before is unknown: its guest may wait for a call
                    // that was lost with the process before this one, and its kick too.
                    signal(events.call.as_ref(), queue.index());
                    self.queues[at] = Some(*queue);
                    self.slots[at].events = events;
                    self.slots[at].broken = false;
                    self.process(at)?;
                }
            }
            Command::Stop { queue, base } => match self.place(queue) {
                Some(at) => {
                    self.slots[at].stopping = Some(base);
                    self.end_stops();
                }
                None => drop(base),
            },
            Command::SetEvent { queue, which, fd } => {
                if let Some(at) = self.place(queue) {
                    let events = &mut self.slots[at].events;
                    match which {
                        RingEvent::Kick => events.kick = fd,
                        RingEvent::Call => events.call = fd,
                        RingEvent::Error => events.error = fd,
                    }
                    // A kick that went to the old descriptor is made up for.
                    self.process(at)?;
                }
            }
            Command::SetMemory {
                memory,
                layouts,
                done,
            } => {
                for (queue, layout) in layouts {
                    self.move_ring(queue, layout, &memory);
                }
                let _ = done.send(());
            }
        }
        Ok(())
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

    fn turn(&mut self, wait: &Wait) -> Result<(), HostError> {
        self.again = false;
        for (at, _, revents) in &wait.kicks {
            self.take_kick(*at, *revents);
        }
        for (source, _, revents) in &wait.sources {
            if *revents != 0 {
                let mut queues = Queues {
                    queues: &mut self.queues,
                };
                let result = self.worker.ready(*source, &mut queues);
                self.survive(result)?;
            }
        }
        for at in 0..self.queues.len() {
            self.process(at)?;
        }
        self.end_stops();
        Ok(())
    }

    fn take_kick(&mut self, at: usize, revents: libc::c_short) {
        let (Some(queue), Some(kick)) = (&self.queues[at], &self.slots[at].events.kick) else {
            return;
        };
        if revents & libc::POLLIN != 0 {
            let mut count = [0; 8];
            match nix::unistd::read(kick, &mut count) {
                Ok(8) => {
                    queue.metrics().kicks.inc();
                    return;
                }
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Ok(_) | Err(_) => {}
            }
        } else if revents == 0 {
            return;
        }
        tracing::warn!(queue = %queue.index(), "kick descriptor is unusable and no longer watched");
        self.slots[at].events.kick = None;
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
            slot.events = RingEvents::default();
            if let (Some(base), Some(queue)) = (slot.stopping.take(), self.queues[at].take()) {
                // Nobody waits for it any more when the control thread gave up.
                let _ = base.send(queue.base());
            }
        }
    }

    fn place(&self, index: QueueIndex) -> Option<usize> {
        self.queues
            .iter()
            .position(|queue| queue.as_ref().is_some_and(|queue| queue.index() == index))
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

fn signal(fd: Option<&OwnedFd>, queue: QueueIndex) {
    let Some(fd) = fd else { return };
    match nix::unistd::write(fd, &1u64.to_ne_bytes()) {
        // A counter that is full has been signalled.
        Ok(_) | Err(Errno::EAGAIN) => {}
        Err(error) => tracing::debug!(%queue, %error, "event descriptor cannot be signalled"),
    }
}

/// What the thread waits for, and what of it is ready.
#[derive(Default)]
struct Wait {
    interest: Interest,
    list: Vec<libc::pollfd>,
    /// Place of the queue, its place in `list`, and what is ready.
    kicks: Vec<(usize, usize, libc::c_short)>,
    /// The same for the worker's descriptors.
    sources: Vec<(Source, usize, libc::c_short)>,
}

impl Wait {
    fn collect<W: Worker>(&mut self, thread: &QueueThread<W>) -> Result<(), HostError> {
        self.list.clear();
        self.kicks.clear();
        self.sources.clear();
        self.interest.entries.clear();
        self.add(thread.wake.as_fd().as_raw_fd(), libc::POLLIN);
        for (at, slot) in thread.slots.iter().enumerate() {
            let served = !slot.broken && slot.stopping.is_none() && thread.queues[at].is_some();
            if let (true, Some(kick)) = (served, &slot.events.kick) {
                self.kicks.push((at, self.list.len(), 0));
                self.add(kick.as_raw_fd(), libc::POLLIN);
            }
        }
        thread.worker.wait_for(&mut self.interest);
        for at in 0..self.interest.entries.len() {
            let (source, fd, events) = self.interest.entries[at];
            self.sources.push((source, self.list.len(), 0));
            self.add(fd, events);
        }
        self.poll(thread.again)?;
        for (_, place, revents) in &mut self.kicks {
            *revents = self.list[*place].revents;
        }
        for (_, place, revents) in &mut self.sources {
            *revents = self.list[*place].revents;
        }
        Ok(())
    }

    fn add(&mut self, fd: RawFd, events: libc::c_short) {
        self.list.push(libc::pollfd {
            fd,
            events,
            revents: 0,
        });
    }

    fn poll(&mut self, at_once: bool) -> Result<(), HostError> {
        let timeout = if at_once { 0 } else { -1 };
        // SAFETY: the list is this value's own and as long as it says.
        let result = unsafe {
            libc::poll(
                self.list.as_mut_ptr(),
                self.list.len() as libc::nfds_t,
                timeout,
            )
        };
        if result < 0 && Errno::last() != Errno::EINTR {
            return Err(HostError::new("queue thread cannot wait", Errno::last()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
