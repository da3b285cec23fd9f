//! The machine's side of a migration: what its main thread does for one.

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use api::Error as CallError;
use api::core::State;
use migration::channel::Cancel;
use migration::commit::Source;
use migration::link::LinkError;
use migration::report::Report;
use migration::wire::{CpuFeatures, Processor, Tsc};
use tokio::sync::{oneshot, watch};

use super::event::{Command, CurrentMigration, Event, Events, Reins};
use super::{Machine, MachineError, Reason, VCPU_DEADLINE, chain};
use crate::hypervisor::{MemorySlots, VcpuSavedState};
use crate::migration::MigrationError;
use crate::migration::definition::define;
use crate::migration::destination::{self, Arriving, NewHost};
use crate::migration::ram::CoreWrites;
use crate::migration::saved_state::{CoreState, DeviceWiring, from_blob, to_blob};
use crate::migration::setup::{MaxDowntime, MigrateOptions, Sockets};
use crate::migration::snapshot::{self, Files, Subject, Writing, Written};
use crate::migration::source::{self, Job, View};
use crate::migration::status::{Outcome, Progress, Status, Verdict};
use crate::migration::switchover::{Ended, Host, Switchover};
use crate::migration::unit::Unit;
use crate::migration::without::Without;
use crate::remote::device1::DeviceLinks;

/// How long a core whose machine has moved stays, so that its owner can hear it.
const LINGER: Duration = Duration::from_secs(5);

/// What the owner's file is told when a machine has come and, from then on, is only here.
const ARRIVED: &str = "arrived\n";

/// A machine that is not booted.
#[derive(Debug)]
pub enum Incoming {
    /// It comes from another core.
    Migration {
        /// Its way.
        sockets: Sockets,
        /// The other core's memory, where both map the same.
        memory: Option<OwnedFd>,
    },
    /// It is in files.
    Snapshot(Files),
}

impl Incoming {
    /// The memory that it has already.
    pub(super) fn memory(&self) -> Option<&OwnedFd> {
        match self {
            Self::Migration { memory, .. } => memory.as_ref(),
            Self::Snapshot(_) => None,
        }
    }
}

/// What the owner wants.
#[derive(Debug)]
pub struct Request {
    /// The way.
    pub sockets: Sockets,
    /// How.
    pub options: MigrateOptions,
}

/// What came of copying a running machine.
pub struct Copied(Result<Box<Switchover>, MigrationError>);

impl fmt::Debug for Copied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = self.0.as_ref().err();
        f.debug_tuple("Copied").field(&error).finish()
    }
}

/// Where the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Here,
    /// Whether it ran before.
    Undecided(bool),
    /// Elsewhere, and this core goes then.
    Gone(Instant),
}

/// What a machine's migrations are made of.
pub(super) struct Parts {
    pub(super) events: Events,
    pub(super) slots: Arc<MemorySlots>,
    pub(super) units: Vec<Arc<Unit>>,
    pub(super) cpus: u32,
    pub(super) cpu_features: Vec<CpuFeatures>,
    pub(super) processor: Processor,
    pub(super) tsc: Option<Tsc>,
    pub(super) core_writes: CoreWrites,
    pub(super) links: Arc<DeviceLinks>,
    pub(super) incoming: Option<Incoming>,
    pub(super) without: Without,
    /// The owner's file, which is told that the machine has come.
    pub(super) end: Option<File>,
}

/// What a machine keeps for its migrations.
pub(super) struct Moving {
    place: Place,
    pub(super) parts: Parts,
    pub(super) status: watch::Sender<Status>,
    active: bool,
    /// The machine is put into files.
    stands_still: bool,
}

/// What the control thread may see and do while the main thread is busy.
#[derive(Clone)]
pub struct Watcher {
    /// Progress and outcome.
    pub status: watch::Receiver<Status>,
    /// Ends the migration.
    pub current: CurrentMigration,
    /// Guest memory.
    pub memory: Arc<File>,
}

