//! One machine: what the bus shows of it, and the task that makes, watches and ends it.
//!
//! ```text
//!  calls ──► Machine (definition, status) ◄── writes ── Supervisor, one task while it runs
//!                 │ commands                               │
//!                 └────────────────────────────────────────┘
//! ```
//! | module | what |
//! |---|---|
//! | `start` | from a definition to a running machine, or nothing |
//! | `instance` | one generation of processes |
//! | `claim` | the one job that works on it |
//! | `control` | what is wanted of it while it runs |
//! | `place` | whether it is here |
//! | `core` | the core's command line, and the connection to it |
//! | `supervisor` | the task: ends of processes, restarts, successions |
//! | `device` | one device's process, and when it is tried again |
//! | `foreign` | back-ends that are not ours |
//! | `state` | what a later broker needs to adopt it |
//! | `statistics` | what its processes count and use |
//! | `balloon` | memory that its guest gives |
//! | `adopt` | taking over what a killed broker left |

pub(crate) mod adopt;
mod balloon;
mod claim;
mod control;
mod core;
mod device;
mod foreign;
mod instance;
mod place;
pub(crate) mod start;
mod state;
mod statistics;
mod supervisor;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::Error;
use api::core::CoreProxy;
use api::device::State as DeviceState;
use api::machine::{Facts, State};
use api::path;
use tokio::sync::{mpsc, watch};

pub(crate) use self::instance::Instance;
pub use self::state::MachineState;
use self::supervisor::Command;
use crate::console::Console;
use crate::definition::{Definition, Device};
use crate::jobs::Job;
use crate::name::MachineName;
use crate::process::ProcessId;
use crate::publish::{Change, Publisher};

/// What a device does now.
#[derive(Clone, Debug)]
pub struct DeviceStatus {
    /// How its back-end does.
    pub state: DeviceState,
    /// Why it was restarted or failed last.
    pub reason: String,
    /// Its process.
    pub process: Option<ProcessId>,
    /// How many times a new process took over.
    pub reconnects: u32,
}

impl DeviceStatus {
    const OFF: Self = Self {
        state: DeviceState::Off,
        reason: String::new(),
        process: None,
        reconnects: 0,
    };
}

/// Of what is only there while the machine runs.
#[derive(Clone, Debug)]
struct Live {
    core: CoreProxy<'static>,
    console: Console,
    commands: mpsc::Sender<Command>,
}

#[derive(Debug)]
struct Inner {
    definition: Arc<Definition>,
    state: State,
    reason: String,
    process: Option<ProcessId>,
    started_usec: u64,
    devices: Vec<DeviceStatus>,
    job: Option<Arc<Job>>,
    live: Option<Live>,
}

/// A machine.
#[derive(Debug)]
pub struct Machine {
    name: MachineName,
    uuid: String,
    /// It is forgotten when it has ended.
    pub transient: bool,
    /// It comes from a file in the configuration folder.
    pub from_file: bool,
    /// Its file is gone: it is forgotten when it has ended.
    orphan: AtomicBool,
    publisher: Publisher,
    inner: Mutex<Inner>,
    /// Whether none of its processes is left.
    gone: watch::Sender<bool>,
    /// Whether a job works on it.
    busy: watch::Sender<bool>,
    /// Whether it moves within this host: another generation of processes may take its place.
    leaving: watch::Sender<bool>,
    /// Its core lives and does not answer.
    silent: watch::Sender<bool>,
    /// It has not yet come here.
    new: AtomicBool,
    /// It is at another host, or may be.
    away: AtomicBool,
}

