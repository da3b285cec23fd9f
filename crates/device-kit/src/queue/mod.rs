//! A virtqueue as a device sees it: requests are taken, answered, and nothing else.
//!
//! ```text
//!   guest          pop()            complete()
//!   available ───────────► in flight ───────────► used ──► call eventfd
//!       ▲                    │
//!       └─── unpop() ────────┘
//! ```
//!
//! A [`Queue`] belongs to one queue thread; nothing of it is locked. Order rules:
//! - a chain is in the in-flight record before the device can act on it, and leaves it only after
//!   the guest can see the answer;
//! - answers of one batch become visible to the guest at once, by one store of the used index;
//! - the call eventfd is signalled after the answers are visible, once per turn of the thread.
//!
//! The ring code is this crate's own, on `virtio-queue`'s descriptor types: that crate publishes
//! answers one by one (a driver that merges receive buffers must see all of a packet), cannot take
//! up a chain by its head again, and does not say what is wrong with a ring. Split rings only.

mod chain;
mod error;
mod inflight;

use std::collections::VecDeque;
use std::fmt;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use self::chain::Table;
pub use self::chain::{Chain, MAX_BUFFERS};
pub use self::error::{QueueError, QueueFault};
pub use self::inflight::Kept;
pub(crate) use self::inflight::{InflightError, InflightFile, InflightQueue};
use crate::memory::Memory;
use crate::metrics::QueueMetrics;

/// Number of a virtqueue within its device, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueIndex(u16);

impl QueueIndex {
    /// The queue with this number.
    pub const fn new(index: u16) -> Self {
        QueueIndex(index)
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for QueueIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a split ring lies in guest memory, and how it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingLayout {
    /// Entries: a power of two.
    pub(crate) size: u16,
    pub(crate) descriptors: GuestAddress,
    pub(crate) available: GuestAddress,
    pub(crate) used: GuestAddress,
    /// VIRTIO_F_RING_EVENT_IDX was accepted.
    pub(crate) event_idx: bool,
    /// VIRTIO_F_RING_INDIRECT_DESC was accepted.
    pub(crate) indirect: bool,
}

/// A virtqueue that is being served.
#[derive(Debug)]
pub struct Queue {
    index: QueueIndex,
    layout: RingLayout,
    memory: Arc<Memory>,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// The used index when the guest was last considered for a call.
    called_at: Wrapping<u16>,
    /// By head: taken and not yet answered.
    taken: Vec<bool>,
    in_flight: u16,
    /// Heads that a predecessor of this process took and did not answer.
    left_over: VecDeque<u16>,
    record: Option<InflightQueue>,
    /// Chains that may still be taken in this turn of the queue thread.
    budget: u16,
    /// `pop` said that there is nothing because of the budget alone.
    cut_short: bool,
    metrics: QueueMetrics,
}

impl Queue {
    /// Starts to serve a ring. `base` is the index of the next chain to be taken; the used index
    /// is read from guest memory. With an in-flight record, both follow from it.
    pub(crate) fn start(
        index: QueueIndex,
        layout: RingLayout,
        base: u16,
        memory: Arc<Memory>,
        record: Option<InflightQueue>,
        metrics: QueueMetrics,
    ) -> Result<Self, QueueError> {
        let mut queue = Queue {
            index,
            layout,
            memory,
            next_available: Wrapping(base),
            next_used: Wrapping(0),
            called_at: Wrapping(0),
            taken: vec![false; usize::from(layout.size)],
            in_flight: 0,
            left_over: VecDeque::new(),
            record,
            budget: 0,
            cut_short: false,
            metrics,
        };
        queue.check_layout()?;
        let used: u16 = queue.load(queue.layout.used.0 + 2)?;
        queue.next_used = Wrapping(used);
        queue.called_at = queue.next_used;
        if let Some(recovered) = queue
            .record
            .as_mut()
            .and_then(|record| record.recover(used))
        {
            // Nothing was answered since, so the guest's next chain follows those in flight. The
            // front-end cannot know this number when the process before this one died.
            let count = u16::try_from(recovered.heads.len()).unwrap_or(layout.size);
            queue.next_available = queue.next_used + Wrapping(count);
            queue.left_over = recovered.heads.into();
        }
        Ok(queue)
    }

    /// Its number.
    pub fn index(&self) -> QueueIndex {
        self.index
    }

    /// Entries of its ring.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Guest memory, as its ring sees it now.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Its counters; the device adds bytes and failed requests.
    pub fn metrics(&self) -> &QueueMetrics {
        &self.metrics
    }

    /// Requests taken and not yet answered.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// An error of this queue; for requests that the device cannot make sense of.
    pub fn error(&self, fault: QueueFault) -> QueueError {
        QueueError {
            queue: self.index,
            fault,
        }
    }

    /// Takes the next request into `chain`; false when there is none now.
    ///
    /// It also says false after a ring's worth of requests in one turn, so that a guest that never
    /// pauses cannot keep the thread from its other work; the thread comes back at once.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.budget == 0 {
            self.cut_short = true;
            return Ok(false);
        }
        if let Some(head) = self.left_over.front().copied() {
            self.take(head, chain)?;
            self.left_over.pop_front();
            return Ok(true);
        }
        let Some(head) = self.peek()? else {
            return Ok(false);
        };
        self.take(head, chain)?;
        self.next_available += 1;
        Ok(true)
    }

