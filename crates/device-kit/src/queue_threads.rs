//! All queue threads of the process, as the control thread sees them.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use crate::device::HostError;
use crate::memory::Memory;
use crate::program::spawn;
use crate::queue::{Queue, QueueIndex, RingLayout};
use crate::queue_thread::{RingEvent, Rings, Stuck};

/// A queue thread needs little; the address space of 64 of them is kept small.
const STACK: usize = 256 << 10;

/// A queue thread that is stuck in a turn.
#[derive(Debug, thiserror::Error)]
#[error("the thread of queue {queue} does not come to an end with what it does")]
pub(crate) struct ThreadStuck {
    pub(crate) queue: QueueIndex,
}

/// The threads' rings, and which queue is served by which.
pub(crate) struct QueueThreads {
    threads: Vec<Arc<dyn Rings>>,
    /// By queue: its thread.
    thread_of: Vec<usize>,
}

impl QueueThreads {
    /// `thread_of` has a valid entry for each queue of the device.
    pub(crate) fn new(threads: Vec<Arc<dyn Rings>>, thread_of: Vec<usize>) -> Self {
        QueueThreads { threads, thread_of }
    }

    /// Starts the threads.
    pub(crate) fn spawn(&self) -> Result<(), HostError> {
        for (at, thread) in self.threads.iter().enumerate() {
            let first = self.thread_of.iter().position(|of| *of == at).unwrap_or(0);
            let thread = Arc::clone(thread);
            spawn(format!("queue-{first}"), STACK, move || thread.run())?;
        }
        Ok(())
    }

    /// Number of queues.
    pub(crate) fn queue_count(&self) -> usize {
        self.thread_of.len()
    }

    pub(crate) fn start(&self, queue: Queue) -> Result<(), ThreadStuck> {
        let index = queue.index();
        self.of(index).start(queue).map_err(stuck(index))
    }

    /// Asks a queue to stop; its base comes when it is drained.
    pub(crate) fn stop(&self, queue: QueueIndex) -> Result<Receiver<u16>, ThreadStuck> {
        let (base, answer) = channel();
        self.of(queue).stop(queue, base).map_err(stuck(queue))?;
        Ok(answer)
    }

    pub(crate) fn set_event(
        &self,
        queue: QueueIndex,
        which: RingEvent,
        fd: Option<OwnedFd>,
    ) -> Result<(), ThreadStuck> {
        let thread = self.of(queue);
        thread.set_event(queue, which, fd).map_err(stuck(queue))
    }

    /// Gives all running queues their new memory.
    pub(crate) fn set_memory(
        &self,
        memory: &Arc<Memory>,
        layouts: &[(QueueIndex, Option<RingLayout>)],
    ) -> Result<(), ThreadStuck> {
        for &(queue, layout) in layouts {
            let thread = self.of(queue);
            thread
                .set_memory(queue, layout, memory)
                .map_err(stuck(queue))?;
        }
        Ok(())
    }

    fn of(&self, queue: QueueIndex) -> &dyn Rings {
        &*self.threads[self.thread_of[usize::from(queue.get())]]
    }
}

impl fmt::Debug for QueueThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueThreads")
            .field("thread_of", &self.thread_of)
            .finish_non_exhaustive()
    }
}

fn stuck(queue: QueueIndex) -> impl FnOnce(Stuck) -> ThreadStuck {
    move |Stuck| ThreadStuck { queue }
}
