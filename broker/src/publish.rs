//! What changed, on its way to the bus: objects that come and go, properties, jobs.
//!
//! Who changes something says only what; one task compares with what the bus was told last,
//! and tells the difference, in the order in which things were said.

use api::balloon1::Status;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

use crate::name::{DeviceId, MachineName};

/// Something that the bus is to know.
#[derive(Debug)]
pub enum Change {
    /// A machine came, or has other devices.
    Added(MachineName, oneshot::Sender<()>),
    /// A machine is forgotten.
    Removed(MachineName, oneshot::Sender<()>),
    /// Properties of a machine, and perhaps of its devices.
    Machine(MachineName),
    /// Properties of a device.
    Device(MachineName, DeviceId),
    /// A balloon, as it is now.
    Balloon(MachineName, DeviceId, Status),
    /// A machine that is forgotten when it has ended has ended.
    Ended(MachineName),
    /// A job began.
    JobNew(u32, oneshot::Sender<()>),
    /// Properties of a job.
    Job(u32),
    /// A job ended.
    JobEnded(u32),
    /// A job is forgotten.
    JobForgotten(u32),
}

/// Takes changes. Clones are the same.
#[derive(Clone, Debug)]
pub struct Publisher(UnboundedSender<Change>);

/// A publisher, and where what it is told comes out.
pub fn channel() -> (Publisher, UnboundedReceiver<Change>) {
    let (sender, receiver) = unbounded_channel();
    (Publisher(sender), receiver)
}

impl Publisher {
    /// Passes a change on. Unbounded: changes are made by calls and processes, each of which
    /// is bounded.
    pub fn send(&self, change: Change) {
        // Without a bus there is nobody to tell.
        let _ = self.0.send(change);
    }

    /// Passes a change on, and waits until the bus knows.
    pub async fn tell(&self, change: impl FnOnce(oneshot::Sender<()>) -> Change) {
        let (done, told) = oneshot::channel();
        self.send(change(done));
        // Without a bus there is nobody to wait for.
        let _ = told.await;
    }
}
