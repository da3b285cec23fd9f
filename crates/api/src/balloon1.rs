//! `org.godwit.Balloon1` at [`crate::device1::PATH`]: what a balloon serves beside
//! `org.godwit.Device1`, on the same connection.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use zbus::names::InterfaceName;
use zbus::object_server::SignalEmitter;
use zbus::{Fd, Variant, fdo};

use crate::Error;

/// Name of the interface.
pub const INTERFACE: &str = "org.godwit.Balloon1";

/// What the properties are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Bytes that the host wants of the guest.
    pub target: u64,
    /// Bytes that the guest says it has given.
    pub actual: u64,
    /// Seconds between two questions for the guest's statistics; 0: none is asked.
    pub statistics_interval: u32,
}

/// What a balloon tells and does. No method may block.
pub trait BalloonProcess: Send + Sync + 'static {
    /// What the properties are now.
    fn status(&self) -> Status;
    /// See [`Balloon1Proxy::set_target`].
    fn set_target(&self, bytes: u64) -> Result<(), Error>;
    /// See [`Balloon1Proxy::set_statistics_interval`].
    fn set_statistics_interval(&self, seconds: u32) -> Result<(), Error>;
    /// See [`Balloon1Proxy::guest_statistics`].
    fn guest_statistics(&self) -> BTreeMap<String, u64>;
    /// See [`Balloon1Proxy::start_hints`].
    fn start_hints(&self, map: OwnedFd) -> Result<u32, Error>;
    /// See [`Balloon1Proxy::stop_hints`].
    fn stop_hints(&self);
    /// See [`Balloon1Proxy::end_hints`].
    fn end_hints(&self);
}

/// Tells in one PropertiesChanged what is different in `now`, if anything is.
///
/// # Errors
/// The connection is over.
pub async fn tell_changes(
    emitter: &SignalEmitter<'_>,
    told: Status,
    now: Status,
) -> zbus::Result<()> {
    tell_status(emitter, INTERFACE, told, now).await
}

/// The same, of either interface of a balloon.
pub(crate) async fn tell_status(
    emitter: &SignalEmitter<'_>,
    interface: &'static str,
    told: Status,
    now: Status,
) -> zbus::Result<()> {
    let mut changed: HashMap<&str, Variant<'static>> = HashMap::new();
    if now.target != told.target {
        changed.insert("Target", now.target.into());
    }
    if now.actual != told.actual {
        changed.insert("Actual", now.actual.into());
    }
    if now.statistics_interval != told.statistics_interval {
        changed.insert("StatisticsInterval", now.statistics_interval.into());
    }
    if changed.is_empty() {
        return Ok(());
    }
    let interface = InterfaceName::from_static_str_unchecked(interface);
    fdo::Properties::properties_changed(emitter, interface, changed, [].as_slice().into()).await
}

/// The interface on a [`BalloonProcess`].
pub struct Balloon1(pub Arc<dyn BalloonProcess>);

impl fmt::Debug for Balloon1 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Balloon1").field(&self.0.status()).finish()
    }
}

/// A memory balloon.
#[zbus::interface(
    name = "org.godwit.Balloon1",
    // One call after the other, as on `org.godwit.Device1`.
    spawn = false,
    proxy(default_path = "/org/godwit/Device1", default_service = "org.godwit.Device1")
)]
impl Balloon1 {
    /// Bytes that the guest shall give to the host, a multiple of 4096; it does so by and by, as
    /// far as it can spare them.
    #[zbus(property)]
    async fn target(&self) -> u64 {
        self.0.status().target
    }

    /// Asks the guest for so many.
    #[zbus(property)]
    async fn set_target(&self, bytes: u64) -> Result<(), zbus::fdo::Error> {
        let refuse = |error: Error| fdo::Error::InvalidArgs(error.to_string());
        self.0.set_target(bytes).map_err(refuse)
    }

    /// Seconds between two questions for the guest's statistics, at most 3600; 0: none is asked.
    #[zbus(property)]
    async fn statistics_interval(&self) -> u32 {
        self.0.status().statistics_interval
    }

    /// Asks as often from now on.
    #[zbus(property)]
    async fn set_statistics_interval(&self, seconds: u32) -> Result<(), zbus::fdo::Error> {
        let refuse = |error: Error| fdo::Error::InvalidArgs(error.to_string());
        self.0.set_statistics_interval(seconds).map_err(refuse)
    }

    /// Bytes that the guest has given, as it says.
    #[zbus(property)]
    async fn actual(&self) -> u64 {
        self.0.status().actual
    }

    /// What the guest said of its memory last, by name: bytes (`free_bytes`, `total_bytes`,
    /// `available_bytes`, …) and counts (`major_faults`, …). Empty when it never did.
    #[zbus(out_args("statistics"))]
    async fn guest_statistics(&self) -> BTreeMap<String, u64> {
        self.0.guest_statistics()
    }

    /// Begins a round of free page hints, after the end of the one before: from now on the guest
    /// names pages that it does not use, and each is marked in `map` (the layout is in the crate
    /// `migration`, module `free_pages`). Pages in the balloon are marked at once.
    #[zbus(out_args("round"))]
    async fn start_hints(&self, map: Fd<'_>) -> Result<u32, Error> {
        match map {
            Fd::Owned(map) => self.0.start_hints(map),
            Fd::Borrowed(map) => {
                let copied = map.try_clone_to_owned();
                let no_copy = |error| Error::LimitsExceeded(format!("no descriptor: {error}"));
                self.0.start_hints(copied.map_err(no_copy)?)
            }
        }
    }

    /// Ends the round: when this is answered, nothing is marked any more. The guest keeps the pages
    /// that it named.
    async fn stop_hints(&self) {
        self.0.stop_hints();
    }

    /// As [`Balloon1Proxy::stop_hints`]; and the guest may use all the pages again that it named.
    /// Happens by itself when the connection ends.
    async fn end_hints(&self) {
        self.0.end_hints();
    }
}
