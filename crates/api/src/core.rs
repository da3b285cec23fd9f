//! `org.godwit.Core1` at `/org/godwit/Core1`: one machine, seen from who started it.

use std::future::Future;

use serde::{Deserialize, Serialize};
use zbus::{OwnedFd, OwnedVariant, Type, Variant};

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