impl Moving {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            place: Place::Here,
            status: watch::Sender::new(Status {
                active: parts.incoming.is_some(),
                ..Status::default()
            }),
            parts,
            active: false,
            stands_still: false,
        }
    }

    /// For the control thread; `memory` is the machine's.
    pub(super) fn watcher(&self, memory: &Arc<File>) -> Watcher {
        Watcher {
            status: self.status.subscribe(),
            current: self.parts.events.migration().clone(),
            memory: Arc::clone(memory),
        }
    }

    /// Refuses what only a machine that is here can do.
    pub(super) fn check_here(&self) -> Result<(), MachineError> {
        match self.place {
            Place::Here => Ok(()),
            Place::Undecided(_) => Err(MachineError::Elsewhere(
                "may run at its destination: decide that first",
            )),
            Place::Gone(_) => Err(MachineError::Elsewhere("has moved")),
        }
    }

    /// When this core goes because its machine is elsewhere.
    pub(super) fn goes_at(&self) -> Option<Instant> {
        match self.place {
            Place::Gone(at) => Some(at),
            _ => None,
        }
    }

    /// Whether the machine is here and may be reset.
    pub(super) fn is_here(&self) -> bool {
        self.check_here().is_ok() && self.check_moves_on().is_ok()
    }

    /// Refuses what cannot be while the machine is put into files.
    pub(super) fn check_moves_on(&self) -> Result<(), MachineError> {
        match self.stands_still {
            true => Err(MachineError::Migrating),
            false => Ok(()),
        }
    }

    fn begin(&mut self, phase: &'static str, reins: Reins) {
        self.status.send_modify(|status| {
            *status = Status {
                active: true,
                progress: Progress {
                    phase,
                    converging: true,
                    ..Progress::default()
                },
                outcome: None,
            };
        });
        self.parts.events.migration().set(Some(reins));
        self.active = true;
    }

    fn end(&mut self, outcome: Outcome) {
        self.active = false;
        self.parts.events.migration().set(None);
        self.status.send_modify(|status| {
            status.active = false;
            status.progress.phase = "over";
            status.outcome = Some(outcome);
        });
    }
}

impl Machine {
    /// Waits for a machine from another core or from files, which is then this one.
    pub(super) fn arrive(&mut self, incoming: Incoming) -> Result<(), Reason> {
        self.receive(incoming)?;
        self.moving.end(Outcome {
            result: Verdict::Arrived,
            reason: None,
            report: Report::default(),
        });
        Ok(())
    }

    fn receive(&mut self, incoming: Incoming) -> Result<(), Reason> {
        let failed = |error: &MigrationError| match error {
            MigrationError::Link(LinkError::Cancelled) => Reason::Terminated,
            error => Reason::Internal(format!("the machine did not arrive: {}", chain(error))),
        };
        let (sockets, shared) = match incoming {
            Incoming::Migration { sockets, memory } => (sockets, memory.is_some()),
            Incoming::Snapshot(files) => {
                let subject = self.subject();
                return snapshot::restore(files, &subject, self).map_err(|error| failed(&error));
            }
        };
        let cancel = Cancel::new().map_err(|error| Reason::Internal(error.to_string()))?;
        self.moving
            .parts
            .events
            .migration()
            .set(Some(cancel.clone().into()));
        let arriving = Arriving {
            sockets,
            shared_memory: shared,
            memory: Arc::clone(&self.memory),
            units: self.moving.parts.units.clone(),
            definition: self.definition(),
            without: self.moving.parts.without.clone(),
            cancel,
        };
        let result = destination::receive(arriving, self);
        self.moving.parts.events.migration().set(None);
        result.map_err(|error| failed(&error))
    }

    fn subject(&self) -> Subject {
        Subject {
            memory: Arc::clone(&self.memory),
            slots: Arc::clone(&self.moving.parts.slots),
            units: self.moving.parts.units.clone(),
            definition: self.definition(),
        }
    }

    /// Stops the machine and begins to put it into files, on a thread of its own; it goes on
    /// afterwards.
    pub(super) fn snapshot(&mut self, files: Files) -> Result<(), MachineError> {
        self.moving.check_here()?;
        self.check_movable()?;
        if self.moving.active {
            return Err(MachineError::Migrating);
        }
        let cancel = Cancel::new().map_err(no_thread)?;
        let (begun, begins) = channel::<Box<Writing>>();
        let events = self.moving.parts.events.clone();
        let (status, end) = (self.moving.status.clone(), cancel.clone());
        let write = move || {
            if let Ok(writing) = begins.recv() {
                events.send(Event::Written(Box::new(writing.write(&end, &status))));
            }
        };
        let thread = thread::Builder::new().name("snapshot".into());
        thread.spawn(write).map_err(no_thread)?;
        let writing = snapshot::begin(files, self.subject(), self)?;
        self.moving.begin("writing", cancel.into());
        self.moving.stands_still = true;
        // It waits for it.
        let _ = begun.send(writing);
        Ok(())
    }

    /// The machine was put into files, or was not.
    pub(super) fn written(&mut self, written: Written) {
        self.moving.stands_still = false;
        let result = written.end(self);
        let reason = result.err().map(|error| chain(&error));
        self.moving.end(Outcome::kept(reason));
    }

