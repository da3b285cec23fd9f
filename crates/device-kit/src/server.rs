//! What a device process serves, whatever its protocol: the trait that [`crate::run_server`] drives.
//!
//! ```text
//!  process start            Server::open       everything that options name is opened here
//!  ── sandbox ──────────────────────────────── from here on nothing can be opened ────────────
//!  once                     Server::start      threads of its own
//!  a front-end connects     Server::serve      returns when it is gone; then the next one comes
//!  meanwhile                DeviceProcess      the control link's thread asks
//! ```

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use api::balloon1::BalloonProcess;
use api::device1::DeviceProcess;
use migration::schema::UnitId;
use prometheus_client::registry::Registry;
use thiserror::Error;

use crate::device::{Capabilities, HostError, OptionError};
use crate::ending::Ending;
use crate::health::Health;

/// What serves one front-end after the other.
pub trait Server: DeviceProcess + Sized {
    /// Command-line options besides those of every device process.
    type Options: clap::Args;

    /// The answer to `--print-capabilities`.
    const CAPABILITIES: Capabilities;
    /// The `ioctl` requests that it makes inside the sandbox; all others fail there.
    const IOCTLS: &'static [u32];
    /// The device's kind, which is its unit's name unless `--unit` gives another.
    const KIND: &'static str;

    /// Opens what the options name. Called once, before the sandbox.
    ///
    /// # Errors
    /// What a person can act on: the option, its value, what to do.
    fn open(options: Self::Options, lent: Lent<'_>) -> Result<Self, OpenError>;

    /// Starts threads of its own. Called once, inside the sandbox.
    ///
    /// # Errors
    /// The host has no thread.
    fn start(self: &Arc<Self>) -> Result<(), HostError>;

    /// Serves one front-end until it goes or errs; the end of its stream is the end of it, also
    /// when the process is about to end.
    ///
    /// # Errors
    /// No other front-end can be served after it: the process ends.
    fn serve(self: &Arc<Self>, stream: UnixStream) -> ServeResult;

    /// The balloon that it is, if it is one.
    fn balloon(&self) -> Option<Arc<dyn BalloonProcess>>;
}

/// How a session ended for the process.
pub type ServeResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// What the program lends to a server while it is made.
#[derive(Debug)]
pub struct Lent<'a> {
    /// Where counters are registered; the prefix `godwit` is there already.
    pub registry: &'a mut Registry,
    /// How the process does, for whoever asks.
    pub health: Health,
    /// Name of the unit.
    pub unit: UnitId,
    pub(crate) ending: Ending,
}

/// Why a server cannot be made.
#[derive(Debug, Error)]
pub enum OpenError {
    /// An option cannot be followed.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// The host refuses.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The device contradicts itself.
    #[error("device: {0}")]
    Device(String),
}
