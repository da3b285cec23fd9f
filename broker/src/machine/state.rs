//! What a later broker needs to adopt a running machine.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Machine;
use super::device::RunningDevice;
use crate::definition::Definition;
use crate::folder;
use crate::process::{Process, ProcessId};
use crate::resources::FileIdentity;

/// Its file's name.
const STATE: &str = "state.json";

/// A running machine. Fields are only added.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// What it was started with.
    pub definition: Definition,
    /// It is forgotten when it has ended.
    pub transient: bool,
    /// It comes from a file in the configuration folder.
    pub from_file: bool,
    /// When it was started, microseconds since 1970.
    pub started_usec: u64,
    /// All of it had been started.
    pub complete: bool,
    /// Its core.
    pub core: Option<ProcessId>,
    /// Its devices, in the order of the definition.
    pub devices: Vec<DeviceRecord>,
}

impl MachineState {
    /// What runs now. One that is not `complete` has a guest that never ran.
    pub(super) fn new(
        machine: &Machine,
        core: Option<&Process>,
        devices: &[RunningDevice],
        complete: bool,
    ) -> Self {
        let inner = machine.lock();
        let record = |device: &RunningDevice| DeviceRecord {
            process: device.process.as_ref().map(|process| process.id().clone()),
            reconnects: device.reconnects,
            image: device.image(),
        };
        Self {
            definition: (*inner.definition).clone(),
            transient: machine.transient,
            from_file: machine.from_file,
            started_usec: inner.started_usec,
            complete,
            core: core.map(|core| core.id().clone()),
            devices: devices.iter().map(record).collect(),
        }
    }

    /// Writes it into the folder of its processes, where the next broker looks for it.
    pub(crate) fn save(&self, place: &Path) -> io::Result<()> {
        folder::save(&place.join(STATE), self)
    }

    /// Reads it.
    ///
    /// # Errors
    /// It is not there, or of another form.
    pub(crate) fn load(place: &Path) -> io::Result<Self> {
        folder::load(&place.join(STATE))
    }
}

/// A device of a running machine.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its process.
    pub process: Option<ProcessId>,
    /// How many times a new process took over.
    pub reconnects: u32,
    /// Which file its image is.
    pub image: Option<FileIdentity>,
}
