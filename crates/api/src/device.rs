//! `org.godwit.Vmm1.Device` at `/org/godwit/Vmm1/machine/NAME/device/ID`: one device.

use std::collections::BTreeMap;
use std::future::Future;

use serde::{Deserialize, Serialize};
use zbus::message::Header;
use zbus::{OwnedObjectPath, OwnedVariant, Type, Variant};

use crate::{Caller, Error};

/// How the back-end of a device does.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Type, Variant, OwnedVariant,
)]
#[zbus(signature = "s", rename_all = "lowercase")]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It has no process.
    Off,
    /// Its process serves it, or somebody else's does.
    Running,
    /// Its process ended and is being started again; the guest sees a pause.
    Restarting,
    /// Its process ended too often; `Restart` tries again.
    Failed,
}

impl State {
    /// Its word on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Running => "running",
            Self::Restarting => "restarting",
            Self::Failed => "failed",
        }
    }
}

/// What a device is and does now.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its name in the machine.
    pub id: String,
    /// `blk`, `net`, `vfio`, or a kind of the vhost-user specification.
    pub kind: String,
    /// How it does.
    pub state: State,
    /// Why it was restarted or failed last, in one sentence, or empty.
    pub reason: String,
    /// Name of the systemd unit of its process, or empty.
    pub unit: String,
    /// Process id, or 0.
    pub process: u32,
    /// What is behind it: path of an image, `tap:NAME`, path of a socket, address of a PCI device.
    pub source: String,
    /// How many times a new process took over since the machine was started.
    pub reconnects: u32,
}

/// What a broker does for one device.
pub trait OneDevice: Send + Sync + 'static {
    /// See [`DeviceProxy::restart`].
    fn restart(
        &self,
        caller: Caller,
        flags: u64,
    ) -> impl Future<Output = Result<OwnedObjectPath, Error>> + Send;
    /// See [`DeviceProxy::statistics`].
    fn statistics(&self) -> impl Future<Output = Result<BTreeMap<String, u64>, Error>> + Send;
    /// What the properties are now. Must not block.
    fn facts(&self) -> Facts;
}

/// The interface on [`OneDevice`].
#[derive(Debug)]
pub struct Device<D>(pub D);

/// One device of a machine.
#[zbus::interface(
    name = "org.godwit.Vmm1.Device",
    proxy(default_service = "org.godwit.Vmm1")
)]
impl<D: OneDevice> Device<D> {
    /// Replaces its process by a new one under the running machine. Requests in flight are
    /// kept.
    #[zbus(out_args("job"), proxy(allow_interactive_auth))]
    async fn restart(
        &self,
        #[zbus(header)] header: Header<'_>,
        flags: u64,
    ) -> Result<OwnedObjectPath, Error> {
        self.0.restart(Caller::from(&header), flags).await
    }

    /// Its counters by name, and what its process uses: `cpu_usec`, `resident_bytes` (with the
    /// guest's memory that it maps), `own_bytes` (without). A process of ours counts what
    /// `org.godwit.Device1.Statistics` has, `requests`, `bytes_to_guest` and `bytes_from_guest`
    /// first, and `mapped_bytes` and `prefaulted_bytes` of guest memory; `reconnects` is the
    /// property. What is not known is not there; counters begin anew with a new process. Takes a
    /// few seconds at most.
    #[zbus(out_args("statistics"))]
    async fn statistics(&self) -> Result<BTreeMap<String, u64>, Error> {
        self.0.statistics().await
    }

    /// Its name in the machine.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn id(&self) -> String {
        self.0.facts().id
    }

    /// `blk`, `net`, `vfio`, or another kind of the vhost-user specification.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn kind(&self) -> String {
        self.0.facts().kind
    }

    /// How its back-end does: `off`, `running`, `restarting` or `failed`.
    #[zbus(property)]
    async fn state(&self) -> State {
        self.0.facts().state
    }

    /// Why it was restarted or failed last, in one sentence, or empty.
    #[zbus(property)]
    async fn reason(&self) -> String {
        self.0.facts().reason
    }

    /// The systemd unit of its process, or empty.
    #[zbus(property)]
    async fn unit(&self) -> String {
        self.0.facts().unit
    }

    /// Process id, or 0.
    #[zbus(property)]
    async fn process(&self) -> u32 {
        self.0.facts().process
    }

    /// What is behind it: the path of an image, `tap:NAME`, the path of a socket, the address of a
    /// PCI device, or `synthetic`.
    #[zbus(property)]
    async fn source(&self) -> String {
        self.0.facts().source
    }

    /// How many times a new process took over since the machine was started.
    #[zbus(property)]
    async fn reconnects(&self) -> u32 {
        self.0.facts().reconnects
    }
}
