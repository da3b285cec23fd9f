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

impl Definition {
    /// Everything that keeps a machine of the definition `source` from running as `self`.
    pub fn obstacles(&self, source: &Definition) -> Vec<String> {
        let mut reasons = Vec::new();
        let differs = |what: &str, there: String, here: String| {
            format!("{what} is {there} at the source and {here} at the destination")
        };
        if source.cpus != self.cpus {
            reasons.push(differs(
                "the number of vCPUs",
                source.cpus.to_string(),
                self.cpus.to_string(),
            ));
        }
        if source.memory != self.memory {
            let shape = |regions: &[(u64, u64)]| {
                let bytes: u64 = regions.iter().map(|(_, size)| size).sum();
                format!("{bytes} bytes in {} regions", regions.len())
            };
            reasons.push(differs(
                "memory",
                shape(&source.memory),
                shape(&self.memory),
            ));
        }
        for (name, number) in &source.schemas {
            match self.schemas.iter().find(|(known, _)| known == name) {
                Some((_, newest)) if number <= newest => {}
                Some((_, newest)) => reasons.push(differs(
                    &format!("the schema of {name}"),
                    number.to_string(),
                    newest.to_string(),
                )),
                None => reasons.push(format!("the destination knows no state of {name}")),
            }
        }
        for register in &source.cpu_features {
            let here = self
                .cpu_features
                .iter()
                .find(|r| (r.leaf, &r.register) == (register.leaf, &register.register));
            let missing = register.bits & !here.map_or(0, |r| r.bits);
            if missing != 0 {
                reasons.push(format!(
                    "the destination's processor lacks features {missing:#x} of CPUID \
                     {:#x}.{}:{}",
                    register.leaf.0, register.leaf.1, register.register
                ));
            }
        }
        if let (Some(there), Some(here)) = (source.tsc, self.tsc)
            && !(here.scales || same_frequency(there.khz, here.khz))
        {
            reasons.push(format!(
                "the time stamp counter runs at {} kHz at the source and at {} kHz at the \
                 destination, which cannot scale it",
                there.khz, here.khz
            ));
        }
        self.units_fit(source, &mut reasons);
        reasons
    }

    fn units_fit(&self, source: &Definition, reasons: &mut Vec<String>) {
        let ids = |d: &Definition| d.units.iter().map(|u| u.id.clone()).collect::<Vec<_>>();
        let (there, here) = (ids(source), ids(self));
        if there != here {
            reasons.push(format!(
                "the devices are {there:?} at the source and {here:?} at the destination"
            ));
            return;
        }
        for (there, here) in source.units.iter().zip(&self.units) {
            let id = &there.id;
            let mut differs = |what: &str, there: u64, here: u64| {
                if there != here {
                    reasons.push(format!(
                        "device {id}: {what} is {there} at the source and {here} at the destination"
                    ));
                }
            };
            differs(
                "its type",
                there.device_type.into(),
                here.device_type.into(),
            );
            differs(
                "its number of queues",
                there.queues.into(),
                here.queues.into(),
            );
            differs(
                "its queue size",
                there.queue_size.into(),
                here.queue_size.into(),
            );
            differs(
                "whether it has state of its own",
                there.has_state.into(),
                here.has_state.into(),
            );
            let missing = there.features & !here.features;
            if missing != 0 {
                reasons.push(format!(
                    "device {id}: features {missing:#x} are not offered at the destination"
                ));
            }
            if there.identity != here.identity {
                reasons.push(format!(
                    "device {id}: it is another one at the destination: {:02x?} instead of {:02x?}",
                    here.identity, there.identity
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition() -> Definition {
        Definition {
            cpus: 2,
            cpu_features: vec![CpuFeatures {
                leaf: (7, 0),
                register: "ebx".into(),
                bits: 0b101,
            }],
            tsc: Some(Tsc {
                khz: 2_000_000,
                scales: false,
            }),
            memory: vec![(0, 1 << 30)],
            units: vec![Unit {
                id: "disk0".into(),
                device_type: 2,
                features: 0b11,
                queues: 4,
                queue_size: 256,
                has_state: true,
                identity: vec![8],
            }],
            schemas: vec![("core".into(), 1)],
        }
    }

    #[test]
    fn a_machine_fits_its_like_and_more() {
        let here = definition();
        assert_eq!(here.obstacles(&definition()), Vec::<String>::new());
        let mut more = definition();
        more.cpu_features[0].bits = !0;
        more.units[0].features = !0;
        more.schemas[0].1 = 2;
        assert_eq!(more.obstacles(&definition()), Vec::<String>::new());
    }

    #[test]
    fn a_counter_of_another_frequency_must_be_scaled() {
        let (mut here, mut there) = (definition(), definition());
        let tsc = |khz, scales| Some(Tsc { khz, scales });
        there.tsc = tsc(2_000_500, false);
        assert!(here.obstacles(&there).is_empty(), "within the tolerance");
        there.tsc = tsc(3_000_000, true);
        assert_eq!(
            here.obstacles(&there),
            [
                "the time stamp counter runs at 3000000 kHz at the source and at 2000000 kHz at the \
              destination, which cannot scale it"
            ]
        );
        here.tsc = tsc(2_000_000, true);
        assert!(here.obstacles(&there).is_empty());
    }

    #[test]
    fn everything_that_does_not_fit_is_named_at_once() {
        let mut there = definition();
        there.cpus = 3;
        there.memory[0].1 += 4096;
        there.schemas = vec![("core".into(), 2), ("toaster".into(), 1)];
        there.cpu_features[0].bits = 0b111;
        there.units[0].device_type = 1;
        there.units[0].queues = 5;
        there.units[0].queue_size = 128;
        there.units[0].has_state = false;
        there.units[0].features = 0b111;
        there.units[0].identity = vec![9];
        let reasons = definition().obstacles(&there);
        let expected = [
            "vCPUs",
            "memory",
            "core",
            "toaster",
            "CPUID",
            "type",
            "number of queues",
            "queue size",
            "state of its own",
            "0x4",
            "another one",
        ];
        assert_eq!(reasons.len(), expected.len(), "{reasons:#?}");
        for (reason, part) in reasons.iter().zip(expected) {
            assert!(reason.contains(part), "{part} in {reason}");
        }
        there = definition();
        there.units.clear();
        assert_eq!(definition().obstacles(&there).len(), 1);
    }
}
