//! What a device is to the kit: the traits that a `dev-*` implements, and nothing of vhost-user.
//!
//! A device process consists of one [`Device`] and its [`Worker`]s. The kit drives both:
//!
//! ```text
//!  process start            Device::open       everything that options name is opened here
//!                           Device::acquire    what only one process may have, unless --incoming
//!                           Device::workers    io_uring instances and the like are made here
//!  ── sandbox ──────────────────────────────── from here on nothing can be opened ────────────
//!  front-end connects       features, accept_features, read_config, write_config
//!  the first ring starts    Device::acquire, if it is not held
//!  a ring starts            (its queue thread) Worker::start once, then Worker::process
//!  a ring stops             no more Worker::process; Worker::ready until nothing is in flight
//!  all rings are stopped    Device::save or Device::load
//!  the machine moves away   Device::release
//!  between any two of these  Device::transition, as the state of its life changes
//!  front-end resets         Device::reset
//!  front-end goes           rings stop as above; the device stays and waits for the next one
//! ```
//!
//! Threads: the methods of [`Device`] are called by the control thread (`save` and `load` by a
//! state thread while every ring is stopped), those of one [`Worker`] by one queue thread. What
//! both need is shared by the device in its own way, usually an `Arc` made in `open`.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use api::balloon1::BalloonProcess;
use migration::frame::FrameError;
pub use migration::rings::Forecast;
use migration::schema::Schema;
use migration::state::DeviceState;
use prometheus_client::registry::Registry;
use thiserror::Error;

use crate::health::Health;
use crate::queue::{Kept, Queue, QueueError, QueueIndex};
pub use crate::queue_thread::Interest;
use crate::session::ConfigChange;