    /// Puts back the request that was taken last: the next `pop` takes it again. (In the record
    /// it stays in flight, which says the same to a successor.)
    pub fn unpop(&mut self, chain: &mut Chain) {
        let head = chain.head();
        chain.clear();
        if std::mem::replace(&mut self.taken[usize::from(head)], false) {
            self.in_flight -= 1;
            self.budget += 1;
            self.left_over.push_front(head);
        }
    }

    /// Answers one request, of which `written` bytes were written from the start of its writable
    /// part. The chain lets go of guest memory.
    pub fn complete(&mut self, chain: &mut Chain, written: u32) -> Result<(), QueueError> {
        let head = chain.head();
        chain.clear();
        self.answer(&[(head, written)])
    }

    /// Gives up a request that cannot even be refused. The guest gets no answer; whoever calls
    /// this reports the queue's error, which ends its service.
    pub fn abandon(&mut self, chain: &mut Chain) {
        self.release(chain.head());
        chain.clear();
    }

    fn release(&mut self, head: u16) {
        if std::mem::replace(&mut self.taken[usize::from(head)], false) {
            self.in_flight -= 1;
        }
    }

    /// Answers several requests at once: the guest sees all of them or none. Each is the head of
    /// a chain and the bytes written to it.
    pub fn answer(&mut self, batch: &[(u16, u32)]) -> Result<(), QueueError> {
        let published = self.publish(batch);
        // Answered or not, the device is done with them. What could not be answered stays in the
        // in-flight record.
        for (head, _) in batch {
            self.release(*head);
        }
        self.metrics.requests.inc_by(batch.len() as u64);
        published
    }

    fn publish(&mut self, batch: &[(u16, u32)]) -> Result<(), QueueError> {
        for (offset, (head, written)) in (0u16..).zip(batch) {
            let slot = u64::from((self.next_used + Wrapping(offset)).0 % self.layout.size);
            let address = self.layout.used.0 + 4 + 8 * slot;
            // struct virtq_used_elem: le32 id, le32 len.
            let element = u64::from(*head) | u64::from(*written) << 32;
            self.memory
                .guest()
                .write_obj(element.to_le(), GuestAddress(address))
                .map_err(|_| self.error(QueueFault::RingMemory { address }))?;
        }
        let heads = || batch.iter().map(|(head, _)| *head);
        if let Some(record) = &mut self.record {
            record.answering(heads());
        }
        let count = u16::try_from(batch.len()).unwrap_or(self.layout.size);
        let used = self.next_used + Wrapping(count);
        self.store(self.layout.used.0 + 2, used.0)?;
        self.next_used = used;
        if let Some(record) = &mut self.record {
            record.answered(heads(), used.0);
        }
        Ok(())
    }

    /// The next head of the available ring, if there is one.
    fn peek(&self) -> Result<Option<u16>, QueueError> {
        let available = Wrapping(self.load(self.layout.available.0 + 2)?);
        if available == self.next_available {
            return Ok(None);
        }
        // The entries behind the index are read after it.
        fence(Ordering::Acquire);
        if (available - self.next_available).0 > self.layout.size {
            return Err(self.error(QueueFault::AvailableIndex {
                available: available.0,
                next: self.next_available.0,
                size: self.layout.size,
            }));
        }
        let slot = u64::from(self.next_available.0 % self.layout.size);
        self.load(self.layout.available.0 + 4 + 2 * slot).map(Some)
    }

    fn take(&mut self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        let table = Table {
            address: self.layout.descriptors,
            size: self.layout.size,
        };
        match self.taken.get(usize::from(head)) {
            Some(false) => {}
            Some(true) => return Err(self.error(QueueFault::HeadInFlight { head })),
            None => {
                return Err(self.error(QueueFault::DescriptorIndex {
                    index: head,
                    size: self.layout.size,
                }));
            }
        }
        chain
            .fill(&self.memory, table, head, self.layout.indirect)
            .map_err(|fault| self.error(fault))?;
        if let Some(record) = &mut self.record {
            record.taken(head);
        }
        self.taken[usize::from(head)] = true;
        self.in_flight += 1;
        self.budget -= 1;
        Ok(())
    }

