//! Packets from the tap to the guest.
//!
//! Each packet is read once, straight into the guest's buffers. How large the next packet is,
//! nobody tells; so the read ends in private memory, which takes what the gathered buffers have no
//! room for:
//!
//! ```text
//!   lead (private)      buffers gathered from the ring         spill (private)
//!   ┌────────────────┬───────────────────────────────────────┬───────────────────┐
//!   │ both headers   │ the packet's body, in place           │ rarely anything   │
//!   └────────────────┴───────────────────────────────────────┴───────────────────┘
//! ```
//!
//! The headers are checked and completed in private memory and written to the first buffer last.
//! As many buffers are gathered as packets lately needed, so that a stream of large packets lands
//! in place, and small packets do not gather buffers in vain. What was spilled is copied to more
//! buffers. A packet for which the ring has too few is kept in private memory, whole, and holds up
//! those behind it until the guest gives more; only one that the whole ring cannot hold is dropped.
//! Nothing is read from the tap while the guest has no buffer at all: packets wait there.
//!
//! Buffers that are gathered and not used go back to the ring at the end of each turn, so that a
//! ring that stops has nothing in flight.
#![expect(unsafe_code, reason = "reads from the tap into guest memory")]

use std::cell::Cell;
use std::collections::VecDeque;

use device_kit::{Chain, HostError, Progress, Queue, QueueError, QueueFault, WorkerError};

use crate::metrics::{QueueMetrics, Reason};
use crate::packet::{HEADER_LEN, LEAD_LEN, Lead, MAX_FRAME, set_buffers};
use crate::shared::View;
use crate::tap::{TapQueue, Transfer};

/// Answers are shown to the guest after so many at the latest.
const BATCH: usize = 64;
/// Most vectors of one read; the last one is the spill's.
const MAX_VECTORS: usize = 1024;

/// The receive side of a queue pair.
#[derive(Debug)]
pub(crate) struct Receiver {
    /// The tap may have a packet.
    readable: bool,
    /// It had none in this turn, and there are buffers: it is to be waited for.
    wants: Cell<bool>,
    /// Taken from the ring, in its order.
    gathered: VecDeque<Chain>,
    /// Sum of the gathered buffers, in bytes.
    room: usize,
    /// To be filled again.
    spare: Vec<Chain>,
    /// Bytes that the next packet is expected to have.
    expected: usize,
    lead: [u8; LEAD_LEN],
    vectors: Vec<libc::iovec>,
    spill: Box<[u8]>,
    /// Length of a packet that waits for buffers: its lead in `lead`, the rest in `spill`.
    waiting: Option<usize>,
    answers: Vec<(u16, u32)>,
    metrics: QueueMetrics,
}

// SAFETY: `vectors` is scratch space: its addresses are used only in the call that collects them.
unsafe impl Send for Receiver {}

impl Receiver {
    pub(crate) fn new(metrics: QueueMetrics) -> Receiver {
        Receiver {
            readable: true,
            wants: Cell::new(false),
            gathered: VecDeque::new(),
            room: 0,
            spare: Vec::new(),
            expected: 1,
            lead: [0; LEAD_LEN],
            vectors: Vec::new(),
            spill: vec![0; HEADER_LEN + MAX_FRAME].into_boxed_slice(),
            waiting: None,
            answers: Vec::with_capacity(BATCH),
            metrics,
        }
    }

    /// Whether the tap is to be waited for; asked once a turn, and no longer true afterwards: a
    /// ring that is not served any more must not have its tap watched.
    pub(crate) fn take_wants(&self) -> bool {
        self.wants.replace(false)
    }

    /// The tap has a packet.
    pub(crate) fn set_readable(&mut self) {
        self.readable = true;
    }

    /// The driver takes other packets from now on, of another form maybe.
    pub(crate) fn drop_waiting(&mut self) {
        if self.waiting.take().is_some() {
            self.metrics.dropped(Reason::Stale);
        }
    }

    /// Moves packets until there are none or no buffers.
    pub(crate) fn process(
        &mut self,
        queue: &mut Queue,
        tap: &TapQueue,
        view: &View,
    ) -> Result<Progress, WorkerError> {
        let result = self.turn(queue, tap, view);
        self.put_back(queue);
        self.show_answers(queue)?;
        result
    }

