//! `bench free-pages`: what it saves not to send pages that the guest does not use.
//!
//! A guest that is idle, and one that has used and freed 80 % of its memory, move with free page
//! hints and without, in turn, and in QEMU with its own balloon beside. The guest is the bundled
//! one, whose balloon driver names its free memory in pieces of 4 MiB, as Linux does.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use migration::report::Report as Moved;
use serde_json::json;
use test_framework::machine::Device;
use test_guest::{BalloonMode, Idle, Workload};
use test_migration::{Side, Spec, beat_on};

use crate::cpu_time::CpuTime;
use crate::peer::qemu;
use crate::report::{Goal, Report};
use crate::switchover::gap;
use crate::switchover::godwit::{ms, total};

/// How much memory the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FreePagesPreset {
    /// 1 GiB.
    #[value(name = "1g")]
    One,
    /// 4 GiB.
    #[value(name = "4g")]
    Four,
    /// 8 GiB: needs 16 GiB, for both sides.
    #[value(name = "8g")]
    Eight,
}

/// The benchmark.
#[derive(Clone, Debug)]
pub struct FreePages {
    /// How much memory.
    pub preset: FreePagesPreset,
    /// Moves of each.
    pub runs: usize,
}

/// What is moved.
#[derive(Clone, Copy, Debug)]
struct Subject {
    who: Who,
    guest: &'static str,
    freed_mib: u32,
    hints: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Godwit,
    Qemu,
}

impl Subject {
    fn name(&self) -> String {
        let whose = match self.who {
            Who::Godwit => "",
            Who::Qemu => "QEMU, ",
        };
        name(whose, self.guest, self.hints)
    }
}

fn name(whose: &str, guest: &str, hints: bool) -> String {
    let word = if hints { "on" } else { "off" };
    format!("{whose}{guest}, hints {word}")
}

/// One move.
struct Move {
    total_ms: f64,
    sent_mib: f64,
    /// What the guest uses, of what the host has spent on it; only ours is asked.
    in_use_mib: Option<f64>,
    source: CpuTime,
    destination: CpuTime,
    /// The largest gap that the guest saw in its own clock meanwhile.
    gap_ms: f64,
}

impl FreePages {
    /// Runs it.
    pub fn run(&self) -> Result<Report> {
        let preset = self.preset.to_possible_value();
        let preset = preset.map_or_else(String::new, |name| name.get_name().to_owned());
        let mut report = Report::new("free-pages", preset);
        let mib = match self.preset {
            FreePagesPreset::One => 1024,
            FreePagesPreset::Four => 4096,
            FreePagesPreset::Eight => 8192,
        };
        let mut whose = vec![Who::Godwit];
        if qemu::is_installed() {
            whose.push(Who::Qemu);
        } else {
            let note = "qemu-system-x86_64 is absent: nothing to compare with";
            report.notes.push(note.into());
        }
        let mut subjects = Vec::new();
        for (guest, freed_mib) in [("idle", 16), (USED, mib / 10 * 8)] {
            for who in &whose {
                subjects.extend([true, false].map(|hints| Subject {
                    who: *who,
                    guest,
                    freed_mib,
                    hints,
                }));
            }
        }
        // The programs' files get into memory.
        for who in &whose {
            let idle = subjects.iter().find(|subject| subject.who == *who);
            idle.map(|subject| moved(mib, subject)).transpose()?;
        }
        let mut moves: Vec<Vec<Move>> = subjects.iter().map(|_| Vec::new()).collect();
        for _ in 0..self.runs {
            for (subject, moves) in subjects.iter().zip(&mut moves) {
                let moved = moved(mib, subject).with_context(|| subject.name())?;
                report.runs.push(json!({
                    "subject": subject.name(),
                    "total_ms": moved.total_ms,
                    "sent_mib": moved.sent_mib,
                    "in_use_mib": moved.in_use_mib,
                    "source_cpu_ms": moved.source.host_ms,
                    "destination_cpu_ms": moved.destination.host_ms,
                    "guest_cpu_ms": moved.source.guest_ms,
                    "gap_ms": moved.gap_ms,
                }));
                moves.push(moved);
            }
        }
        for (subject, moves) in subjects.iter().zip(&moves) {
            let mut add = |metric: &str, value: fn(&Move) -> Option<f64>, unit| {
                let values: Vec<_> = moves.iter().filter_map(value).collect();
                report.summarise(format!("{}: {metric}", subject.name()), &values, unit);
            };
            add("total", |m| Some(m.total_ms), "ms");
            add("sent", |m| Some(m.sent_mib), "MiB");
            add("in use", |m| m.in_use_mib, "MiB");
            add("CPU at the source", |m| Some(m.source.host_ms), "ms");
            let there = |m: &Move| Some(m.destination.host_ms);
            add("CPU at the destination", there, "ms");
            add("CPU of the guest", |m| Some(m.source.guest_ms), "ms");
            add("gap", |m| Some(m.gap_ms), "ms");
        }
        judge(&mut report);
        Ok(report)
    }
}

