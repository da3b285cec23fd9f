//! What two cores say to each other on their [`crate::link`].
//!
//! ```text
//! source                                destination
//! Hello (definition) ─────────────────▶
//!                    ◀───────────────── Refused (every reason) | Welcome
//! Wiring, Alive …    ─────────────────▶                         memory on its own channels
//! Copied             ─────────────────▶                         once, after the first round
//!                    ◀───────────────── Ready, for each Wiring; Prepared (barrier A)
//! Stopping           ─────────────────▶                         devices begin to load
//! Core               ─────────────────▶                         devices' states on theirs
//!                    ◀───────────────── Loaded                  (barrier E)
//! Commit             ─────────────────▶
//!                    ◀───────────────── Running
//! Abort, Discarded: at any time, see [`crate::commit`]
//! ```

use serde::{Deserialize, Serialize};

use crate::commit::{DestinationInput, SourceInput};
use crate::report::Side;

/// Version of this protocol. Messages and fields are only added within a version.
pub const PROTOCOL: u32 = 1;

/// Saved state of a part of the core: a schema's number and its encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// The schema's number.
    pub schema: u32,
    /// What [`crate::schema::Schema::encode`] made.
    #[serde(with = "serde_bytes")]
    pub payload: Vec<u8>,
}

/// How memory comes to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryTransfer {
    /// Over this number of channels.
    Copied {
        /// Channels.
        channels: u32,
    },
    /// It is there: both cores map the same file.
    Shared,
}

/// A register of CPUID, with the features that the guest may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// Function and index.
    pub leaf: (u32, u32),
    /// `eax` to `edx`.
    pub register: String,
    /// Features.
    pub bits: u32,
}

/// What must be the same of two processors, or not less, for a guest that has started on one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// What the machine's definition says of it: `host`, or the level that is shown.
    pub level: String,
    /// Its vendor, as CPUID has it.
    pub vendor: String,
    /// Bits of physical addresses that the guest may use.
    pub address_bits: u32,
}

/// The time stamp counter of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tsc {
    /// Its frequency, in kHz.
    pub khz: u32,
    /// Whether it can be given another one.
    pub scales: bool,
}

/// Whether KVM takes two frequencies of a counter, in kHz, for the same (`tsc_tolerance_ppm`).
#[must_use]
pub fn same_frequency(a: u32, b: u32) -> bool {
    const TOLERANCE_PPM: u64 = 250;
    u64::from(a.abs_diff(b)) * 1_000_000 <= u64::from(a) * TOLERANCE_PPM
}

/// A device of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// Its id.
    pub id: String,
    /// Virtio device type.
    pub device_type: u32,
    /// Features offered to the driver.
    pub features: u64,
    /// Queues that the driver finds.
    pub queues: u16,
    /// Descriptors of a queue, at most.
    pub queue_size: u16,
    /// Whether it has state of its own to move.
    pub has_state: bool,
    /// What it is and must be there too: a disk's capacity.
    #[serde(with = "serde_bytes")]
    pub identity: Vec<u8>,
}

/// What a machine is, as far as the other side must have the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// vCPUs.
    pub cpus: u32,
    /// What they can do.
    pub cpu_features: Vec<CpuFeatures>,
    /// What they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processor: Option<Processor>,
    /// Their time stamp counter, if KVM tells.
    #[serde(default)]
    pub tsc: Option<Tsc>,
    /// First guest-physical address and bytes of each memory region.
    pub memory: Vec<(u64, u64)>,
    /// Devices, in the order of their PCI addresses.
    pub units: Vec<Unit>,
    /// Schema of each state of the core: what the source writes, what the destination reads.
    pub schemas: Vec<(String, u32)>,
}

/// First message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// What moves.
    pub definition: Definition,
    /// How its memory does.
    pub memory: MemoryTransfer,
    /// Bytes of memory that it uses, which the destination needs.
    #[serde(default)]
    pub memory_used: u64,
}

/// What the source says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDestination {
    /// Who is to come.
    Hello(Hello),
    /// How devices are wired at the moment; said again when that changes.
    Wiring(Blob),
    /// Memory is there, but for what changes: devices may map it, and wait for their states.
    Copied,
    /// Still copying.
    Alive,
    /// The blackout begins: devices may begin to load.
    Stopping,
    /// State of the core.
    Core(Blob),
    /// The machine is yours.
    Commit,
    /// The machine stays here.
    Abort {
        /// Why.
        reason: String,
    },
}

/// What the destination says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// It fits.
    Welcome,
    /// It does not.
    Refused {
        /// Everything that does not fit.
        reasons: Vec<String>,
    },
    /// Barrier A: all is in place for what the last Wiring said. Answers each.
    Ready,
    /// Barrier A too: what is there is mapped, and a rehearsal was held. Answers Copied.
    Prepared {
        /// Microseconds that it took to save a core's state and to load it.
        core_us: u64,
        /// Microseconds that it took to ask all devices something.
        devices_us: u64,
    },
    /// Barrier E: everything is loaded and verified.
    Loaded,
    /// The machine is here, and runs if it ran.
    Running {
        /// How that went.
        timeline: Side,
        /// Why it is paused, if it should run.
        problem: Option<String>,
    },
    /// The machine does not run here and never will.
    Discarded {
        /// Why.
        reason: String,
    },
}

impl ToSource {
    /// What the message means for the commit, if anything.
    pub fn input(&self) -> Option<SourceInput> {
        match self {
            Self::Loaded => Some(SourceInput::Loaded),
            Self::Running { .. } => Some(SourceInput::Running),
            Self::Discarded { .. } | Self::Refused { .. } => Some(SourceInput::Discarded),
            Self::Welcome | Self::Ready | Self::Prepared { .. } => None,
        }
    }
}

impl ToDestination {
    /// What the message means for the commit, if anything.
    pub fn input(&self) -> Option<DestinationInput> {
        match self {
            Self::Commit => Some(DestinationInput::Commit),
            Self::Abort { .. } => Some(DestinationInput::Abort),
            _ => None,
        }
    }
}
