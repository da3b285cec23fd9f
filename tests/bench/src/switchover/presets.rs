//! The machines of each preset, and what they are to reach.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use test_framework::machine::{Device, make_image};
use test_framework::network;
use test_guest::{Activate, Workload};
use test_migration::{Counter, Kind, Spec};

use super::{MAX_DOWNTIME_MS, SwitchoverPreset};
use crate::peer::qemu::{Disks, Machine};
use crate::report::{Goal, Report};

/// MiB of a disk.
const DISK_MIB: u64 = 32;

/// What is measured in one run, in turn.
pub(super) struct Plan {
    pub subjects: Vec<Subject>,
    /// Adds ratios and goals.
    pub judge: fn(&mut Report),
}

pub(super) struct Subject {
    pub name: String,
    pub who: Who,
}

pub(super) enum Who {
    Godwit(Spec),
    /// With so many channels for memory.
    Qemu(Machine, usize),
}

pub(super) fn plan(preset: SwitchoverPreset, folder: &Path) -> Result<Plan> {
    let mut parts = Parts::new(folder);
    Ok(match preset {
        SwitchoverPreset::OneEach => Plan {
            subjects: vec![
                godwit("vCPUs alone", parts.machine(&[], &[])?),
                godwit("net, blk, balloon", {
                    let mut spec = parts.machine(&[1], &[1])?;
                    spec.balloon = true;
                    spec
                }),
            ],
            judge: |report| {
                most(report, "net, blk, balloon", "vCPUs alone", "gap", 1.5);
                at_most(report, "net, blk, balloon: gap", 2.0);
            },
        },
        SwitchoverPreset::Seeds24 => Plan {
            subjects: vec![
                godwit("1 net, 1 blk", parts.machine(&[16], &[4])?),
                godwit("8 net, 16 blk", parts.machine(&[16; 8], &[4; 16])?),
            ],
            judge: |report| {
                most(report, "8 net, 16 blk", "1 net, 1 blk", "gap", 2.0);
                at_most(report, "8 net, 16 blk: gap", 15.0);
            },
        },
        SwitchoverPreset::Many => {
            let spec = parts.machine(&[4; 16], &[4; 16])?;
            Plan {
                subjects: vec![
                    qemu("qemu, vhost-user-blk", &spec, Disks::StorageDaemon, 1),
                    qemu("qemu, its own disks", &spec, Disks::Own, 1),
                    godwit("godwit", spec),
                ],
                judge: |report| {
                    most(report, "godwit", "qemu, vhost-user-blk", "gap", 0.1);
                    most(report, "godwit", "qemu, its own disks", "gap", 0.1);
                },
            }
        }
        SwitchoverPreset::Slow4 => {
            let mut slow = |devices: usize| {
                let mut spec = parts.machine(&[], &[])?;
                spec.counters = vec![slow_device(); devices];
                // Only a device that the guest uses has something to stop.
                spec.workload.count = 10;
                anyhow::Ok(spec)
            };
            let mut serial = slow(4)?;
            serial.without = vec!["parallel".into()];
            Plan {
                subjects: vec![
                    godwit("4 devices one by one", serial),
                    godwit("1 device", slow(1)?),
                    godwit("4 devices", slow(4)?),
                ],
                judge: |report| {
                    most(report, "4 devices", "1 device", APART, 1.1);
                    let serial = format!("4 devices one by one: {APART}");
                    let name = "4 devices one by one to at once, copying apart";
                    report.compare(name, &serial, &format!("4 devices: {APART}"));
                },
            }
        }
        SwitchoverPreset::Dirty => {
            let mut subjects = Vec::new();
            for (name, rival, memory_mib, span, rate) in DIRTY {
                let mut spec = parts.machine(&[], &[1])?;
                spec.memory_mib = memory_mib;
                spec.workload.span = span;
                spec.workload.dirty = rate;
                subjects.push(qemu(rival, &spec, Disks::Own, spec.channels));
                subjects.push(godwit(name, spec));
            }
            Plan {
                subjects,
                judge: |report| {
                    for (name, rival, ..) in DIRTY {
                        most(report, name, rival, "gap", 1.0);
                        most(report, name, rival, "total", 1.0);
                    }
                },
            }
        }
        SwitchoverPreset::Local => {
            let mut local = |pairs: &[u16], queues: &[u16]| {
                let mut spec = parts.machine(pairs, queues)?;
                spec.kind = Kind::Shared;
                anyhow::Ok(spec)
            };
            Plan {
                subjects: vec![
                    godwit("2 devices", local(&[1], &[1])?),
                    godwit("32 devices", local(&[4; 16], &[4; 16])?),
                ],
                judge: |report| {
                    at_most(report, "2 devices: gap", 3.0);
                    at_most(report, "32 devices: gap", 10.0);
                },
            }
        }
    })
}

/// The gap without the time in which devices' states were copied.
pub(super) const APART: &str = "gap, copying apart";