/// A device, whatever front-end it serves.
pub trait Device: Sized + Send + Sync + 'static {
    /// Its own command-line options.
    type Options: clap::Args;
    /// What serves its queues.
    type Worker: Worker;
    /// What travels when it moves: what it was doing, never what it is.
    type SavedState: Schema;

    /// The answer to `--print-capabilities`.
    const CAPABILITIES: Capabilities;
    /// The `ioctl` requests that it makes inside the sandbox; all others fail there.
    const IOCTLS: &'static [u32];

    /// Opens what the options name and makes the device. Called once, before the sandbox.
    ///
    /// # Errors
    /// What a person can act on: the option, its value, what to do.
    fn open(options: Self::Options, kit: &mut Kit<'_>) -> Result<Self, OptionError>;

    /// Makes the workers, and says which queues each of them serves; every queue has one worker.
    /// Called once, before the sandbox; the methods of the workers are called inside it.
    fn workers(&self) -> Result<Vec<Assignment<Self::Worker>>, HostError>;

    /// Its number of virtqueues, the control queue included; at most [`MAX_QUEUES`].
    fn queue_count(&self) -> u16;

    /// Most entries of one ring: a power of two, at most [`MAX_QUEUE_SIZE`].
    fn max_queue_size(&self) -> u16;

    /// The device's own feature bits (0 to 23, and 50 onwards). The kit adds the ring's and
    /// vhost-user's.
    fn features(&self) -> u64;

    /// The front-end accepted these of all features offered. May come more than once, also while
    /// rings run.
    fn accept_features(&self, features: u64);

    /// Fills `data` from `offset` of the configuration space; zeroes past its end.
    fn read_config(&self, offset: u32, data: &mut [u8]);

    /// Writes `data` to `offset` of the configuration space.
    fn write_config(
        &self,
        offset: u32,
        data: &[u8],
        writer: ConfigWriter,
    ) -> Result<(), ConfigError>;

    /// Takes what only one process may have at a time: the lock of an image. Called when it is not
    /// held; before the sandbox, or, for a machine that moves in, before its rings start. Who else
    /// has it is waited for as long as `patience`.
    ///
    /// # Errors
    /// Who else may have it, and what to do. Nothing runs then.
    fn acquire(&self, patience: Duration) -> Result<(), OptionError>;

    /// Gives it up, for the process that the machine moves to. Called when it is held; every ring
    /// is stopped and drained.
    fn release(&self) -> Result<(), OptionError>;

    /// It is about to go to another state of its life. To `PreCopy` a move may follow, and the
    /// costly part of saving belongs here; from `Stop` to a state that runs, rings are about to
    /// start; to `Stop` all have stopped. Must be brief but for that.
    ///
    /// # Errors
    /// When it cannot go there: the front-end's request fails, and with it the session.
    fn transition(&self, from: DeviceState, to: DeviceState) -> Result<(), StateError>;

    /// What its part in a switchover will take, as far as it is known: bytes of state, and time of
    /// its own besides that of its requests. Called while rings run; must not block.
    fn forecast(&self) -> Forecast;

    /// What it was doing. Every ring is stopped and drained.
    fn save(&self) -> Result<Self::SavedState, StateError>;

    /// Goes on from where its twin stopped. Every ring is stopped, and all of the state has come
    /// as it was sent. It is hostile: it is checked before any of it is taken over.
    fn load(&self, state: Self::SavedState) -> Result<(), StateError>;

    /// What of its state is too large for one piece, if anything is.
    fn bulk(&self) -> Option<&dyn BulkState>;

    /// Back to what it was after `open`. Every ring is stopped and drained.
    fn reset(&self);

    /// Counters of its own by name, beside those that the kit has for every device. They only
    /// grow. Called by the link thread; must not block.
    fn statistics(&self) -> Vec<(&'static str, u64)>;

    /// The balloon that it is, if it is one: what its link serves as `org.godwit.Balloon1`.
    fn balloon(&self) -> Option<Arc<dyn BalloonProcess>>;

    /// What tells a network where its guest is, if it is a network card (SEND_RARP).
    fn announcer(&self) -> Option<&dyn Announcer>;

    /// What outlives the process besides requests in flight, if there is anything.
    fn keepsake(&self) -> Option<&dyn Keepsake>;
}

/// A device that keeps something for the process that takes its place when it is killed.
pub trait Keepsake {
    /// Words that it needs. Another number is another layout, which the next process does not take.
    fn words(&self) -> usize;

    /// Where it keeps them from now on: what a process before this one left there, or zeroes. No
    /// ring runs.
    fn keep(&self, kept: Kept);
}

/// State that passes in pieces, after what [`Device::save`] returned and before [`Device::load`]
/// is called. Every ring is stopped.
pub trait BulkState {
    /// Gives all of it to `send`, in order.
    ///
    /// # Errors
    /// Those of `send`.
    fn save(&self, send: &mut dyn FnMut(&[u8]) -> Result<(), FrameError>)
    -> Result<(), FrameError>;

    /// A state begins to come: what came of another one is forgotten.
    fn begin(&self);

    /// Takes the next piece, of at most [`MAX_CHUNK`](migration::frame::MAX_CHUNK) bytes. It is
    /// hostile, and nothing is known of the others: [`Device::load`] says that all have come.
    fn load(&self, piece: &[u8]) -> Result<(), StateError>;
}

/// A card that can speak for its guest.
pub trait Announcer {
    /// Sends a packet of the guest's `mac` into the network, whose switches learn from it where the
    /// guest is now. Called by the control thread; must not block.
    ///
    /// # Errors
    /// The network does not take it.
    fn announce(&self, mac: [u8; 6]) -> io::Result<()>;
}

/// Most queues of a device.
pub const MAX_QUEUES: u16 = 128;
/// Most entries of a ring.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Most words of a [`Keepsake`].
pub const MAX_KEPT: usize = 512;

/// What serves one or more queues, on a thread of its own.
pub trait Worker: Send + 'static {
    /// Any thread may work with it, one at a time: then a ring that starts is looked at by who starts
    /// it, maybe before [`Self::start`], and its own thread sleeps on.
    const ANY_THREAD: bool = false;

    /// Called once on its thread, before anything else, unless it is of [`Self::ANY_THREAD`].
    fn start(&mut self) -> Result<(), HostError>;

    /// Names the descriptors besides the queues' kicks that it waits for now. Called before every
    /// wait, so that what is waited for can follow what is there to do. A source is always the same
    /// descriptor, which is open as long as the worker lives.
    fn wait_for(&self, interest: &mut Interest<'_>);

    /// One of those descriptors is ready. `queues` are those of this worker that are served now,
    /// also those that are being stopped; completions are answered here.
    fn ready(&mut self, source: Source, queues: &mut Queues<'_>) -> Result<(), WorkerError>;

    /// Takes requests from `queue` until there are none. Called after every wait for each queue
    /// that is served and not being stopped, also when it was not kicked. Not called for a ring
    /// that starts empty until it is kicked.
    fn process(&mut self, queue: &mut Queue) -> Result<Progress, WorkerError>;
}

/// How [`Worker::process`] left a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// `pop` said that there is nothing: the guest's next request must kick.
    Emptied,
    /// What is left, which `unpop` put back, is not enough to go on (a packet that needs more
    /// buffers than there are): the guest's next request must kick, and is waited for.
    Short,
    /// Requests may be left on purpose, for want of a packet or of room: the worker waits for a
    /// descriptor instead, or has requests in flight whose end will bring it here.
    Held,
}

/// A worker and its queues.
#[derive(Debug)]
pub struct Assignment<W> {
    /// The worker.
    pub worker: W,
    /// The queues that it serves.
    pub queues: Vec<QueueIndex>,
}

/// The queues of one worker that are served at the moment.
#[derive(Debug)]
pub struct Queues<'a> {
    pub(crate) queues: &'a mut [Option<Queue>],
}

