//! What a front-end can do wrong, and what can go wrong while it is served. Each ends its session.

use std::io;

use migration::state::{DeviceState, IllegalTransition};
use thiserror::Error;

use crate::device::{ConfigError, OptionError, StateError};
use crate::memory::MemoryError;
use crate::queue::{InflightError, QueueIndex};
use crate::queue_threads::ThreadStuck;

#[derive(Debug, Error)]
pub(crate) enum SessionError {
    #[error("queue {index} does not exist, there are {count}")]
    QueueIndex { index: u32, count: usize },
    #[error("queue {queue} cannot have {size} entries, only powers of two up to {max}")]
    QueueSize {
        queue: QueueIndex,
        size: u32,
        max: u16,
    },
    #[error("base {base} of queue {queue} is not a 16-bit index")]
    Base { queue: QueueIndex, base: u32 },
    #[error("{what} of queue {queue} cannot change while it runs")]
    Running {
        queue: QueueIndex,
        what: &'static str,
    },
    #[error("{part} of queue {queue} at user address {address:#x} is in no memory region")]
    Address {
        queue: QueueIndex,
        part: &'static str,
        address: u64,
    },
    #[error("queue {queue} has no kick descriptor; polled rings are not offered")]
    NoKick { queue: QueueIndex },
    #[error("features {unknown:#x} were not offered")]
    Features { unknown: u64 },
    #[error("protocol features {unknown:#x} were not offered")]
    ProtocolFeatures { unknown: u64 },
    #[error("ring features cannot change while rings run")]
    FeaturesWhileRunning,
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("{what} cannot be mapped")]
    Shared {
        what: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error("an in-flight file for {queues} queues of {size} is not possible here")]
    InflightSize { queues: u16, size: u16 },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("queue {queue} still has requests in flight after {seconds} s")]
    StopTimeout { queue: QueueIndex, seconds: u64 },
    #[error(transparent)]
    Thread(#[from] ThreadStuck),
    #[error(transparent)]
    Transition(#[from] IllegalTransition),
    #[error("the device did not go from {from} to {to}")]
    Device {
        from: DeviceState,
        to: DeviceState,
        source: StateError,
    },
    #[error("{0} is not offered")]
    NotOffered(&'static str),
    #[error("message cut off after {got} of 12 bytes of its header")]
    HalfMessage { got: usize },
    #[error("message {request} is malformed")]
    Malformed { request: u32 },
    #[error("back-end channel: {0}")]
    Channel(&'static str),
    #[error("SEND_RARP: {0}")]
    Rarp(&'static str),
    #[error("a message about wired rings {0}")]
    WiredRings(&'static str),
    #[error("queue {queue} cannot be started: it runs, or has no addresses or no kick descriptor")]
    NotWired { queue: QueueIndex },
    #[error(transparent)]
    Exclusive(#[from] OptionError),
    #[error("the connection failed")]
    Connection(#[source] io::Error),
    #[error("event descriptor of queue {queue} is unusable")]
    Event {
        queue: QueueIndex,
        source: io::Error,
    },
}
