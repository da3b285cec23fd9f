//! `org.godwit.Device1` at `/org/godwit/Device1`: a device process, for what the device
//! protocols have no word for. Peer to peer; the device process is the server.

use std::collections::BTreeMap;

/// Object path of the device on its connection.
pub const PATH: &str = "/org/godwit/Device1";

/// What a device process knows of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Whether a front-end is connected to it.
    pub connected: bool,
    /// What went wrong last, in one sentence, or empty.
    pub last_error: String,
    /// Bytes of guest memory that are mapped.
    pub mapped: u64,
    /// How many of them are known to be present.
    pub prefaulted: u64,
}

/// What a device process tells. No method may block.
pub trait DeviceProcess: Send + Sync + 'static {
    /// What the properties are now.
    fn status(&self) -> Status;
    /// See [`Device1Proxy::statistics`].
    fn statistics(&self) -> BTreeMap<String, u64>;
}

/// The interface on a [`DeviceProcess`].
#[derive(Debug)]
pub struct Device1<D>(pub D);

/// A device process.
#[zbus::interface(
    name = "org.godwit.Device1",
    proxy(
        default_path = "/org/godwit/Device1",
        default_service = "org.godwit.Device1"
    )
)]
impl<D: DeviceProcess> Device1<D> {
    /// Its counters by name; they only grow.
    #[zbus(out_args("statistics"))]
    async fn statistics(&self) -> BTreeMap<String, u64> {
        self.0.statistics()
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
    #[zbus(property(emits_changed_signal = "false"))]
    async fn mapped_bytes(&self) -> u64 {
        self.0.status().mapped
    }

    /// How many of them are known to be present.
    #[zbus(property(emits_changed_signal = "false"))]
    async fn prefaulted_bytes(&self) -> u64 {
        self.0.status().prefaulted
    }
}
