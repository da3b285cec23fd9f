//! Serves one queue pair, and the control queue where it falls to it.
//!
//! The driver's number for the control queue depends on whether it accepted MQ, so a queue's role
//! is looked up at each turn and every worker can carry out commands.

use std::os::fd::AsFd;
use std::sync::Arc;

use device_kit::{
    Chain, HostError, Interest, Progress, Queue, QueueError, QueueFault, Queues, Source, Worker,
    WorkerError,
};

use crate::control::{CommandError, MAX_COMMAND};
use crate::metrics::Direction;
use crate::rx::Receiver;
use crate::shared::{Role, Shared, Viewer};
use crate::tap::TapQueue;
use crate::tx::Transmitter;

const TAP_READABLE: Source = Source(0);
const TAP_WRITABLE: Source = Source(1);

/// The worker of one queue pair.
#[derive(Debug)]
pub(crate) struct NetWorker {
    shared: Arc<Shared>,
    viewer: Viewer,
    pair: u16,
    rx: Receiver,
    tx: Transmitter,
    /// The pair's tap queue is claimed, where the front-end has the control queue itself.
    claimed: bool,
    command: Vec<u8>,
    chain: Chain,
}

impl NetWorker {
    pub(crate) fn new(shared: Arc<Shared>, pair: u16) -> NetWorker {
        NetWorker {
            viewer: Viewer::new(&shared),
            pair,
            rx: Receiver::new(shared.metrics().queue(pair, Direction::Rx)),
            tx: Transmitter::new(shared.metrics().queue(pair, Direction::Tx)),
            claimed: false,
            command: Vec::new(),
            chain: Chain::default(),
            shared,
        }
    }

    /// A front-end that keeps the control queue to itself enables the rings of the pairs that are
    /// in use: then a pair is in use when its ring is served.
    fn claim(&mut self) -> Result<(), HostError> {
        if self.claimed || self.viewer.view().control_queue.is_some() {
            return Ok(());
        }
        self.tap().claim().map_err(|error| {
            let tap = self.shared.tap().name();
            let what = format!("queue {} of tap {tap} cannot be attached", self.pair);
            HostError::new(what, error)
        })?;
        self.claimed = true;
        Ok(())
    }

    /// Sees to it that unused pairs are detached, when the first receive buffers are there.
    fn settle(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        if !self.viewer.view().settled && self.pair == 0 && queue.pop(&mut self.chain)? {
            queue.unpop(&mut self.chain);
            self.shared.settle();
            self.refresh();
        }
        Ok(())
    }

    /// Follows what the driver made of the device.
    fn refresh(&mut self) -> bool {
        let changed = self.viewer.refresh(&self.shared);
        if changed {
            self.rx.drop_waiting();
        }
        changed
    }

    fn tap(&self) -> &TapQueue {
        self.shared.tap().queue(self.pair)
    }

    fn control(&mut self, queue: &mut Queue) -> Result<Progress, WorkerError> {
        self.shared.tell_announce();
        while queue.pop(&mut self.chain)? {
            if let Err(fault) = self.answer_command(queue) {
                queue.abandon(&mut self.chain);
                return Err(queue.error(fault).into());
            }
            queue.complete(&mut self.chain, 1)?;
            self.refresh();
        }
        Ok(Progress::Emptied)
    }

    fn answer_command(&mut self, queue: &Queue) -> Result<(), QueueFault> {
        if self.chain.writable_len() == 0 {
            return Err(QueueFault::Request {
                head: self.chain.head(),
                reason: "a command without room for its answer",
            });
        }
        let len = self.chain.readable_len();
        let answer = if len > MAX_COMMAND {
            self.shared.refuse(&CommandError::Size { len })
        } else {
            self.command.resize(len, 0);
            self.chain.read(0, &mut self.command)?;
            self.shared.command(&self.command)
        };
        if answer != crate::control::OK {
            queue.metrics().failed.inc();
        }
        self.chain.write(0, &[answer])
    }
}

impl Worker for NetWorker {
    const ANY_THREAD: bool = true;

    fn start(&mut self) -> Result<(), HostError> {
        Ok(())
    }

    fn wait_for(&self, interest: &mut Interest<'_>) {
        if self.rx.take_wants() {
            interest.readable(TAP_READABLE, self.tap().as_fd());
        }
        if self.tx.take_wants() {
            interest.writable(TAP_WRITABLE, self.tap().as_fd());
        }
    }

    fn ready(&mut self, source: Source, _queues: &mut Queues<'_>) -> Result<(), WorkerError> {
        match source {
            TAP_READABLE => self.rx.set_readable(),
            _ => self.tx.set_writable(),
        }
        Ok(())
    }

    fn process(&mut self, queue: &mut Queue) -> Result<Progress, WorkerError> {
        if self.refresh() {
            self.claimed = false;
        }
        match self.viewer.view().role(queue.index()) {
            Role::Rx => {
                self.claim()?;
                self.settle(queue)?;
                let tap = self.shared.tap().queue(self.pair);
                self.rx.process(queue, tap, self.viewer.view())
            }
            Role::Tx => {
                let tap = self.shared.tap().queue(self.pair);
                self.tx.process(queue, tap, self.viewer.view())
            }
            Role::Control => self.control(queue),
        }
    }
}
