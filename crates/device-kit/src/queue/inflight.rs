//! The in-flight record: which requests were taken and not yet answered, kept where it outlives
//! this process.
//!
//! The front-end holds a file that this process maps (GET_INFLIGHT_FD, SET_INFLIGHT_FD). When the
//! process is killed, the next one finds there which chains it must take up again, and none is
//! lost. The layout and the order of writes are those of vhost-user.rst, "Inflight I/O tracking",
//! split virtqueue, version 1:
//!
//! ```text
//! u64 features; u16 version; u16 desc_num; u16 last_batch_head; u16 used_idx;
//! { u8 inflight; u8 padding[5]; u16 next; u64 counter; } desc[desc_num];
//! ```
//!
//! Taking a chain sets its `counter`, then `inflight`. Answering a batch links its heads through
//! `next`, publishes the used index in the ring, clears every `inflight` of the batch, then stores
//! `used_idx`. If the process dies in between, `used_idx` differs from the ring's index, and the
//! batch that `last_batch_head` begins was answered after all.
//!
//! Behind the queues' parts is room for what else a device keeps ([`Kept`]).
//!
//! Our own file is hostile when it comes back: every index in it is bounded.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

use thiserror::Error;

use super::QueueIndex;
use crate::memory::SharedMapping;

const PAGE: usize = 4096;
/// Bytes of a word that is kept.
const WORD: usize = 8;
const HEADER: usize = 16;
const ENTRY: usize = 16;
/// Each queue's part begins at a multiple of this many bytes.
const ALIGN: usize = 64;
const VERSION: u16 = 1;

/// An in-flight file that cannot be used.
#[derive(Debug, Error)]
pub(crate) enum InflightError {
    /// Written by a program with another layout.
    #[error("in-flight record of queue {queue} has layout version {version}, known is {VERSION}")]
    Version {
        /// The queue.
        queue: QueueIndex,
        /// The version found.
        version: u16,
    },
    /// Made for rings of another size.
    #[error("in-flight record of queue {queue} is for {found} descriptors, the ring has {size}")]
    Size {
        /// The queue.
        queue: QueueIndex,
        /// Descriptors in the record.
        found: u16,
        /// Descriptors in the ring.
        size: u16,
    },
    /// Smaller than the queues need.
    #[error("in-flight file of {len} bytes has no room for queue {queue}")]
    Short {
        /// The queue.
        queue: QueueIndex,
        /// Bytes mapped.
        len: usize,
    },
}

/// The mapped file, for all queues.
#[derive(Clone, Debug)]
pub(crate) struct InflightFile {
    mapping: Arc<SharedMapping>,
    /// Descriptors that each queue's part has room for.
    queue_size: u16,
}

impl InflightFile {
    /// Bytes of a file for `queues` rings of up to `queue_size` entries, and `kept` words.
    pub(crate) fn len(queues: u16, queue_size: u16, kept: usize) -> u64 {
        u64::from(queues) * part_len(queue_size) as u64 + (kept * WORD) as u64
    }

    pub(crate) fn new(mapping: SharedMapping, queue_size: u16) -> Self {
        InflightFile {
            mapping: Arc::new(mapping),
            queue_size,
        }
    }

    /// Has the pages of `queues` queues there: a ring that starts must not wait for them.
    pub(crate) fn touch(&self, queues: u16) {
        let bytes = self.mapping.bytes();
        let end = usize::from(queues) * part_len(self.queue_size);
        for page in bytes[..end.min(bytes.len())].chunks(PAGE) {
            page[0].fetch_or(0, Ordering::Relaxed);
        }
    }

    /// `words` words behind the parts of `queues` queues; `None` in a file that has no room.
    pub(crate) fn kept(&self, queues: u16, words: usize) -> Option<Kept> {
        let start = usize::from(queues) * part_len(self.queue_size);
        let there = self.mapping.bytes().len().checked_sub(start)?;
        (there >= words * WORD).then(|| Kept {
            mapping: Arc::clone(&self.mapping),
            start,
            words,
        })
    }

    /// The part of one queue, whose ring has `size` entries.
    pub(crate) fn queue(
        &self,
        queue: QueueIndex,
        size: u16,
    ) -> Result<InflightQueue, InflightError> {
        let len = self.mapping.bytes().len();
        let part = part_len(self.queue_size);
        let start = usize::from(queue.get()) * part;
        if size > self.queue_size || start + part > len {
            return Err(InflightError::Short { queue, len });
        }
        let record = InflightQueue {
            mapping: Arc::clone(&self.mapping),
            start,
            size,
            counter: 0,
        };
        match record.load_u16(VERSION_AT) {
            0 | VERSION => {}
            version => return Err(InflightError::Version { queue, version }),
        }
        let found = record.load_u16(DESC_NUM_AT);
        if record.load_u16(VERSION_AT) == VERSION && found != size {
            return Err(InflightError::Size { queue, found, size });
        }
        Ok(record)
    }
}