    fn turn(
        &mut self,
        queue: &mut Queue,
        tap: &TapQueue,
        view: &View,
    ) -> Result<Progress, WorkerError> {
        loop {
            if let Some(len) = self.waiting {
                self.gather(queue, len)?;
                if self.room < len && !self.has_all(queue) {
                    return Ok(Progress::Short);
                }
                self.waiting = None;
                self.deliver(queue, view, len, lead_len(view))?;
                continue;
            }
            // One at least is looked at also when there is no packet, so that it is known whether
            // to wait for one, and so that a broken ring is found when the guest kicks.
            let expected = self.readable && view.mergeable;
            self.gather(queue, if expected { self.expected } else { 1 })?;
            if self.gathered.is_empty() {
                return Ok(Progress::Emptied);
            }
            if !self.readable {
                self.wants.set(true);
                return Ok(Progress::Held);
            }
            let in_place_end = self.collect_vectors(lead_len(view));
            match self.read(tap)? {
                Transfer::Done(len) => {
                    self.mark_in_place(queue, lead_len(view), len.min(in_place_end))?;
                    self.received(queue, view, len, in_place_end)?;
                }
                Transfer::Refused => {
                    self.mark_in_place(queue, lead_len(view), in_place_end)?;
                    self.metrics.dropped(Reason::Refused);
                }
                Transfer::WouldBlock => self.readable = false,
            }
        }
    }

    /// Takes buffers from the ring until there is room for `wanted` bytes, or there are no more.
    fn gather(&mut self, queue: &mut Queue, wanted: usize) -> Result<(), QueueError> {
        while self.room < wanted {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop(&mut chain)? {
                self.spare.push(chain);
                break;
            }
            if chain.writable_len() == 0 {
                let head = chain.head();
                queue.abandon(&mut chain);
                return Err(queue.error(QueueFault::Request {
                    head,
                    reason: "a receive buffer that cannot be written",
                }));
            }
            self.room += chain.writable_len();
            self.gathered.push_back(chain);
        }
        Ok(())
    }

    /// Lists where the next packet goes: its lead, the gathered buffers behind the lead's place in
    /// them, the spill. Returns where in the packet the spill begins.
    fn collect_vectors(&mut self, lead_len: usize) -> usize {
        self.vectors.clear();
        self.vectors.push(vector(&mut self.lead[..lead_len]));
        let mut lead_left = lead_len;
        let mut end = lead_len;
        for chain in &self.gathered {
            let before = self.vectors.len();
            let from = lead_left.min(chain.writable_len());
            let len = chain.writable_len() - from;
            lead_left -= from;
            let listed = chain.writable_vectors(from, len, &mut self.vectors);
            // A guest that cuts its buffers into crumbs has them filled from private memory.
            if listed.is_err() || self.vectors.len() >= MAX_VECTORS {
                self.vectors.truncate(before);
                break;
            }
            end += len;
        }
        self.vectors.push(vector(&mut self.spill));
        end
    }

    /// Reads one packet to where the vectors say.
    fn read(&mut self, tap: &TapQueue) -> Result<Transfer, HostError> {
        // SAFETY: the first and the last vector are this value's own memory, which nothing else
        // uses meanwhile; the others are guest memory, mapped as long as the gathered chains live.
        unsafe { tap.read(&self.vectors) }
            .map_err(|error| HostError::new("the tap gives no packet any more", error))
    }

    /// Puts a packet of `len` bytes on its way to the guest, if the guest can take it.
    fn received(
        &mut self,
        queue: &mut Queue,
        view: &View,
        len: usize,
        in_place_end: usize,
    ) -> Result<(), QueueError> {
        let lead_end = len.min(lead_len(view));
        let Some(mut lead) = Lead::new(&mut self.lead[..lead_end], view.header_len) else {
            self.metrics.dropped(Reason::Runt);
            return Ok(());
        };
        if !lead.fit_to(view.offloads) {
            self.metrics.dropped(Reason::Offload);
            return Ok(());
        }
        if !view.filter.wants(&lead, view.vlan_filter) {
            self.metrics.dropped(Reason::Filtered);
            return Ok(());
        }
        if view.mergeable {
            self.expected = len.max(self.expected - self.expected / 16);
            self.gather(queue, len)?;
        }
        if view.mergeable && self.room < len && !self.has_all(queue) {
            return self.keep(queue, len, lead_end, in_place_end);
        }
        self.deliver(queue, view, len, in_place_end)
    }

    /// Whether the guest has nothing more to give.
    fn has_all(&self, queue: &Queue) -> bool {
        self.gathered.len() >= usize::from(queue.size())
    }

