//! `org.godwit.Core1` at `/org/godwit/Core1`: one machine, seen from who started it.

use std::collections::BTreeMap;
use std::future::Future;

use serde::{Deserialize, Serialize};
use zbus::{DeserializeDict, OwnedFd, OwnedVariant, SerializeDict, Type, Variant};

use zbus::object_server::SignalEmitter;

use crate::Error;

/// Name of a core on its own bus.
pub const SERVICE: &str = "org.godwit.Core1";
/// Object path of the machine on its core's connection.
pub const PATH: &str = "/org/godwit/Core1";

/// Where a machine is in its life.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Type, Variant, OwnedVariant,
)]
#[zbus(signature = "s", rename_all = "lowercase")]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// All vCPUs run.
    Running,
    /// No vCPU runs; devices have stopped.
    Paused,
    /// It is over; the core is about to go.
    Ended,
}

/// The connection of a core to the process of one of its devices ([`crate::device1`]).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Type, Variant, OwnedVariant,
)]
#[zbus(signature = "s", rename_all = "lowercase")]
#[serde(rename_all = "lowercase")]
pub enum Link {
    /// There never was one, as with back-ends of others' making.
    #[default]
    None,
    /// The process has not yet taken it up.
    Waiting,
    /// The process answers.
    Up,
    /// The process does not answer in time.
    Silent,
    /// The process ended it, or misbehaved.
    Lost,
}

/// How a device does, as its core sees it. What its process says of itself is empty unless the
/// link is [`Link::Up`], and is to be taken as the word of a process that the guest may have
/// taken over.
#[derive(Clone, Debug, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "dict", rename_all = "PascalCase")]
pub struct DeviceStatus {
    /// Device type, by the core's name for it.
    pub kind: String,
    /// Whether there is a back-end now.
    pub connected: bool,
    /// How many times a back-end took the place of another.
    pub reconnects: u32,
    /// Why the device does not work any more, in one sentence, or empty.
    pub trouble: String,
    /// The connection by which its process tells the rest.
    pub link: Link,
    /// Where it is in its life, by VFIO's names.
    pub state: String,
    /// What went wrong last in its process, in one sentence.
    pub last_error: String,
    /// Bytes of guest memory that it has mapped.
    pub mapped_bytes: u64,
    /// How many of them its prefault thread has been through.
    pub prefaulted_bytes: u64,
    /// Its counters, see [`crate::device1::Device1Proxy::statistics`].
    pub statistics: BTreeMap<String, u64>,
}

/// What a core does for its owner.
pub trait Control: Send + Sync + 'static {
    /// See [`CoreProxy::pause`].
    fn pause(&self) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`CoreProxy::resume`].
    fn resume(&self) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`CoreProxy::reset`].
    fn reset(&self) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`CoreProxy::power_button`].
    fn power_button(&self) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`CoreProxy::terminate`].
    fn terminate(&self) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`CoreProxy::attach_backend`].
    fn attach_backend(
        &self,
        device: &str,
        socket: OwnedFd,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`CoreProxy::attach_link`].
    fn attach_link(
        &self,
        device: &str,
        socket: OwnedFd,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`CoreProxy::device_status`].
    fn device_status(
        &self,
        device: &str,
    ) -> impl Future<Output = Result<DeviceStatus, Error>> + Send;
    /// See [`CoreProxy::balloon`].
    fn balloon(
        &self,
        device: &str,
    ) -> impl Future<Output = Result<(u64, u64, BTreeMap<String, u64>), Error>> + Send;
    /// See [`CoreProxy::set_balloon_target`].
    fn set_balloon_target(
        &self,
        device: &str,
        bytes: u64,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`CoreProxy::balloon_statistics_interval`].
    fn balloon_statistics_interval(
        &self,
        device: &str,
    ) -> impl Future<Output = Result<u32, Error>> + Send;
    /// See [`CoreProxy::set_balloon_statistics_interval`].
    fn set_balloon_statistics_interval(
        &self,
        device: &str,
        seconds: u32,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`CoreProxy::devices`]. Must not block.
    fn devices(&self) -> Vec<String>;
    /// See [`CoreProxy::attach_console`].
    fn attach_console(&self, socket: OwnedFd) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`CoreProxy::state`]. Must not block.
    fn state(&self) -> State;
}

