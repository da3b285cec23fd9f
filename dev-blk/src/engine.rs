//! The engine of one queue: requests become io_uring operations on guest memory itself, and their
//! completions become answers.
//!
//! All requests that a kick made available are started by one system call, and those that end at
//! once, from the page cache, are answered in the same turn. A request has a slot from `pop` to
//! its answer; the slot holds its chain, which keeps guest memory mapped, and the vectors that the
//! kernel works on. There are as many slots as a ring can have requests.
#![expect(unsafe_code, reason = "the kernel works on guest memory in place")]

use std::os::fd::AsFd;
use std::sync::Arc;

use device_kit::{
    Chain, HostError, Interest, Progress, Queue, QueueFault, QueueIndex, Queues, Source, Worker,
    WorkerError,
};

use crate::device::Shared;
use crate::request::{self, HEADER_LEN, Request, Status};
use crate::uring::{Completion, Operation, Uring};

/// The one descriptor that is waited for: the instance, readable when operations have ended.
const COMPLETIONS: Source = Source(0);

/// A request under way.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    request: Request,
    /// What is still to be read or written.
    vectors: Vec<libc::iovec>,
    /// Bytes of the data that were moved.
    done: usize,
}

// SAFETY: the vectors point into guest memory that `chain`, which is Send, keeps mapped.
unsafe impl Send for Slot {}

/// The worker of one queue.
pub(crate) struct Engine {
    queue: QueueIndex,
    ring: Uring,
    slots: Vec<Slot>,
    free: Vec<usize>,
    shared: Arc<Shared>,
}

impl Engine {
    /// An engine for requests of `queue`, of which `depth` can be under way.
    pub(crate) fn new(queue: QueueIndex, depth: u16, ring: Uring, shared: Arc<Shared>) -> Self {
        let slot = || Slot {
            chain: Chain::default(),
            request: Request::Answer(Status::IoError),
            vectors: Vec::new(),
            done: 0,
        };
        let depth = usize::from(depth);
        Engine {
            queue,
            ring,
            slots: (0..depth).map(|_| slot()).collect(),
            free: (0..depth).rev().collect(),
            shared,
        }
    }

    /// Starts the request in a slot, or answers it when there is nothing to be done.
    fn begin(&mut self, at: usize, queue: &mut Queue) -> Result<(), WorkerError> {
        let slot = &mut self.slots[at];
        let (operation, request) = match request::parse(&slot.chain, &self.shared.image) {
            Ok(parsed) => parsed,
            Err(fault) => return Err(self.give_up(at, queue, fault)),
        };
        self.shared.metrics.count(operation);
        slot.request = request;
        slot.done = 0;
        slot.vectors.clear();
        let prepared = match request {
            Request::Read { len, .. } => slot.chain.writable_vectors(0, len, &mut slot.vectors),
            Request::Write { len, .. } => {
                slot.chain
                    .readable_vectors(HEADER_LEN, len, &mut slot.vectors)
            }
            _ => Ok(()),
        };
        if let Err(fault) = prepared {
            return Err(self.give_up(at, queue, fault));
        }
        match request {
            Request::Answer(status) => self.answer(at, status, 0, queue),
            Request::GetId => self.tell_id(at, queue),
            // No data: nothing to be moved.
            Request::Read { len: 0, .. } | Request::Write { len: 0, .. } => {
                self.answer(at, Status::Ok, 0, queue)
            }
            _ => Ok(self.push(at)?),
        }
    }