/// Words that outlive the process. Each is written whole, or not.
#[derive(Clone, Debug)]
pub struct Kept {
    mapping: Arc<SharedMapping>,
    start: usize,
    words: usize,
}

impl Kept {
    /// The word at a place.
    pub fn get(&self, at: usize) -> u64 {
        self.word(at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Puts a word at a place.
    pub fn set(&self, at: usize, value: u64) {
        if let Some(word) = self.word(at) {
            word.store(value, Ordering::Release);
        }
    }

    fn word(&self, at: usize) -> Option<&AtomicU64> {
        let place = self.start + at * WORD;
        (at < self.words).then(|| self.mapping.word64(place))
    }
}

fn part_len(queue_size: u16) -> usize {
    (HEADER + ENTRY * usize::from(queue_size)).next_multiple_of(ALIGN)
}

const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;

const INFLIGHT_IN: usize = 0;
const NEXT_IN: usize = 6;
const COUNTER_IN: usize = 8;

/// The record of one queue.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    mapping: Arc<SharedMapping>,
    start: usize,
    size: u16,
    counter: u64,
}

/// What a record says when a ring starts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Heads to be taken up again, oldest first.
    pub(crate) heads: Vec<u16>,
}

impl InflightQueue {
    /// Brings the record in line with the ring, whose used index is `used_idx`, and returns what
    /// was in flight; `None` for a record that no ring used yet.
    pub(crate) fn recover(&mut self, used_idx: u16) -> Option<Recovered> {
        if self.load_u16(VERSION_AT) == 0 {
            self.store_u16(DESC_NUM_AT, self.size);
            self.store_u16(USED_IDX_AT, used_idx);
            self.store_u16(VERSION_AT, VERSION);
            return None;
        }
        self.finish_last_batch(used_idx);
        let mut pending: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.byte(*head, INFLIGHT_IN).load(Ordering::Acquire) != 0)
            .map(|head| (self.load_u64(entry(head) + COUNTER_IN), head))
            .collect();
        pending.sort_unstable();
        self.counter = pending
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some(Recovered {
            heads: pending.into_iter().map(|(_, head)| head).collect(),
        })
    }

    /// The ring's index moved and the record did not: the last batch was answered.
    fn finish_last_batch(&mut self, used_idx: u16) {
        let batch = used_idx.wrapping_sub(self.load_u16(USED_IDX_AT));
        let mut head = self.load_u16(LAST_BATCH_HEAD_AT);
        for _ in 0..batch.min(self.size) {
            if head >= self.size {
                break;
            }
            self.byte(head, INFLIGHT_IN).store(0, Ordering::Release);
            head = self.load_u16(entry(head) + NEXT_IN);
        }
        self.store_u16(USED_IDX_AT, used_idx);
    }

    /// A chain was taken from the available ring. `head` is less than the ring's size.
    pub(crate) fn taken(&mut self, head: u16) {
        self.store_u64(entry(head) + COUNTER_IN, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.byte(head, INFLIGHT_IN).store(1, Ordering::Release);
    }

    /// A batch of chains is about to be answered.
    pub(crate) fn answering(&mut self, heads: impl Iterator<Item = u16>) {
        for head in heads {
            let last = self.load_u16(LAST_BATCH_HEAD_AT);
            self.store_u16(entry(head) + NEXT_IN, last);
            self.store_u16(LAST_BATCH_HEAD_AT, head);
        }
        fence(Ordering::Release);
    }

    /// The batch was answered; the ring's used index is `used_idx` now.
    pub(crate) fn answered(&mut self, heads: impl Iterator<Item = u16>, used_idx: u16) {
        fence(Ordering::Release);
        for head in heads {
            self.byte(head, INFLIGHT_IN).store(0, Ordering::Release);
        }
        self.store_u16(USED_IDX_AT, used_idx);
    }

    fn byte(&self, head: u16, field: usize) -> &AtomicU8 {
        &self.part()[entry(head) + field]
    }

    fn part(&self) -> &[AtomicU8] {
        &self.mapping.bytes()[self.start..self.start + HEADER + ENTRY * usize::from(self.size)]
    }

    // Whole words, never byte by byte: a process that dies between two bytes of `used_idx` would
    // leave an index that was never true.

    fn load_u16(&self, at: usize) -> u16 {
        u16::from_le(self.mapping.word16(self.start + at).load(Ordering::Acquire))
    }

    fn load_u64(&self, at: usize) -> u64 {
        u64::from_le(self.mapping.word64(self.start + at).load(Ordering::Acquire))
    }

    fn store_u16(&mut self, at: usize, value: u16) {
        self.mapping
            .word16(self.start + at)
            .store(value.to_le(), Ordering::Release);
    }

    fn store_u64(&mut self, at: usize, value: u64) {
        self.mapping
            .word64(self.start + at)
            .store(value.to_le(), Ordering::Release);
    }
}

fn entry(head: u16) -> usize {
    HEADER + ENTRY * usize::from(head)
}
