//! Packets from the guest to the tap.
//!
//! Each packet is written once, straight from the guest's buffers, virtio's header included: the
//! kernel checks the header and copies the packet before the call returns. When the tap has no
//! room, the packet goes back to the ring, and the tap is waited for.
#![expect(unsafe_code, reason = "writes guest memory to the tap")]

use std::cell::Cell;

use device_kit::{Chain, HostError, Progress, Queue, QueueError, WorkerError};

use crate::metrics::{QueueMetrics, Reason};
use crate::packet::{ETHERNET_LEN, MAX_FRAME};
use crate::shared::View;
use crate::tap::{TapQueue, Transfer};

/// Answers are shown to the guest after so many at the latest.
const BATCH: usize = 64;

/// The transmit side of a queue pair.
#[derive(Debug)]
pub(crate) struct Transmitter {
    /// The tap may have room.
    writable: bool,
    /// It had none in this turn: it is to be waited for.
    wants: Cell<bool>,
    chain: Chain,
    vectors: Vec<libc::iovec>,
    answers: Vec<(u16, u32)>,
    metrics: QueueMetrics,
}

// SAFETY: `vectors` is scratch space: its addresses are used only in the call that collects them.
unsafe impl Send for Transmitter {}

impl Transmitter {
    pub(crate) fn new(metrics: QueueMetrics) -> Transmitter {
        Transmitter {
            writable: true,
            wants: Cell::new(false),
            chain: Chain::default(),
            vectors: Vec::new(),
            answers: Vec::with_capacity(BATCH),
            metrics,
        }
    }

    /// Whether the tap is to be waited for; asked once a turn, and no longer true afterwards: a
    /// ring that is not served any more must not have its tap watched.
    pub(crate) fn take_wants(&self) -> bool {
        self.wants.replace(false)
    }

    /// The tap has room.
    pub(crate) fn set_writable(&mut self) {
        self.writable = true;
    }

    /// Sends packets until there are none or the tap has no room.
    pub(crate) fn process(
        &mut self,
        queue: &mut Queue,
        tap: &TapQueue,
        view: &View,
    ) -> Result<Progress, WorkerError> {
        let result = self.turn(queue, tap, view);
        if !self.answers.is_empty() {
            self.show_answers(queue)?;
            // It holds on to guest memory until it is dropped.
            self.chain = Chain::default();
        }
        result
    }

    fn turn(
        &mut self,
        queue: &mut Queue,
        tap: &TapQueue,
        view: &View,
    ) -> Result<Progress, WorkerError> {
        loop {
            if !self.writable {
                self.wants.set(true);
                return Ok(Progress::Held);
            }
            if !queue.pop(&mut self.chain)? {
                return Ok(Progress::Emptied);
            }
            let sent = self.send(queue, tap, view);
            if sent.is_err() {
                queue.abandon(&mut self.chain);
            }
            if sent? {
                self.answers.push((self.chain.head(), 0));
                if self.answers.len() == BATCH {
                    self.show_answers(queue)?;
                }
            } else {
                queue.unpop(&mut self.chain);
                self.writable = false;
            }
        }
    }

    /// Sends the packet of the chain, or drops one that cannot be; false when the tap has no room.
    fn send(&mut self, queue: &Queue, tap: &TapQueue, view: &View) -> Result<bool, WorkerError> {
        let len = self.chain.readable_len();
        let dropped = if len < view.header_len + ETHERNET_LEN {
            Some(Reason::Runt)
        } else if len > view.header_len + MAX_FRAME {
            Some(Reason::Size)
        } else {
            None
        };
        if let Some(reason) = dropped {
            self.failed(queue, reason);
            return Ok(true);
        }
        self.vectors.clear();
        self.chain
            .readable_vectors(0, len, &mut self.vectors)
            .map_err(|fault| queue.error(fault))?;
        // SAFETY: guest memory, mapped as long as the chain lives.
        let sent = unsafe { tap.write(&self.vectors) }
            .map_err(|error| HostError::new("the tap takes no packet any more", error))?;
        match sent {
            Transfer::Done(_) => {
                self.metrics.passed(len - view.header_len);
                queue.metrics().bytes_from_guest.inc_by(len as u64);
                Ok(true)
            }
            Transfer::Refused => {
                self.failed(queue, Reason::Refused);
                Ok(true)
            }
            Transfer::WouldBlock => Ok(false),
        }
    }

    fn failed(&self, queue: &Queue, reason: Reason) {
        self.metrics.dropped(reason);
        queue.metrics().failed.inc();
    }

    fn show_answers(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        let shown = queue.answer(&self.answers);
        self.answers.clear();
        shown
    }
}