    /// Hands what is left of a request to the kernel.
    fn push(&mut self, at: usize) -> Result<(), HostError> {
        let slot = &self.slots[at];
        let done = slot.done as u64;
        let operation = match slot.request {
            Request::Read { offset, .. } => Operation::Read {
                vectors: &slot.vectors,
                offset: offset + done,
            },
            Request::Write { offset, .. } => Operation::Write {
                vectors: &slot.vectors,
                offset: offset + done,
                through: !self.shared.writeback(),
            },
            Request::Fallocate { mode, offset, len } => Operation::Fallocate { mode, offset, len },
            Request::Flush | Request::GetId | Request::Answer(_) => Operation::Flush,
        };
        // SAFETY: the slot is neither reused nor changed before its completion was taken; its
        // chain keeps the guest memory mapped that the vectors point to. A thread that ends with
        // operations under way takes the process with it, and the kernel ends them first.
        unsafe { self.ring.push(operation, at as u64) }
    }

    /// Takes everything that has ended. The first thing that goes wrong is reported when all of it
    /// was taken.
    fn reap(&mut self, queue: &mut Queue) -> Result<(), WorkerError> {
        let mut outcome = Ok(());
        while let Some(completion) = self.ring.completion() {
            let ended = self.end(completion, queue);
            outcome = outcome.and(ended);
        }
        outcome
    }

    fn end(&mut self, completion: Completion, queue: &mut Queue) -> Result<(), WorkerError> {
        let known = usize::try_from(completion.tag)
            .ok()
            .filter(|at| *at < self.slots.len());
        let Some(at) = known else {
            return Ok(());
        };
        let slot = &mut self.slots[at];
        let Ok(moved) = usize::try_from(completion.result) else {
            return self.end_failed(at, -completion.result, queue);
        };
        let (Request::Read { len, .. } | Request::Write { len, .. }) = slot.request else {
            return self.answer(at, Status::Ok, 0, queue);
        };
        slot.done += moved;
        advance(&mut slot.vectors, moved);
        if slot.done < len && moved > 0 {
            // The kernel stopped half-way, as it may; the rest follows.
            return Ok(self.push(at)?);
        }
        // An image that became shorter has no more to give.
        let status = if slot.done == len {
            Status::Ok
        } else {
            Status::IoError
        };
        let done = slot.done;
        self.answer(at, status, done, queue)
    }

    fn end_failed(&mut self, at: usize, errno: i32, queue: &mut Queue) -> Result<(), WorkerError> {
        let slot = &self.slots[at];
        if errno == libc::EINTR || errno == libc::EAGAIN {
            return Ok(self.push(at)?);
        }
        let status = match (slot.request, errno) {
            (Request::Fallocate { .. }, libc::EOPNOTSUPP) => Status::Unsupported,
            _ => {
                self.shared.metrics.host_errors.inc();
                let error = std::io::Error::from_raw_os_error(errno);
                tracing::warn!(queue = %self.queue, request = ?slot.request, %error, "I/O failed");
                let what = format_args!("{:?} on the image failed: {error}", slot.request);
                self.shared.health.error(&what);
                Status::IoError
            }
        };
        let done = slot.done;
        self.answer(at, status, done, queue)
    }

    fn tell_id(&mut self, at: usize, queue: &mut Queue) -> Result<(), WorkerError> {
        let chain = &self.slots[at].chain;
        let id = self.shared.serial.0;
        let len = id.len().min(chain.writable_len() - 1);
        if let Err(fault) = chain.write(0, &id[..len]) {
            return Err(self.give_up(at, queue, fault));
        }
        self.answer(at, Status::Ok, len, queue)
    }

    /// Answers a request, `moved` bytes of whose data were read or written.
    fn answer(
        &mut self,
        at: usize,
        status: Status,
        moved: usize,
        queue: &mut Queue,
    ) -> Result<(), WorkerError> {
        let slot = &self.slots[at];
        let status_at = slot.chain.writable_len() - 1;
        let metrics = queue.metrics();
        let mut marked = Ok(());
        let mut written = 1;
        match slot.request {
            Request::Read { len, .. } => {
                // The kernel may have written more than it says when it failed.
                marked = slot.chain.mark_written(0, len);
                metrics.bytes_to_guest.inc_by(moved as u64);
                written += moved;
            }
            Request::Write { .. } => {
                metrics.bytes_from_guest.inc_by(moved as u64);
            }
            Request::GetId => written += moved,
            _ => {}
        }
        if status != Status::Ok {
            metrics.failed.inc();
        }
        let told = marked.and_then(|()| slot.chain.write(status_at, &[status as u8]));
        let told = told.map_err(|fault| queue.error(fault).into());
        // Used length covers what was written from the start; a status behind a gap is not that,
        // and drivers of block devices do not look at it.
        let used = u32::try_from(written).unwrap_or(u32::MAX);
        self.retire(at, queue, used).and(told)
    }

