//! What reaches the machine's main thread, from whom.

use std::sync::mpsc::Sender;

use api::Error;
use tokio::sync::oneshot;

use super::request::{Request, RequestSink};
use crate::hypervisor::{Ended, VcpuEvents};

/// Something that the main thread must act on.
#[derive(Debug)]
pub enum Event {
    /// The guest wants something of its machine.
    Guest(Request),
    /// A vCPU does not run on.
    Vcpu(u32, Ended),
    /// A device in another process is lost for good.
    DeviceLost {
        /// Which one.
        device: String,
        /// What happened, as one sentence.
        why: String,
    },
    /// The owner wants something; it waits for the answer.
    Command(Command, oneshot::Sender<Result<(), Error>>),
    /// The process was told to end.
    Terminated,
    /// The host was asked to press the power button.
    PowerButton,
}

/// What an owner can want, see [`api::core::Control`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Stop vCPUs and devices.
    Pause,
    /// Start them again.
    Resume,
    /// Boot again.
    Reset,
    /// Press the power button.
    PowerButton,
    /// End at once.
    Terminate,
}

/// Sends events to the main thread. Sending never blocks, and what comes after the
/// machine's end is dropped.
#[derive(Clone, Debug)]
pub struct Events(Sender<Event>);

impl Events {
    /// Into `sender`'s channel.
    pub fn new(sender: Sender<Event>) -> Self {
        Self(sender)
    }

    /// Tells the main thread.
    pub fn send(&self, event: Event) {
        // A receiver that is gone has ended the machine already.
        let _ = self.0.send(event);
    }
}

impl RequestSink for Events {
    fn request(&self, request: Request) {
        self.send(Event::Guest(request));
    }
}

impl VcpuEvents for Events {
    fn ended(&self, vcpu: u32, ended: Ended) {
        self.send(Event::Vcpu(vcpu, ended));
    }
}
