//! What a guest can do wrong on a ring.

use thiserror::Error;

use super::QueueIndex;

/// A ring that the guest broke, or a request on it that cannot be understood: the guest's fault,
/// never the device's. The queue stops being served until it is set up anew.
#[derive(Debug, Error)]
#[error("queue {queue}: {fault}")]
pub struct QueueError {
    /// The queue.
    pub queue: QueueIndex,
    /// What is wrong.
    pub fault: QueueFault,
}

/// The ways in which a ring or a request on it is wrong.
#[derive(Debug, Error)]
pub enum QueueFault {
    /// Part of the ring is outside guest memory.
    #[error("ring memory at guest address {address:#x} is not accessible")]
    RingMemory {
        /// The guest address.
        address: u64,
    },
    /// The available index runs ahead by more than the ring holds.
    #[error("available index {available} is more than {size} ahead of {next}")]
    AvailableIndex {
        /// The guest's index.
        available: u16,
        /// The next one to be taken.
        next: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A descriptor index that the table does not have.
    #[error("descriptor {index} is outside the table of {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Entries of the table.
        size: u16,
    },
    /// A chain head that was made available while it was in flight.
    #[error("descriptor {head} was made available again before it was used")]
    HeadInFlight {
        /// The head.
        head: u16,
    },
    /// A chain that visits more descriptors than its table has, or than are accepted.
    #[error("descriptor chain at {head} is a loop or longer than {limit} descriptors")]
    ChainTooLong {
        /// The head.
        head: u16,
        /// The limit that it ran over.
        limit: u16,
    },
    /// A chain of more than 2³² - 1 bytes.
    #[error("descriptor chain at {head} holds more than 4 GiB")]
    ChainTooBig {
        /// The head.
        head: u16,
    },
    /// A buffer outside guest memory, or of no length.
    #[error("buffer of {len:#x} bytes at guest address {address:#x} is not guest memory")]
    Buffer {
        /// The guest address.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A readable buffer after a writable one.
    #[error("descriptor chain at {head} has a readable buffer after a writable one")]
    Order {
        /// The head.
        head: u16,
    },
    /// An indirect table that the specification forbids.
    #[error("indirect table of {len} bytes in the chain at {head} is not allowed")]
    Indirect {
        /// The head.
        head: u16,
        /// Its length in bytes.
        len: u32,
    },
    /// A request that the device cannot make sense of, or has no buffer to answer to.
    #[error("request at {head}: {reason}")]
    Request {
        /// The head of its chain.
        head: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Fewer bytes in the chain than were to be read or written.
    #[error("{len} bytes at offset {offset} are outside the {side} part of the chain at {head}")]
    OutsideChain {
        /// The head.
        head: u16,
        /// `readable` or `writable`.
        side: &'static str,
        /// First byte.
        offset: usize,
        /// Number of bytes.
        len: usize,
    },
}
