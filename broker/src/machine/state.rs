//! What a later broker needs to adopt a running machine.

use serde::{Deserialize, Serialize};

use crate::definition::Definition;
use crate::process::ProcessId;
use crate::resources::FileIdentity;

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