const USED: &str = "used and freed";

fn judge(report: &mut Report) {
    for whose in ["", "QEMU, "] {
        let (on, off) = (name(whose, USED, true), name(whose, USED, false));
        for metric in ["total", "sent"] {
            let name = format!("{whose}{metric}, with hints to without");
            report.compare(
                &name,
                &format!("{on}: {metric}"),
                &format!("{off}: {metric}"),
            );
            if let (Some(ratio), "") = (report.ratios.get(&name), whose) {
                let goal = Goal::at_most(name, *ratio, 0.1, "of it");
                report.goals.push(goal);
            }
        }
    }
    let on = name("", USED, true);
    let sent = "sent to in use";
    report.compare(sent, &format!("{on}: sent"), &format!("{on}: in use"));
    if let Some(ratio) = report.ratios.get(sent) {
        let goal = Goal::at_most(sent, *ratio, 1.05, "of it");
        report.goals.push(goal);
    }
    let theirs = name("QEMU, ", USED, true);
    for metric in ["total", "sent"] {
        let name = format!("{metric} with hints, to QEMU's");
        report.compare(
            name,
            &format!("{on}: {metric}"),
            &format!("{theirs}: {metric}"),
        );
    }
}

/// Boots a machine that has used and freed so much, moves it once and ends it.
fn moved(memory_mib: u32, subject: &Subject) -> Result<Move> {
    let workload = Workload {
        heartbeat: 5,
        idle: Idle::Halt,
        balloon: BalloonMode::Follow,
        balloon_mib: subject.freed_mib,
        ..Workload::default()
    };
    match subject.who {
        Who::Godwit => of_godwit(memory_mib, workload, subject),
        Who::Qemu => {
            let machine = qemu::Machine {
                workload,
                cpus: 1,
                memory_mib: memory_mib.into(),
                devices: vec![Device::Balloon],
                disks: qemu::Disks::Own,
            };
            let (moved, [source, destination]) = machine.moved_with(1, subject.hints)?;
            Ok(Move {
                total_ms: moved.total_ms,
                sent_mib: mib(moved.bytes),
                in_use_mib: None,
                source,
                destination,
                gap_ms: moved.gap_ms,
            })
        }
    }
}

fn of_godwit(memory_mib: u32, workload: Workload, subject: &Subject) -> Result<Move> {
    let mut spec = Spec::of(workload);
    spec.memory_mib = memory_mib.into();
    (spec.balloon, spec.hints) = (true, subject.hints);
    let mut side = Side::boot(&spec)?;
    beat_on(&mut side)?;
    let freed = u64::from(subject.freed_mib) << 20;
    let in_use = spent(&side)?.saturating_sub(freed);
    let before = cpu_time(&mut side)?;
    let mut destination = side.begin_move(&spec, None)?;
    let outcome = side.outcome()?;
    ensure!(outcome["result"] == "moved", "it did not move: {outcome:#}");
    let (source, destination_cpu) = (
        cpu_time(&mut side)?.since(before),
        cpu_time(&mut destination)?,
    );
    let gap = gap::after(&mut destination.console)?;
    let report: Moved =
        serde_json::from_value(outcome["report"].clone()).context("this is no report")?;
    Ok(Move {
        total_ms: ms(total(&report)),
        sent_mib: mib(report.memory_bytes),
        in_use_mib: Some(mib(in_use)),
        source,
        destination: destination_cpu,
        gap_ms: gap.as_secs_f64() * 1e3,
    })
}

fn mib(bytes: u64) -> f64 {
    (bytes >> 10) as f64 / 1024.0
}

/// Bytes that the host has spent on the guest's memory.
fn spent(side: &Side) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(fs::File::from(side.memory()?).metadata()?.blocks() * 512)
}

/// Of a core and its balloon so far.
fn cpu_time(side: &mut Side) -> Result<CpuTime> {
    let mut time = CpuTime::of(side.core().id())?;
    for device in side.devices() {
        time.host_ms += CpuTime::of(device.id())?.host_ms;
    }
    Ok(time)
}
