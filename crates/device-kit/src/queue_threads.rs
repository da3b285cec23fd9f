//! All queue threads of the process, as the control thread sees them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use std::os::fd::OwnedFd;

use crate::memory::Memory;
use crate::queue::{Queue, QueueIndex, RingLayout};
use crate::queue_thread::{Command, Mailbox, RingEvent, RingEvents};

/// A queue thread that does not take over new memory for this long is stuck.
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

/// A queue thread that is gone, or that does not answer.
#[derive(Debug, thiserror::Error)]
#[error("the thread of queue {queue} does not answer")]
pub(crate) struct ThreadGone {
    pub(crate) queue: QueueIndex,
}

/// Handles of the threads, and which queue is served by which.
#[derive(Debug)]
pub(crate) struct QueueThreads {
    mailboxes: Vec<Mailbox>,
    /// By queue: its thread.
    thread_of: Vec<usize>,
}

impl QueueThreads {
    /// `thread_of` has a valid entry for each queue of the device.
    pub(crate) fn new(mailboxes: Vec<Mailbox>, thread_of: Vec<usize>) -> Self {
        QueueThreads {
            mailboxes,
            thread_of,
        }
    }

    /// Number of queues.
    pub(crate) fn queue_count(&self) -> usize {
        self.thread_of.len()
    }

    pub(crate) fn start(&self, queue: Queue, events: RingEvents) -> Result<(), ThreadGone> {
        self.send(
            queue.index(),
            Command::Start {
                queue: Box::new(queue),
                events,
            },
        )
    }

    /// Asks a queue to stop; its base comes when it is drained.
    pub(crate) fn stop(&self, queue: QueueIndex) -> Result<Receiver<u16>, ThreadGone> {
        let (base, answer) = channel();
        self.send(queue, Command::Stop { queue, base })?;
        Ok(answer)
    }

    pub(crate) fn set_event(
        &self,
        queue: QueueIndex,
        which: RingEvent,
        fd: Option<OwnedFd>,
    ) -> Result<(), ThreadGone> {
        self.send(queue, Command::SetEvent { queue, which, fd })
    }

    /// Gives all running queues their new memory, at once, and waits until all have taken it.
    pub(crate) fn set_memory(
        &self,
        memory: &Arc<Memory>,
        layouts: &[(QueueIndex, Option<RingLayout>)],
    ) -> Result<(), ThreadGone> {
        let mut answers = Vec::new();
        for thread in 0..self.mailboxes.len() {
            let layouts: Vec<_> = layouts
                .iter()
                .filter(|(queue, _)| self.thread_of[usize::from(queue.get())] == thread)
                .copied()
                .collect();
            let Some((queue, _)) = layouts.first().copied() else {
                continue;
            };
            let (done, answer) = channel();
            self.send(
                queue,
                Command::SetMemory {
                    memory: Arc::clone(memory),
                    layouts,
                    done,
                },
            )?;
            answers.push((queue, answer));
        }
        let deadline = Instant::now() + COMMAND_DEADLINE;
        for (queue, answer) in answers {
            answer
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
                .map_err(|_| ThreadGone { queue })?;
        }
        Ok(())
    }

    fn send(&self, queue: QueueIndex, command: Command) -> Result<(), ThreadGone> {
        let thread = self.thread_of[usize::from(queue.get())];
        if self.mailboxes[thread].send(command) {
            Ok(())
        } else {
            Err(ThreadGone { queue })
        }
    }
}