impl Queues<'_> {
    /// The queue with this number, if it is served by this worker and running or being stopped.
    pub fn get(&mut self, index: QueueIndex) -> Option<&mut Queue> {
        self.iter().find(|queue| queue.index() == index)
    }

    /// All of them.
    pub fn iter(&mut self) -> impl Iterator<Item = &mut Queue> {
        self.queues.iter_mut().flatten()
    }
}

/// A descriptor that a worker waits for, by a number of its own choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source(pub u32);

/// Who writes to the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigWriter {
    /// The guest's driver: only what the specification lets it write.
    Driver,
    /// The front-end, for a machine that moves in: read-only fields too.
    Migration,
}

/// What the kit lends to a device while it is made.
#[derive(Debug)]
pub struct Kit<'a> {
    /// Where the device registers counters of its own; the prefix is there already.
    pub registry: &'a mut Registry,
    /// Tells the front-end that the configuration space changed.
    pub config_change: ConfigChange,
    /// Takes note of what goes wrong, for whoever asks how the process does.
    pub health: Health,
}

/// What `--print-capabilities` prints, by vhost-user.json.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// `block`, `net`, …
    pub device_type: &'static str,
    /// Optional features of the command line: `read-only`, `blk-file`.
    pub features: &'static [&'static str],
    /// The program's name.
    pub program: &'static str,
    /// One line of what it is.
    pub about: &'static str,
}

/// An option whose value cannot be used: one line with the option, the value and what to do.
#[derive(Debug, Error)]
#[error("{option} {value}: {problem}")]
pub struct OptionError {
    /// The option as it is written: `--blk-file`.
    pub option: &'static str,
    /// Its value.
    pub value: String,
    /// What is wrong, and what to do.
    pub problem: String,
}

/// A configuration write that is refused.
#[derive(Debug, Error)]
#[error("{len} bytes at offset {offset} of the configuration space cannot be written: {reason}")]
pub struct ConfigError {
    /// First byte.
    pub offset: u32,
    /// Number of bytes.
    pub len: usize,
    /// Why.
    pub reason: &'static str,
}

/// A state that cannot be saved, or that cannot be taken over.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct StateError(pub String);

/// Something that failed on this host: not the guest's fault, and nothing a queue can be blamed
/// for. The process ends, and its successor takes up what was in flight.
#[derive(Debug, Error)]
#[error("{what}")]
pub struct HostError {
    /// What was tried, with its values.
    pub what: String,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl HostError {
    /// An error of what was tried.
    pub fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        HostError {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// Why a worker could not go on.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The guest broke a ring: this queue is served no longer.
    #[error(transparent)]
    Guest(#[from] QueueError),
    /// The host failed: the process ends.
    #[error(transparent)]
    Host(#[from] HostError),
}