impl Machine {
    /// A machine that does not run.
    pub fn new(
        name: MachineName,
        definition: Definition,
        transient: bool,
        from_file: bool,
        publisher: Publisher,
    ) -> Arc<Self> {
        let devices = vec![DeviceStatus::OFF; definition.devices.len()];
        Arc::new(Self {
            name,
            uuid: definition.uuid.clone(),
            transient,
            from_file,
            orphan: AtomicBool::new(false),
            publisher,
            inner: Mutex::new(Inner {
                definition: Arc::new(definition),
                state: State::Off,
                reason: String::new(),
                process: None,
                started_usec: 0,
                devices,
                job: None,
                live: None,
            }),
            gone: watch::Sender::new(true),
            busy: watch::Sender::new(false),
            leaving: watch::Sender::new(false),
            silent: watch::Sender::new(false),
            new: AtomicBool::new(false),
            away: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something that the bus shows.
    fn update<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let value = change(&mut self.lock());
        self.publisher.send(Change::Machine(self.name.clone()));
        value
    }

    /// Its name.
    pub fn name(&self) -> &MachineName {
        &self.name
    }

    /// Its state.
    pub fn state(&self) -> State {
        self.lock().state
    }

    /// Its definition.
    pub fn definition(&self) -> Arc<Definition> {
        Arc::clone(&self.lock().definition)
    }

    /// Gives it another definition, for its next start.
    ///
    /// # Errors
    /// It runs.
    pub fn redefine(&self, definition: Definition) -> Result<(), Error> {
        self.update(|inner| {
            if !matches!(inner.state, State::Off | State::Failed) {
                return Err(self.wrong_state(inner.state, "redefined"));
            }
            inner.devices = vec![DeviceStatus::OFF; definition.devices.len()];
            inner.definition = Arc::new(definition);
            Ok(())
        })
    }

    /// Notes whether the file that declared it is gone.
    pub(crate) fn set_orphan(&self, orphan: bool) {
        self.orphan.store(orphan, Ordering::SeqCst);
    }

    /// Whether it is forgotten when it has ended.
    fn goes_with_its_end(&self) -> bool {
        self.transient || self.orphan.load(Ordering::SeqCst)
    }

    /// A device and what it does, by its place in the definition.
    pub fn device(&self, at: usize) -> Option<(Device, DeviceStatus)> {
        let inner = self.lock();
        let device = inner.definition.devices.get(at)?.clone();
        Some((device, inner.devices.get(at)?.clone()))
    }

    /// What the bus shows.
    pub fn facts(&self) -> Facts {
        let inner = self.lock();
        let definition = &inner.definition;
        let id = |device: &Device| path::device(self.name.as_str(), device.id.as_str());
        let process = inner.process.as_ref();
        Facts {
            name: self.name.to_string(),
            uuid: self.uuid.clone(),
            state: inner.state,
            reason: inner.reason.clone(),
            unit: process
                .map(|process| process.unit.clone())
                .unwrap_or_default(),
            process: process.map_or(0, |process| process.pid),
            devices: definition.devices.iter().map(id).collect(),
            job: inner
                .job
                .as_ref()
                .map_or_else(path::nothing, |job| path::job(job.id())),
            vcpus: definition.vcpus,
            memory: definition.memory,
            started_usec: inner.started_usec,
            transient: self.transient,
            autostart: definition.autostart,
            definition: definition.to_dictionary(),
        }
    }

    fn wrong_state(&self, state: State, what: &str) -> Error {
        Error::InvalidState(format!(
            "{} is {}: it cannot be {what} now",
            self.name,
            state.as_str()
        ))
    }

    /// Refuses what is not possible in this state.
    ///
    /// # Errors
    /// The state is none of `possible`.
    pub fn must_be(&self, possible: &[State], what: &str) -> Result<(), Error> {
        let state = self.state();
        if possible.contains(&state) {
            Ok(())
        } else {
            Err(self.wrong_state(state, what))
        }
    }

    /// Refuses a machine that nobody can move.
    ///
    /// # Errors
    /// It has a device that cannot move.
    pub(crate) fn must_be_movable(&self) -> Result<(), Error> {
        self.definition().must_be_movable(&self.name)
    }

    /// Notes what the core says of itself.
    pub(crate) fn set_running_state(&self, state: api::core::State) {
        self.update(|inner| match (inner.state, state) {
            (State::Running | State::Paused, api::core::State::Running) => {
                inner.state = State::Running;
            }
            (State::Running | State::Paused, api::core::State::Paused) => {
                inner.state = State::Paused;
            }
            _ => {}
        });
    }

    /// Notes that it failed while no supervisor watched it.
    pub(crate) fn set_failed(&self, reason: String) {
        self.update(|inner| {
            inner.state = State::Failed;
            inner.reason = reason;
            inner.process = None;
            inner.live = None;
            inner.devices.fill(DeviceStatus::OFF);
        });
        self.gone.send_replace(true);
    }

    /// Says why it is in its state.
    pub(crate) fn set_reason(&self, reason: String) {
        self.update(|inner| inner.reason = reason);
    }

    /// Waits until none of its processes is left.
    pub(crate) async fn gone(&self) {
        let mut gone = self.gone.subscribe();
        // The sender lives as long as this machine.
        let _ = gone.wait_for(|gone| *gone).await;
    }
}
