//! What reaches the machine's main thread, from whom.

use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migration::channel::Cancel;
use tokio::sync::oneshot;

use super::chain;
use super::migrate::{Copied, Request as MigrateRequest};
use super::request::{Request, RequestSink};
use crate::hypervisor::{Ended, VcpuEvents};
use crate::migration::setup::MaxDowntime;
use crate::migration::snapshot::{Files, Written};
use crate::transport::TroubleSink;

/// Something that the main thread must act on.
#[derive(Debug)]
pub enum Event {
    /// The guest wants something of its machine.
    Guest(Request),
    /// A vCPU does not run on.
    Vcpu(u32, Ended),
    /// A device does not work any more; its driver has been told, if it can be.
    Trouble {
        /// Which one.
        device: String,
        /// What happened, with its causes.
        why: String,
    },
    /// The owner wants something; it waits for the answer.
    Command(Command, oneshot::Sender<Result<(), api::Error>>),
    /// The owner hands over one end of a connection; it waits for the answer.
    Attach(Attachment, oneshot::Sender<Result<(), api::Error>>),
    /// The owner wants the machine to move.
    Migrate(Box<MigrateRequest>, oneshot::Sender<Result<(), api::Error>>),
    /// The owner wants the machine in files.
    Snapshot(Box<Files>, oneshot::Sender<Result<(), api::Error>>),
    /// Everything that can be moved from a running machine has been.
    Copied(Copied),
    /// What was to be in files is, or is not.
    Written(Box<Written>),
    /// The owner knows where the machine is.
    Decide(bool, oneshot::Sender<Result<(), api::Error>>),
    /// The process was told to end.
    Terminated,
    /// The host was asked to press the power button.
    PowerButton,
}

/// What an owner can hand over, see [`api::core::Control`].
#[derive(Debug)]
pub enum Attachment {
    /// A connection to a back-end.
    Backend {
        /// Name of the device.
        device: String,
        /// The connection.
        socket: OwnedFd,
    },
    /// The outside of the first serial port.
    Console(OwnedFd),
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
pub struct Events {
    sender: Sender<Event>,
    migration: CurrentMigration,
}

/// What reaches the migration that is under way, whatever the main thread is doing.
#[derive(Clone, Debug, Default)]
pub struct CurrentMigration(Arc<Mutex<Option<Reins>>>);

/// What can be done with a migration that is under way.
#[derive(Clone, Debug)]
pub struct Reins {
    /// Ends it.
    pub cancel: Cancel,
    /// Of a machine that is copied from here: the longest stop that is wanted.
    pub max_downtime: Option<MaxDowntime>,
}

impl CurrentMigration {
    fn lock(&self) -> MutexGuard<'_, Option<Reins>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One has begun, or none is under way any more.
    pub fn set(&self, reins: Option<Reins>) {
        *self.lock() = reins;
    }

    /// Ends it. Whether there was one.
    pub fn cancel(&self) -> bool {
        self.lock().as_ref().map(|it| it.cancel.cancel()).is_some()
    }

    /// Changes the longest stop that is wanted. Whether there was something to stop.
    pub fn set_max_downtime(&self, time: Duration) -> bool {
        let reins = self.lock();
        let limit = reins.as_ref().and_then(|it| it.max_downtime.as_ref());
        limit.map(|limit| limit.set(time)).is_some()
    }
}

impl From<Cancel> for Reins {
    fn from(cancel: Cancel) -> Self {
        Self {
            cancel,
            max_downtime: None,
        }
    }
}

impl Events {
    /// Into `sender`'s channel.
    pub fn new(sender: Sender<Event>) -> Self {
        Self {
            sender,
            migration: CurrentMigration::default(),
        }
    }

    /// The migration that is under way.
    pub fn migration(&self) -> &CurrentMigration {
        &self.migration
    }

    /// Tells the main thread.
    pub fn send(&self, event: Event) {
        if matches!(
            event,
            Event::Terminated | Event::Command(Command::Terminate, _)
        ) {
            self.migration.cancel();
        }
        // A receiver that is gone has ended the machine already.
        let _ = self.sender.send(event);
    }
}

impl RequestSink for Events {
    fn request(&self, request: Request) {
        self.send(Event::Guest(request));
    }
}

impl TroubleSink for Events {
    fn trouble(&self, device: &str, error: &(dyn Error + 'static)) {
        self.send(Event::Trouble {
            device: device.into(),
            why: chain(error),
        });
    }
}

impl VcpuEvents for Events {
    fn ended(&self, vcpu: u32, ended: Ended) {
        self.send(Event::Vcpu(vcpu, ended));
    }
}
