//! A machine in files, by the same streams: one frame for the core, memory channels, and each
//! device's own state.
//!
//! ```text
//! take     vCPUs stop ─ devices stop and save ─ memory ─ core's file ─ the machine goes on
//!          machine's thread ───────────────┤  a thread of its own  ├─ machine's thread
//! restore  core's frame, definition compared ─ devices load, memory ─ core ─ resumed by its owner
//! ```
//! What is written is whole when it ended without an error. What is read is checked as if
//! it came from a stranger.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use migration::channel::Cancel;
use migration::frame::{FrameError, FrameReader, FrameWriter};
use migration::link::LinkError;
use migration::report::Recorder;
use migration::schema::{Schema, SchemaError, UnitId};
use migration::wire::{Blob, Definition};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::barrier::{self, Barrier};
use super::destination::NewHost;
use super::error::system;
use super::ram::{DirtyTracker, RamReceiver, RamSender};
use super::saved_state::{CoreState, from_blob, to_blob};
use super::setup::Sockets;
use super::states::{Leaving, StateSockets};
use super::status::Status;
use super::switchover::Host;
use super::unit::{Crew, Unit};
use super::without::Without;
use super::{BLACKOUT_DEADLINE, MigrationError};
use crate::hypervisor::MemorySlots;
use crate::memory::Memory;

/// Name of the core's unit.
const CORE: &str = "core";

/// Open files that are, or will be, a machine.
#[derive(Debug)]
pub struct Files {
    /// For the core.
    pub core: OwnedFd,
    /// For memory.
    pub ram: Vec<OwnedFd>,
    /// For the devices, by id.
    pub states: BTreeMap<String, OwnedFd>,
}

/// The core's file, schema 2: the core in it is of schema 2 as well.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SnapshotState {
    definition: Definition,
    channels: u32,
    core: Blob,
}

impl Schema for SnapshotState {
    const KIND: &'static str = "snapshot";
    const NUMBER: u32 = 2;

    fn from_old(number: u32, payload: &[u8]) -> Result<Self, SchemaError> {
        match number {
            1 => Self::decode(Self::NUMBER, payload),
            _ => Err(SchemaError::unknown::<Self>(number)),
        }
    }
}

/// What a snapshot is taken of, or restored into.
pub struct Subject {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// KVM's slots.
    pub slots: Arc<MemorySlots>,
    /// Devices, in order.
    pub units: Vec<Arc<Unit>>,
    /// What the machine is.
    pub definition: Definition,
}

impl From<FrameError> for MigrationError {
    fn from(error: FrameError) -> Self {
        Self::System {
            what: "the core's file",
            source: std::io::Error::other(error),
        }
    }
}

/// A machine that stands still, and what of it is still to be written.
pub struct Writing {
    subject: Subject,
    core_file: OwnedFd,
    ram: Vec<OwnedFd>,
    core: Blob,
    /// Its threads save the devices.
    crew: Crew,
    leaving: Leaving,
}

/// Stops the machine, whose devices begin to save themselves. On a failure it goes on.
pub fn begin(
    files: Files,
    subject: Subject,
    host: &mut impl Host,
) -> Result<Box<Writing>, MigrationError> {
    let (core_file, ram, states) = split(files, &subject)?;
    let crew = Crew::start(&subject.units, &Without::default())
        .map_err(system("a thread for a device"))?;
    let begun = stop(&crew, &states, host);
    match begun {
        Ok((core, leaving)) => Ok(Box::new(Writing {
            subject,
            core_file,
            ram,
            core,
            crew,
            leaving,
        })),
        Err(error) => {
            go_on(&crew, host)?;
            Err(error)
        }
    }
}

fn stop(
    crew: &Crew,
    states: &StateSockets,
    host: &mut impl Host,
) -> Result<(Blob, Leaving), MigrationError> {
    host.stop_vcpus()?;
    if let Some(what) = host.pending_request() {
        return Err(MigrationError::Guest(what));
    }
    let recorder = &mut Recorder::start();
    let leaving = states.leave(crew, false, BLACKOUT_DEADLINE);
    let devices = leaving.stopped(BLACKOUT_DEADLINE, recorder)?;
    Ok((to_blob(&host.save_core(devices)?)?, leaving))
}

/// Lets devices and vCPUs run if they did before.
fn go_on(crew: &Crew, host: &mut impl Host) -> Result<(), MigrationError> {
    if !host.ran() {
        return Ok(());
    }
    let resumed = crew.each(|_, unit| {
        unit.stays();
        Ok(unit.pci.resume()?)
    });
    let recorder = &mut Recorder::start();
    let (names, deadline) = (crew.names(), BLACKOUT_DEADLINE);
    let resumed = barrier::wait(Barrier::F, "resume", names, &resumed, deadline, recorder);
    host.run();
    resumed.map(drop)
}

/// What came of writing; the machine still stands still.
pub struct Written {
    crew: Crew,
    result: Result<(), MigrationError>,
}