    fn definition(&self) -> migration::wire::Definition {
        let moving = &self.moving;
        define(
            moving.parts.cpus,
            &moving.parts.cpu_features,
            &moving.parts.processor,
            moving.parts.tsc,
            &self.memory,
            &moving.parts.units,
        )
    }

    /// Refuses what has a device that stays where it is.
    fn check_movable(&self) -> Result<(), MachineError> {
        let Some(device) = self.pci_devices.first() else {
            return Ok(());
        };
        Err(MachineError::from(MigrationError::CannotMove {
            device: device.id().to_owned(),
            why: "it is a PCI device of vfio-user",
        }))
    }

    /// Starts to copy the machine, on a thread of its own.
    pub(super) fn migrate(&mut self, request: Request) -> Result<(), MachineError> {
        self.moving.check_here()?;
        self.check_movable()?;
        if self.moving.active {
            return Err(MachineError::Migrating);
        }
        let cancel = Cancel::new().map_err(no_thread)?;
        let max_downtime = MaxDowntime::new(&request.options);
        let reins = Reins {
            cancel: cancel.clone(),
            max_downtime: Some(max_downtime.clone()),
        };
        let job = Job {
            view: View {
                memory: Arc::clone(&self.memory),
                slots: Arc::clone(&self.moving.parts.slots),
                units: self.moving.parts.units.clone(),
                definition: self.definition(),
                core_writes: self.moving.parts.core_writes.clone(),
                links: Arc::clone(&self.moving.parts.links),
                throttle: self.vcpus.throttle(),
            },
            sockets: request.sockets,
            options: request.options,
            max_downtime,
            without: self.moving.parts.without.clone(),
            cancel,
            status: self.moving.status.clone(),
        };
        self.moving.begin("negotiating", reins);
        let events = self.moving.parts.events.clone();
        let started = thread::Builder::new()
            .name("migration".into())
            .spawn(move || events.send(Event::Copied(Copied(source::run(job)))));
        match started {
            Ok(_) => Ok(()),
            Err(source) => {
                let error = no_thread(source);
                self.moving.end(Outcome::kept(Some(chain(&error))));
                Err(error)
            }
        }
    }

    /// The machine was copied while it ran, or was not.
    pub(super) fn copied(&mut self, copied: Copied) {
        let ended = match copied.0 {
            Ok(switchover) => switchover.run(self),
            Err(error) => Ended {
                state: Source::Kept,
                error: Some(error),
                report: Report::default(),
            },
        };
        let ran = self.is(State::Running);
        let (result, place) = match ended.state {
            Source::Gone => (Verdict::Moved, Place::Gone(Instant::now() + LINGER)),
            Source::Unresolved => (Verdict::Undecided, Place::Undecided(ran)),
            _ => (Verdict::Kept, Place::Here),
        };
        self.moving.place = place;
        if place != Place::Here {
            self.state.send_replace(State::Paused);
        }
        self.moving.end(Outcome {
            result,
            reason: ended.error.map(|error| chain(&error)),
            report: ended.report,
        });
    }

    /// The owner knows whether the machine runs elsewhere.
    pub(super) fn decide(&mut self, runs_there: bool) -> Result<(), MachineError> {
        let Place::Undecided(ran) = self.moving.place else {
            return Err(MachineError::Elsewhere("is where everybody knows"));
        };
        let result = match runs_there {
            true => Verdict::Moved,
            false => Verdict::Kept,
        };
        self.moving.status.send_modify(|status| {
            if let Some(outcome) = &mut status.outcome {
                outcome.result = result;
            }
        });
        if runs_there {
            self.moving.place = Place::Gone(Instant::now());
            return Ok(());
        }
        self.moving.place = Place::Here;
        if ran {
            return self.resume();
        }
        let mut units = self.moving.parts.units.iter();
        Ok(units.try_for_each(|unit| unit.take_up(false))?)
    }
}

impl Host for Machine {
    fn stop_vcpus(&mut self) -> Result<(), MigrationError> {
        Ok(self.vcpus.pause(VCPU_DEADLINE)?)
    }

    fn pending_request(&mut self) -> Option<String> {
        let mut pending = None;
        while let Ok(event) = self.events.try_recv() {
            match &event {
                Event::Guest(request) => pending = Some(format!("asked for {request:?}")),
                Event::Vcpu(vcpu, ended) => pending = Some(format!("ended vCPU {vcpu}: {ended}")),
                Event::Terminated | Event::Command(Command::Terminate, _) => {
                    pending = Some("was terminated".into());
                }
                _ => {}
            }
            self.deferred.push_back(event);
        }
        pending
    }