    fn check_layout(&self) -> Result<(), QueueError> {
        let size = u64::from(self.layout.size);
        let parts = [
            (self.layout.descriptors, 16 * size, 16),
            (self.layout.available, 6 + 2 * size, 2),
            (self.layout.used, 6 + 8 * size, 4),
        ];
        for (start, len, align) in parts {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let whole = GuestMemoryBackend::check_range(self.memory.guest(), start, len);
            if !whole || !start.0.is_multiple_of(align) {
                return Err(self.error(QueueFault::RingMemory { address: start.0 }));
            }
        }
        Ok(())
    }

    fn load(&self, address: u64) -> Result<u16, QueueError> {
        self.memory
            .guest()
            .load(GuestAddress(address), Ordering::Acquire)
            .map(u16::from_le)
            .map_err(|_| self.error(QueueFault::RingMemory { address }))
    }

    fn store(&self, address: u64, value: u16) -> Result<(), QueueError> {
        self.memory
            .guest()
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .map_err(|_| self.error(QueueFault::RingMemory { address }))
    }
}

/// What the queue thread does around the device's work.
impl Queue {
    /// Begins a turn.
    pub(crate) fn refill_budget(&mut self) {
        self.budget = self.layout.size;
        self.cut_short = false;
    }

    /// Whether the turn ended because the budget did.
    pub(crate) fn out_of_budget(&self) -> bool {
        self.budget == 0 || self.cut_short
    }

    /// Asks the guest not to kick while the ring is being looked at.
    pub(crate) fn disable_kicks(&mut self) -> Result<(), QueueError> {
        if self.layout.event_idx {
            return Ok(());
        }
        const NO_NOTIFY: u16 = 1;
        self.store(self.layout.used.0, NO_NOTIFY)
    }

    /// Asks the guest to kick at the next request, and says whether one came already.
    pub(crate) fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        Ok(self.wish_for_kick()? || !self.left_over.is_empty())
    }

    /// As [`Self::enable_kicks`], where what was put back is no reason to look again, unless the
    /// budget kept the device from seeing all that there is.
    pub(crate) fn enable_kicks_for_more(&mut self) -> Result<bool, QueueError> {
        Ok(self.wish_for_kick()? || self.cut_short)
    }

    fn wish_for_kick(&mut self) -> Result<bool, QueueError> {
        if self.layout.event_idx {
            let avail_event = self.layout.used.0 + 4 + 8 * u64::from(self.layout.size);
            self.store(avail_event, self.next_available.0)?;
        } else {
            self.store(self.layout.used.0, 0)?;
        }
        // The wish is visible before the index is read, or a request between the two is lost.
        fence(Ordering::SeqCst);
        Ok(self.peek()?.is_some())
    }

    /// Whether the guest is to be called for what was answered since the last time.
    pub(crate) fn wants_call(&mut self) -> Result<bool, QueueError> {
        let before = std::mem::replace(&mut self.called_at, self.next_used);
        if before == self.next_used {
            return Ok(false);
        }
        // The used index is visible before the wish is read, or the guest sleeps on an answer.
        fence(Ordering::SeqCst);
        if self.layout.event_idx {
            let wish = Wrapping(self.load(self.used_event())?);
            Ok(self.next_used - wish - Wrapping(1) < self.next_used - before)
        } else {
            self.takes_calls()
        }
    }

    /// Whether the guest may wait for a call that was lost: it has not been seen to look at all
    /// that was answered.
    pub(crate) fn owes_call(&self) -> Result<bool, QueueError> {
        if self.layout.event_idx {
            Ok(Wrapping(self.load(self.used_event())?) != self.next_used)
        } else {
            self.takes_calls()
        }
    }

    /// Without EVENT_IDX: whether the guest wants calls at all.
    fn takes_calls(&self) -> Result<bool, QueueError> {
        const NO_INTERRUPT: u16 = 1;
        Ok(self.load(self.layout.available.0)? & NO_INTERRUPT == 0)
    }

    /// Where the guest says after which answer it wants to be called.
    fn used_event(&self) -> u64 {
        self.layout.available.0 + 4 + 2 * u64::from(self.layout.size)
    }

    /// Takes over a new memory table; the ring's own addresses stay.
    pub(crate) fn set_memory(
        &mut self,
        layout: RingLayout,
        memory: Arc<Memory>,
    ) -> Result<(), QueueError> {
        self.layout = layout;
        self.memory = memory;
        self.check_layout()
    }

    /// The error of a ring whose memory was taken away.
    pub(crate) fn lost(&self) -> QueueError {
        self.error(QueueFault::RingMemory {
            address: self.layout.descriptors.0,
        })
    }

    /// The index of the next chain to be taken, which GET_VRING_BASE answers.
    pub(crate) fn base(&self) -> u16 {
        // Chains that were left over and not taken up count as not taken.
        let left = u16::try_from(self.left_over.len()).unwrap_or(0);
        (self.next_available - Wrapping(left)).0
    }
}

#[cfg(test)]
pub(crate) mod tests;