impl Writing {
    /// Writes it, on another thread than the machine's. `cancel` ends it, `status` shows how far it
    /// is.
    pub fn write(self, cancel: &Cancel, status: &watch::Sender<Status>) -> Written {
        let Self {
            subject,
            core_file,
            ram,
            core,
            crew,
            leaving,
        } = self;
        let result = write(&subject, ram, cancel, status).and_then(|channels| {
            leaving.saved(BLACKOUT_DEADLINE, &mut Recorder::start())?;
            let state = SnapshotState {
                definition: subject.definition,
                channels,
                core,
            };
            FrameWriter::begin(File::from(core_file), &core_unit()?, &state)?.finish()?;
            Ok(())
        });
        Written { crew, result }
    }
}

impl fmt::Debug for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Written").field(&self.result).finish()
    }
}

impl Written {
    /// Lets the machine go on if it ran. How writing ended.
    pub fn end(self, host: &mut impl Host) -> Result<(), MigrationError> {
        go_on(&self.crew, host).and(self.result)
    }
}

/// Writes memory; into how many files.
fn write(
    subject: &Subject,
    ram: Vec<OwnedFd>,
    cancel: &Cancel,
    status: &watch::Sender<Status>,
) -> Result<u32, MigrationError> {
    let channels = u32::try_from(ram.len()).unwrap_or(u32::MAX);
    let mut tracker = DirtyTracker::everything(&subject.memory, &subject.slots);
    let mut sender = RamSender::start(ram, &subject.memory.guest(), cancel)?;
    while let Some((page, words)) = tracker.take_last_chunk() {
        let holes = tracker.holes(page, &words)?;
        sender.send_with_holes(page, &words, &holes)?;
        status.send_modify(|status| {
            status.progress.sent_bytes = sender.sent();
            status.progress.remaining_bytes = tracker.pending_bytes();
        });
        if cancel.is_cancelled() {
            return Err(MigrationError::Link(LinkError::Cancelled));
        }
    }
    sender.end()?;
    Ok(channels)
}

/// Makes the machine that is in `files` this one. It is paused afterwards, whatever it was.
pub fn restore(
    files: Files,
    subject: &Subject,
    host: &mut impl NewHost,
) -> Result<(), MigrationError> {
    let (core_file, ram, states) = split(files, subject)?;
    let mut reader = FrameReader::begin(File::from(core_file))?;
    let state: SnapshotState = reader.structured(&core_unit()?)?;
    reader.finish()?;
    let mut reasons = subject.definition.obstacles(&state.definition);
    if state.channels as usize != ram.len() {
        reasons.push(format!(
            "memory is in {} files, {} were given",
            state.channels,
            ram.len()
        ));
    }
    if !reasons.is_empty() {
        return Err(MigrationError::Refused { reasons });
    }
    let crew = Crew::start(&subject.units, &Without::default())
        .map_err(system("a thread for a device"))?;
    let loaded = crew.each(move |number, unit| states.load(number, unit));
    let memory = RamReceiver::start(ram, &subject.memory.guest())?;
    let recorder = &mut Recorder::start();
    let deadline = BLACKOUT_DEADLINE;
    barrier::wait(
        Barrier::E,
        "load",
        crew.names(),
        &loaded,
        deadline,
        recorder,
    )?;
    memory.wait(BLACKOUT_DEADLINE)?;
    let mut core: CoreState = from_blob(&state.core)?;
    let devices = std::mem::take(&mut core.devices);
    host.load_core(core)?;
    super::destination::restore_devices(&subject.units, &devices)?;
    subject
        .units
        .iter()
        .try_for_each(|unit| unit.take_up(false))
}

fn core_unit() -> Result<UnitId, MigrationError> {
    UnitId::new(CORE).map_err(|error| MigrationError::Setup(error.to_string()))
}

/// The files of core, memory and devices, complete and no more.
fn split(
    files: Files,
    subject: &Subject,
) -> Result<(OwnedFd, Vec<OwnedFd>, StateSockets), MigrationError> {
    let mut sockets = Sockets {
        control: files.core,
        ram: files.ram,
        states: files.states,
    };
    let states = sockets.take_states(&subject.units, false)?;
    let states = StateSockets::new(states, &subject.units, &Without::default())
        .map_err(system("a copy of a device's file"))?;
    Ok((sockets.control, sockets.ram, states))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::saved_state::WiringState;

    #[test]
    fn golden_snapshots_are_loaded() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/compat");
        for number in 1..=SnapshotState::NUMBER {
            let path = format!("{folder}/snapshot-{number}.state");
            let golden = std::fs::read(&path).unwrap();
            let mut reader = FrameReader::begin(golden.as_slice()).unwrap();
            assert_eq!(reader.header().schema, number);
            let unit = UnitId::new(CORE).unwrap();
            let snapshot: SnapshotState = reader.structured(&unit).unwrap();
            reader.finish().unwrap();
            let core: CoreState = from_blob(&snapshot.core).unwrap();
            let wiring = WiringState {
                devices: core.devices.clone(),
            };
            let again: WiringState = from_blob(&to_blob(&wiring).unwrap()).unwrap();
            assert_eq!(again, wiring);
            if number == SnapshotState::NUMBER {
                assert_eq!(to_blob(&core).unwrap(), snapshot.core);
                let mut bytes = Vec::new();
                let writer = FrameWriter::begin(&mut bytes, &unit, &snapshot).unwrap();
                writer.finish().unwrap();
                assert!(bytes == golden, "it is written otherwise");
            }
        }
    }
}