/// The interface on a [`Control`].
#[derive(Debug)]
pub struct Core<C>(pub C);

/// One machine.
#[zbus::interface(
    name = "org.godwit.Core1",
    proxy(
        default_path = "/org/godwit/Core1",
        default_service = "org.godwit.Core1"
    )
)]
impl<C: Control> Core<C> {
    /// Stops all vCPUs, then all devices. Does nothing to a paused machine.
    async fn pause(&self) -> Result<(), Error> {
        self.0.pause().await
    }

    /// Starts devices, then vCPUs. Does nothing to a running machine.
    async fn resume(&self) -> Result<(), Error> {
        self.0.resume().await
    }

    /// Starts again from the boot of the kernel.
    async fn reset(&self) -> Result<(), Error> {
        self.0.reset().await
    }

    /// Presses the power button; what follows is up to the guest.
    async fn power_button(&self) -> Result<(), Error> {
        self.0.power_button().await
    }

    /// Ends the machine at once, without asking the guest.
    async fn terminate(&self) -> Result<(), Error> {
        self.0.terminate().await
    }

    /// Gives a device a new back-end, on a connected socket, in the place of the one that it
    /// has or had, and sets it up. Requests in flight are done by it.
    async fn attach_backend(&self, device: &str, socket: OwnedFd) -> Result<(), Error> {
        self.0.attach_backend(device, socket).await
    }

    /// Gives the core its end of a new connection to a device's process, whose other end the
    /// process has as its `--control-fd`, in the place of the one that it has or had.
    async fn attach_link(&self, device: &str, socket: OwnedFd) -> Result<(), Error> {
        self.0.attach_link(device, socket).await
    }

    /// How a device does. Takes at most two seconds, whatever its process does.
    #[zbus(out_args("status"))]
    async fn device_status(&self, device: &str) -> Result<DeviceStatus, Error> {
        self.0.device_status(device).await
    }

    /// How large a balloon is: bytes that the host wants, bytes that the guest says it has given,
    /// and what the guest says of its memory
    /// ([`crate::balloon1::Balloon1Proxy::guest_statistics`]). Takes at most a second.
    #[zbus(out_args("target", "actual", "statistics"))]
    async fn balloon(&self, device: &str) -> Result<(u64, u64, BTreeMap<String, u64>), Error> {
        self.0.balloon(device).await
    }

    /// Asks the guest to give so many bytes to the host, by a balloon: a multiple of 4096. Takes
    /// at most a second; the guest gives them by and by.
    async fn set_balloon_target(&self, device: &str, bytes: u64) -> Result<(), Error> {
        self.0.set_balloon_target(device, bytes).await
    }

    /// Seconds between two questions of a balloon for what its guest says of its memory; 0: none is
    /// asked. Takes at most a second.
    #[zbus(out_args("seconds"))]
    async fn balloon_statistics_interval(&self, device: &str) -> Result<u32, Error> {
        self.0.balloon_statistics_interval(device).await
    }

    /// Has a balloon ask as often from now on, at most every 3600 seconds. Takes at most a second.
    async fn set_balloon_statistics_interval(
        &self,
        device: &str,
        seconds: u32,
    ) -> Result<(), Error> {
        self.0
            .set_balloon_statistics_interval(device, seconds)
            .await
    }

    /// Something in [`CoreProxy::device_status`] is new, other than counters; at most four times
    /// a second for each device.
    #[zbus(signal)]
    pub async fn device_changed(emitter: &SignalEmitter<'_>, device: &str) -> zbus::Result<()>;

    /// The names of its devices, in the order of the machine's definition.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn devices(&self) -> Vec<String> {
        self.0.devices()
    }

    /// Gives the first serial port a new outside, in the place of the one that it has or had.
    /// What the guest printed while there was none comes first.
    async fn attach_console(&self, socket: OwnedFd) -> Result<(), Error> {
        self.0.attach_console(socket).await
    }

    /// Where the machine is in its life: `running`, `paused` or `ended`.
    #[zbus(property)]
    async fn state(&self) -> State {
        self.0.state()
    }
}