    /// Ends a request that cannot even be refused.
    fn give_up(&mut self, at: usize, queue: &mut Queue, fault: QueueFault) -> WorkerError {
        queue.abandon(&mut self.slots[at].chain);
        self.free.push(at);
        queue.error(fault).into()
    }

    /// Gives the request back to its ring and frees its slot.
    fn retire(&mut self, at: usize, queue: &mut Queue, used: u32) -> Result<(), WorkerError> {
        let slot = &mut self.slots[at];
        slot.vectors.clear();
        let completed = queue.complete(&mut slot.chain, used);
        self.free.push(at);
        Ok(completed?)
    }
}

/// Takes `moved` bytes off the front of the vectors.
fn advance(vectors: &mut Vec<libc::iovec>, moved: usize) {
    let mut left = moved;
    let whole = vectors
        .iter()
        .take_while(|vector| {
            let all = vector.iov_len <= left;
            if all {
                left -= vector.iov_len;
            }
            all
        })
        .count();
    vectors.drain(..whole);
    if let Some(first) = vectors.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(left);
        first.iov_len -= left;
    }
}

impl Worker for Engine {
    fn start(&mut self) -> Result<(), HostError> {
        self.ring.enable()
    }

    fn wait_for(&self, interest: &mut Interest<'_>) {
        if self.free.len() < self.slots.len() {
            interest.readable(COMPLETIONS, self.ring.as_fd());
        }
    }

    fn ready(&mut self, _source: Source, queues: &mut Queues<'_>) -> Result<(), WorkerError> {
        match queues.get(self.queue) {
            Some(queue) => {
                let ended = self.reap(queue);
                self.ring.submit()?;
                ended
            }
            None => Ok(()),
        }
    }

    fn process(&mut self, queue: &mut Queue) -> Result<Progress, WorkerError> {
        let mut outcome = Ok(Progress::Emptied);
        while outcome.is_ok() {
            let Some(at) = self.free.pop() else {
                // Completions free slots and bring the thread back here.
                outcome = Ok(Progress::Held);
                break;
            };
            match queue.pop(&mut self.slots[at].chain) {
                Ok(true) => {
                    if let Err(error) = self.begin(at, queue) {
                        outcome = Err(error);
                    }
                }
                Ok(false) => {
                    self.free.push(at);
                    break;
                }
                Err(error) => {
                    self.free.push(at);
                    outcome = Err(error.into());
                }
            }
        }
        // What was taken before something went wrong is carried out all the same.
        self.ring.submit()?;
        self.reap(queue)?;
        self.ring.submit()?;
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_advance_over_their_borders() {
        let vector = |base: usize, len| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(base),
            iov_len: len,
        };
        let rest = |moved| {
            let mut vectors = vec![vector(0x1000, 10), vector(0x2000, 20)];
            advance(&mut vectors, moved);
            vectors
                .iter()
                .map(|v| (v.iov_base.addr(), v.iov_len))
                .collect::<Vec<_>>()
        };
        assert_eq!(rest(0), [(0x1000, 10), (0x2000, 20)]);
        assert_eq!(rest(4), [(0x1004, 6), (0x2000, 20)]);
        assert_eq!(rest(10), [(0x2000, 20)]);
        assert_eq!(rest(29), [(0x2013, 1)]);
        assert_eq!(rest(30), []);
    }
}