/// A device that takes 100 ms for each of its transitions, and has 100 MiB of state.
fn slow_device() -> Counter {
    Counter {
        queues: 1,
        state_bytes: 100 << 20,
        script: "stop=100 start=100".into(),
        map_limit: None,
    }
}

/// Ours, QEMU's, MiB of RAM, MiB of the span, MiB dirtied a second.
const DIRTY: [(&str, &str, u64, u32, u32); 4] = [
    (
        "1 GiB, 100 MiB/s, godwit",
        "1 GiB, 100 MiB/s, qemu",
        1024,
        512,
        100,
    ),
    (
        "1 GiB, 800 MiB/s, godwit",
        "1 GiB, 800 MiB/s, qemu",
        1024,
        512,
        800,
    ),
    (
        "4 GiB, 100 MiB/s, godwit",
        "4 GiB, 100 MiB/s, qemu",
        4096,
        2048,
        100,
    ),
    (
        "4 GiB, 800 MiB/s, godwit",
        "4 GiB, 800 MiB/s, qemu",
        4096,
        2048,
        800,
    ),
];

fn godwit(name: &str, spec: Spec) -> Subject {
    Subject {
        name: name.into(),
        who: Who::Godwit(spec),
    }
}

/// Each of ours once more, without each of `mechanisms`, beside the one with all.
pub(super) fn leave_out(subjects: Vec<Subject>, mechanisms: &[String]) -> Vec<Subject> {
    let mut all = Vec::new();
    for subject in subjects {
        let Who::Godwit(spec) = &subject.who else {
            all.push(subject);
            continue;
        };
        let without = mechanisms.iter().map(|mechanism| {
            let mut spec = spec.clone();
            spec.without = vec![mechanism.clone()];
            godwit(&format!("{} without {mechanism}", subject.name), spec)
        });
        let without: Vec<_> = without.collect();
        all.push(subject);
        all.extend(without);
    }
    all
}

/// QEMU with the machine of `spec`.
fn qemu(name: &str, spec: &Spec, disks: Disks, channels: usize) -> Subject {
    let blk = spec.disks.iter().cloned();
    let net = spec.nics.iter().cloned();
    let machine = Machine {
        workload: spec.workload.clone(),
        cpus: spec.cpus,
        memory_mib: spec.memory_mib,
        devices: blk
            .map(|(image, queues)| Device::Blk { image, queues })
            .chain(net.map(|(tap, pairs)| Device::Net { tap, pairs }))
            .collect(),
        disks,
    };
    Subject {
        name: name.into(),
        who: Who::Qemu(machine, channels),
    }
}

/// The ratio of two medians, which is to be at most `goal`.
fn most(report: &mut Report, ours: &str, theirs: &str, metric: &str, goal: f64) {
    let name = format!("{ours} to {theirs}, {metric}");
    let (ours, theirs) = (format!("{ours}: {metric}"), format!("{theirs}: {metric}"));
    report.compare(name.clone(), &ours, &theirs);
    if let Some(&ratio) = report.ratios.get(&name) {
        report.goals.push(Goal::at_most(name, ratio, goal, "×"));
    }
}

fn at_most(report: &mut Report, metric: &str, goal: f64) {
    if let Some(median) = report.summary.get(metric).map(|summary| summary.median) {
        report.goals.push(Goal::at_most(metric, median, goal, "ms"));
    }
}

/// Disks and taps, which all machines of a run share: only one of them runs at a time.
struct Parts<'a> {
    folder: &'a Path,
    disks: Vec<PathBuf>,
    taps: Vec<String>,
}

impl<'a> Parts<'a> {
    fn new(folder: &'a Path) -> Self {
        Self {
            folder,
            disks: Vec::new(),
            taps: Vec::new(),
        }
    }

    /// An idle machine of one vCPU with network devices of so many queue pairs and disks of so many
    /// queues, all set up by the guest.
    fn machine(&mut self, pairs: &[u16], queues: &[u16]) -> Result<Spec> {
        let mut spec = Spec::of(Workload {
            heartbeat: 10,
            activate: Activate::All,
            ..Workload::default()
        });
        spec.memory_mib = 512;
        spec.options = vec![("max-downtime-ms", MAX_DOWNTIME_MS)];
        while self.disks.len() < queues.len() {
            let image = self.folder.join(format!("disk{}", self.disks.len()));
            make_image(&image, DISK_MIB)?;
            self.disks.push(image);
        }
        while self.taps.len() < pairs.len() {
            let tap = format!("bench{}", self.taps.len());
            let subnet = u8::try_from(self.taps.len()).context("too many taps")?;
            // Of several queues, since both sides have it open for a while.
            network::add_tap(&tap, Ipv4Addr::new(10, 78, subnet, 1), 2)?;
            self.taps.push(tap);
        }
        spec.disks = self
            .disks
            .iter()
            .cloned()
            .zip(queues.iter().copied())
            .collect();
        spec.nics = self
            .taps
            .iter()
            .cloned()
            .zip(pairs.iter().copied())
            .collect();
        Ok(spec)
    }
}
