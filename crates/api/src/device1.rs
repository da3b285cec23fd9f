//! `org.godwit.Device1` at `/org/godwit/Device1`: a device process, for what the device
//! protocols have no word for. Peer to peer ([`crate::peer`]); the device process is the server.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zbus::names::InterfaceName;
use zbus::object_server::SignalEmitter;
use zbus::{OwnedVariant, Type, Variant, fdo};

use crate::Error;

/// Object path of the device on its connection.
pub const PATH: &str = "/org/godwit/Device1";
/// Name of the interface.
pub const INTERFACE: &str = "org.godwit.Device1";

/// What of guest memory a device process maps ahead of its first use.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Type, Variant, OwnedVariant,
)]
#[zbus(signature = "s", rename_all = "lowercase")]
#[serde(rename_all = "lowercase")]
pub enum Prefault {
    /// Nothing.
    Off,
    /// What holds data already.
    Data,
    /// All of it, allocated now.
    All,
}

/// What a device process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// What kind of device: `blk`, `net`, `vfio`.
    pub kind: String,
    /// Its name in the machine.
    pub unit: String,
    /// Version of its program.
    pub version: String,
}

/// How a device process does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Where the device is in its life, by VFIO's names: `Running`, `Stop`, …
    pub state: String,
    /// Whether a front-end is connected to it.
    pub connected: bool,
    /// What went wrong last, in one sentence, or empty.
    pub last_error: String,
    /// Bytes of guest memory that are mapped.
    pub mapped: u64,
    /// How many of them the prefault thread has been through.
    pub prefaulted: u64,
    /// Whether that thread is still at work.
    pub prefaulting: bool,
}

/// What a device process tells and does. No method may block.
pub trait DeviceProcess: Send + Sync + 'static {
    /// What never changes.
    fn identity(&self) -> Identity;
    /// What the properties are now.
    fn status(&self) -> Status;
    /// See [`Device1Proxy::statistics`].
    fn statistics(&self) -> BTreeMap<String, u64>;
    /// See [`Device1Proxy::prefault`].
    fn prefault(&self, mode: Prefault) -> Result<(), Error>;
    /// See [`Device1Proxy::cancel_prefault`].
    fn cancel_prefault(&self);
}

impl<D: DeviceProcess> DeviceProcess for Arc<D> {
    fn identity(&self) -> Identity {
        (**self).identity()
    }

    fn status(&self) -> Status {
        (**self).status()
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        (**self).statistics()
    }

    fn prefault(&self, mode: Prefault) -> Result<(), Error> {
        (**self).prefault(mode)
    }

    fn cancel_prefault(&self) {
        (**self).cancel_prefault();
    }
}

/// Tells in one PropertiesChanged what is different in `now`, if anything is.
///
/// # Errors
/// The connection is over.
pub async fn tell_changes(
    emitter: &SignalEmitter<'_>,
    told: &Status,
    now: &Status,
) -> zbus::Result<()> {
    let mut changed = HashMap::new();
    let mut compare = |name, differs: bool, value: Variant<'static>| {
        if differs {
            changed.insert(name, value);
        }
    };
    compare("State", now.state != told.state, now.state.clone().into());
    compare(
        "Connected",
        now.connected != told.connected,
        now.connected.into(),
    );
    compare(
        "LastError",
        now.last_error != told.last_error,
        now.last_error.clone().into(),
    );
    compare("MappedBytes", now.mapped != told.mapped, now.mapped.into());
    compare(
        "PrefaultedBytes",
        now.prefaulted != told.prefaulted,
        now.prefaulted.into(),
    );
    compare(
        "Prefaulting",
        now.prefaulting != told.prefaulting,
        now.prefaulting.into(),
    );
    if changed.is_empty() {
        return Ok(());
    }
    let interface = InterfaceName::from_static_str_unchecked(INTERFACE);
    fdo::Properties::properties_changed(emitter, interface, changed, [].as_slice().into()).await
}

/// The interface on a [`DeviceProcess`].
#[derive(Debug)]
pub struct Device1<D>(pub D);

/// A device process. Changes are told at most four times a second.
#[zbus::interface(
    name = "org.godwit.Device1",
    // One call after the other: a caller that does not read its answers holds up only itself.
    spawn = false,
    proxy(default_path = "/org/godwit/Device1", default_service = "org.godwit.Device1")
)]
impl<D: DeviceProcess> Device1<D> {
    /// Its counters by name; they only grow while the process lives. Every device has
    /// `requests`, `failed_requests`, `bytes_to_guest`, `bytes_from_guest`, `sessions`,
    /// `failed_sessions` and `errors`, one of virtio `kicks`, `calls`, `broken_rings`,
    /// `states_saved` and `states_loaded` besides; a kind of device adds its own.
    #[zbus(out_args("statistics"))]
    async fn statistics(&self) -> BTreeMap<String, u64> {
        self.0.statistics()
    }

    /// Maps guest memory ahead of its first use, `off`, `data` or `all`: what there is now, from
    /// the beginning, and every memory table that comes. A walk under way ends first.
    async fn prefault(&self, mode: Prefault) -> Result<(), Error> {
        self.0.prefault(mode)
    }

    /// Ends the walk under way. The next memory table is walked again.
    async fn cancel_prefault(&self) {
        self.0.cancel_prefault();
    }

    /// What kind of device it is: `blk`, `net`, `vfio`.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn kind(&self) -> String {
        self.0.identity().kind
    }

    /// Its name in the machine.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn unit(&self) -> String {
        self.0.identity().unit
    }

    /// Version of its program.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn version(&self) -> String {
        self.0.identity().version
    }

    /// Where the device is in its life, by VFIO's names: `Running`, `Stop`, `PreCopy`, ….
    #[zbus(property)]
    async fn state(&self) -> String {
        self.0.status().state
    }

    /// Whether a front-end is connected to it.
    #[zbus(property)]
    async fn connected(&self) -> bool {
        self.0.status().connected
    }

    /// What went wrong last, in one sentence, or empty.
    #[zbus(property)]
    async fn last_error(&self) -> String {
        self.0.status().last_error
    }

    /// Bytes of guest memory that are mapped.
    #[zbus(property)]
    async fn mapped_bytes(&self) -> u64 {
        self.0.status().mapped
    }

    /// How many of them the prefault thread has been through: all, when it is done.
    #[zbus(property)]
    async fn prefaulted_bytes(&self) -> u64 {
        self.0.status().prefaulted
    }

    /// Whether the prefault thread is at work.
    #[zbus(property)]
    async fn prefaulting(&self) -> bool {
        self.0.status().prefaulting
    }
}