    fn save_core(&mut self, devices: Vec<DeviceWiring>) -> Result<CoreState, MigrationError> {
        Ok(CoreState {
            running: self.is(State::Running),
            clock_age_us: 0,
            vcpus: self.vcpus.each(VCPU_DEADLINE, |vcpu| vcpu.save())?,
            vm: self.vm.save()?,
            serial: self.platform.serial.save(),
            cmos: self.platform.cmos.save(),
            power: self.platform.power.save(),
            fw_cfg: self.platform.fw_cfg.as_ref().map(|device| device.save()),
            root: self.root.save(),
            bridge: self.bridge.save(),
            devices,
        })
    }

    fn run(&mut self) {
        if self.is(State::Running) {
            self.vcpus.run();
        }
    }

    fn stay_paused(&mut self) {
        self.state.send_replace(State::Paused);
    }

    fn ran(&self) -> bool {
        self.is(State::Running)
    }
}

impl NewHost for Machine {
    fn load_core(&mut self, core: CoreState) -> Result<(), MigrationError> {
        let expected = self.moving.parts.cpus as usize;
        if core.vcpus.len() != expected {
            return Err(MigrationError::Vcpus {
                found: core.vcpus.len(),
                expected,
            });
        }
        self.vm.restore(&core.vm)?;
        let vcpus = core.vcpus;
        let khz = vcpus.first().and_then(|vcpu| vcpu.tsc_khz);
        if let (Some(tsc), Some(khz)) = (&mut self.moving.parts.tsc, khz) {
            tsc.khz = khz;
        }
        self.vcpus.each(VCPU_DEADLINE, move |vcpu| {
            match vcpus.get(vcpu.id() as usize) {
                Some(state) => vcpu.restore(state).map(|()| vcpu.was_stopped()),
                None => Ok(()),
            }
        })?;
        self.platform.serial.restore(&core.serial)?;
        self.platform.cmos.restore(&core.cmos)?;
        self.platform.power.restore(&core.power)?;
        match (&self.platform.fw_cfg, core.fw_cfg) {
            (Some(device), Some(state)) => device.restore(state),
            (None, None) => {}
            (here, _) => {
                let here = here.is_some();
                return Err(MigrationError::Firmware { here });
            }
        }
        self.root.restore(&core.root);
        Ok(self.bridge.restore(&core.bridge)?)
    }

    fn rehearse(&mut self) -> Result<(), MigrationError> {
        let mut core = self.save_core(Vec::new())?;
        let vcpus = core.vcpus.iter_mut();
        vcpus.for_each(VcpuSavedState::leave_counter_out);
        self.load_core(from_blob(&to_blob(&core)?)?)
    }

    fn arrived(&mut self) -> Result<(), MigrationError> {
        self.moving.parts.end.as_mut().map_or(Ok(()), note_arrival)
    }

    fn run(&mut self, running: bool) {
        if running {
            self.vcpus.run();
            self.state.send_replace(State::Running);
        }
    }
}

/// Tells the owner's file that the machine is here. Who has appended to it before does not await it
/// any more.
fn note_arrival(end: &mut File) -> Result<(), MigrationError> {
    let mut first = [0; ARRIVED.len()];
    end.write_all(ARRIVED.as_bytes())
        .and_then(|()| end.read_exact_at(&mut first, 0))
        .map_err(|source| MigrationError::System {
            what: "the owner's file",
            source,
        })?;
    match first == *ARRIVED.as_bytes() {
        true => Ok(()),
        false => Err(MigrationError::NotAwaited),
    }
}

/// A failure to begin something.
fn no_thread(source: std::io::Error) -> MachineError {
    MachineError::from(MigrationError::System {
        what: "a thread for the migration",
        source,
    })
}

/// Answers a caller, who may have stopped waiting.
pub(super) fn answer(to: oneshot::Sender<Result<(), CallError>>, result: Result<(), MachineError>) {
    let _ = to.send(result.map_err(CallError::from));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_arrives_unless_it_is_not_awaited_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("end");
        let open = || {
            let mut options = File::options();
            options.read(true).append(true).create(true).open(&path)
        };
        let (mut core, mut owner) = (open().unwrap(), open().unwrap());
        note_arrival(&mut core).unwrap();
        owner.write_all(b"unawaited\n").unwrap();
        note_arrival(&mut core).unwrap();
        std::fs::write(&path, "unawaited\n").unwrap();
        let error = note_arrival(&mut core).unwrap_err();
        assert!(matches!(error, MigrationError::NotAwaited), "{error}");
    }
}