    /// Moves what of the packet is in the gathered buffers in front of what was spilled.
    fn keep(
        &mut self,
        queue: &Queue,
        len: usize,
        lead_end: usize,
        in_place_end: usize,
    ) -> Result<(), QueueError> {
        let in_place = len.min(in_place_end) - lead_end;
        let spilled = len.saturating_sub(in_place_end);
        let mut spill = std::mem::take(&mut self.spill);
        spill.copy_within(..spilled, in_place);
        let mut done = 0;
        let read = self.each_part(lead_end, lead_end + in_place, |chain, from, len| {
            let part = &mut spill[done..done + len];
            done += len;
            chain.read_back(from, part)
        });
        self.spill = spill;
        self.waiting = Some(len);
        read.map_err(|fault| queue.error(fault))
    }

    /// Writes to the gathered buffers what of a packet of `len` bytes is in private memory, its
    /// lead and all from `spilled_from` on, and shows them to the guest.
    fn deliver(
        &mut self,
        queue: &mut Queue,
        view: &View,
        len: usize,
        spilled_from: usize,
    ) -> Result<(), QueueError> {
        if self.room < len {
            self.metrics.dropped(Reason::Size);
            return Ok(());
        }
        let lead_end = len.min(lead_len(view));
        let buffers = self.buffers_for(len);
        set_buffers(&mut self.lead, view.header_len, buffers);
        self.write(queue, 0, &self.lead[..lead_end])?;
        if len > spilled_from {
            self.write(queue, spilled_from, &self.spill[..len - spilled_from])?;
        }
        self.metrics.passed(len - view.header_len);
        queue.metrics().bytes_to_guest.inc_by(len as u64);
        self.hand_over(queue, len)
    }

    /// How many of the gathered buffers hold `len` bytes.
    fn buffers_for(&self, len: usize) -> u16 {
        let mut left = len;
        let mut buffers = 0;
        for chain in &self.gathered {
            if left == 0 {
                break;
            }
            left = left.saturating_sub(chain.writable_len());
            buffers += 1;
        }
        buffers
    }

    /// Writes to the gathered buffers, as if they were one.
    fn write(&self, queue: &Queue, offset: usize, data: &[u8]) -> Result<(), QueueError> {
        let mut done = 0;
        self.each_part(offset, offset + data.len(), |chain, from, len| {
            let part = &data[done..done + len];
            done += len;
            chain.write(from, part)
        })
        .map_err(|fault| queue.error(fault))
    }

    /// Tells the dirty log that the tap wrote these bytes of the gathered buffers.
    fn mark_in_place(&self, queue: &Queue, from: usize, to: usize) -> Result<(), QueueError> {
        self.each_part(from, to, Chain::mark_written)
            .map_err(|fault| queue.error(fault))
    }

    /// Calls `act` with each buffer that holds bytes `from` to `to` of the packet, the offset of
    /// the first of them in it and their number.
    fn each_part(
        &self,
        from: usize,
        to: usize,
        mut act: impl FnMut(&Chain, usize, usize) -> Result<(), QueueFault>,
    ) -> Result<(), QueueFault> {
        let mut start = 0;
        for chain in &self.gathered {
            let end = start + chain.writable_len();
            let (first, last) = (from.max(start), to.min(end));
            if first < last {
                act(chain, first - start, last - first)?;
            }
            start = end;
        }
        Ok(())
    }

    /// Answers the buffers that hold the packet; all of them are shown to the guest at once.
    fn hand_over(&mut self, queue: &mut Queue, len: usize) -> Result<(), QueueError> {
        let mut left = len;
        while left > 0 {
            let Some(chain) = self.gathered.pop_front() else {
                break;
            };
            self.room -= chain.writable_len();
            let used = left.min(chain.writable_len());
            left -= used;
            // A packet is at most MAX_FRAME and its header.
            self.answers
                .push((chain.head(), u32::try_from(used).unwrap_or(0)));
            self.spare.push(chain);
        }
        if self.answers.len() >= BATCH {
            self.show_answers(queue)?;
        }
        Ok(())
    }

    fn show_answers(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        if self.answers.is_empty() {
            return Ok(());
        }
        let shown = queue.answer(&self.answers);
        self.answers.clear();
        // Chains that were answered hold on to guest memory until they are dropped.
        self.spare.clear();
        shown
    }

    /// Returns the buffers that were not used to the ring, the last one first.
    fn put_back(&mut self, queue: &mut Queue) {
        while let Some(mut chain) = self.gathered.pop_back() {
            queue.unpop(&mut chain);
            self.spare.push(chain);
        }
        self.room = 0;
    }
}

/// Bytes that every packet has in private memory first: both headers and a VLAN tag.
fn lead_len(view: &View) -> usize {
    LEAD_LEN - HEADER_LEN + view.header_len
}

fn vector(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}
