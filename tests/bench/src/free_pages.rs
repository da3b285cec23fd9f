//! `bench free-pages`: what it saves not to send pages that the guest does not use.
//!
//! A guest that is idle, and one that has used and freed 80 % of its memory, move without free page
//! hints, which brings all of their pages along, and from there with hints; and beside in QEMU with
//! its own balloon. The guest is the bundled one, whose balloon driver names its free memory in
//! pieces of 4 MiB, as Linux does; it uses a sixteenth of its memory.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use migration::report::Report as Moved;
use serde_json::json;
use test_framework::machine::{DEADLINE, Device};
use test_guest::{BalloonMode, Idle, Report as Said, Workload};
use test_migration::{Side, Spec, beat_on};

use crate::cpu_time::CpuTime;
use crate::peer::qemu;
use crate::report::{Goal, Report};
use crate::switchover::gap;
use crate::switchover::godwit::{ms, report, total};

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

/// What is moved, without hints and with them.
#[derive(Clone, Copy, Debug)]
struct Subject {
    who: Who,
    guest: &'static str,
    freed_mib: u32,
}

/// Whether free pages are asked for, in this order.
const HINTS: [bool; 2] = [false, true];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Godwit,
    Qemu,
}

impl Subject {
    fn name(&self, hints: bool) -> String {
        let whose = match self.who {
            Who::Godwit => "",
            Who::Qemu => "QEMU, ",
        };
        name(whose, self.guest, hints)
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
    /// What ours says of it.
    report: Option<Moved>,
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
        for (guest, freed_mib) in [("idle", IDLE_MIB), (USED, mib / 10 * 8)] {
            subjects.extend(whose.iter().map(|who| Subject {
                who: *who,
                guest,
                freed_mib,
            }));
        }
        // The programs' files get into memory.
        for subject in subjects.iter().filter(|s| s.freed_mib == IDLE_MIB) {
            moved(mib, subject)?;
        }
        let mut moves: Vec<Vec<Move>> = Vec::new();
        moves.resize_with(subjects.len() * HINTS.len(), Vec::new);
        let each = || subjects.iter().flat_map(|s| HINTS.map(|hints| (s, hints)));
        for _ in 0..self.runs {
            for (subject, moves) in subjects.iter().zip(moves.chunks_mut(HINTS.len())) {
                let moved = moved(mib, subject).with_context(|| subject.name(true))?;
                for ((hints, moved), moves) in HINTS.into_iter().zip(moved).zip(moves) {
                    report.runs.push(json!({
                        "subject": subject.name(hints),
                        "total_ms": moved.total_ms,
                        "sent_mib": moved.sent_mib,
                        "in_use_mib": moved.in_use_mib,
                        "source_cpu_ms": moved.source.host_ms,
                        "destination_cpu_ms": moved.destination.host_ms,
                        "guest_cpu_ms": moved.source.guest_ms,
                        "gap_ms": moved.gap_ms,
                        "report": moved.report,
                    }));
                    moves.push(moved);
                }
            }
        }
        for ((subject, hints), moves) in each().zip(&moves) {
            let mut add = |metric: &str, value: fn(&Move) -> Option<f64>, unit| {
                let values: Vec<_> = moves.iter().filter_map(value).collect();
                report.summarise(format!("{}: {metric}", subject.name(hints)), &values, unit);
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
/// A machine whose processes take less processor time than this, in this time, is at rest.
const REST: Duration = Duration::from_millis(200);
const REST_MS: f64 = 20.0;
/// The part of its memory that any guest uses.
const KEPT_PART: u32 = 16;
/// What an idle guest has freed.
const IDLE_MIB: u32 = 16;

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

/// Boots a machine that has used and freed so much, moves it once for each of [`HINTS`] and ends it.
fn moved(memory_mib: u32, subject: &Subject) -> Result<Vec<Move>> {
    let workload = Workload {
        heartbeat: 5,
        idle: Idle::Halt,
        balloon: BalloonMode::Follow,
        balloon_mib: subject.freed_mib,
        kept_mib: memory_mib / KEPT_PART,
        ..Workload::default()
    };
    match subject.who {
        Who::Godwit => of_godwit(memory_mib, workload, subject.freed_mib),
        Who::Qemu => of_qemu(memory_mib, workload),
    }
}

fn of_qemu(memory_mib: u32, workload: Workload) -> Result<Vec<Move>> {
    let definition = qemu::Machine {
        workload,
        cpus: 1,
        memory_mib: memory_mib.into(),
        devices: vec![Device::Balloon],
        disks: qemu::Disks::Own,
    };
    let mut machine = definition.booted()?;
    let mut moves = Vec::new();
    for hints in HINTS {
        let done = definition.move_on(machine, 1, hints)?;
        let [source, destination] = done.times;
        moves.push(Move {
            total_ms: done.moved.total_ms,
            sent_mib: mib(done.moved.bytes),
            in_use_mib: None,
            source,
            destination,
            gap_ms: done.moved.gap_ms,
            report: None,
        });
        machine = done.machine;
    }
    Ok(moves)
}

fn of_godwit(memory_mib: u32, workload: Workload, freed_mib: u32) -> Result<Vec<Move>> {
    let mut spec = Spec::of(workload);
    spec.options.clear();
    spec.memory_mib = memory_mib.into();
    (spec.balloon, spec.hints) = (true, HINTS[0]);
    let mut side = Side::boot(&spec)?;
    // It uses all of its memory once before it beats.
    let patience = DEADLINE * (memory_mib >> 10);
    let beats = |said: &Said| matches!(said, Said::Beat { .. }).then_some(());
    side.console.report("a heartbeat", patience, beats)?;
    // The core asks a balloon that it has a link to.
    spec.hints = true;
    let mut moves = Vec::new();
    for _ in HINTS {
        come_to_rest(&mut side)?;
        let in_use = spent(&side)?.saturating_sub(u64::from(freed_mib) << 20);
        let before = cpu_time(&mut side)?;
        let mut destination = side.begin_move(&spec, None)?;
        let report = report(&mut side)?;
        let source = cpu_time(&mut side)?.since(before);
        let there = cpu_time(&mut destination)?;
        let gap = gap::after(&mut destination.console)?;
        moves.push(Move {
            total_ms: ms(total(&report)),
            sent_mib: mib(report.memory_bytes),
            in_use_mib: Some(mib(in_use)),
            source,
            destination: there,
            gap_ms: gap.as_secs_f64() * 1e3,
            report: Some(report),
        });
        side = destination;
    }
    Ok(moves)
}

/// Waits until the guest beats and nobody maps what has come any more.
fn come_to_rest(side: &mut Side) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    beat_on(side)?;
    loop {
        let before = cpu_time(side)?;
        sleep(REST);
        if cpu_time(side)?.since(before).host_ms < REST_MS {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the machine does not come to rest");
    }
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
