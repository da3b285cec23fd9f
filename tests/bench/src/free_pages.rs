//! `bench free-pages`: what it saves not to send pages that the guest does not use.
//!
//! A guest that is idle, and one that has used and freed 80 % of its memory, move with free page
//! hints and without, in turn. The guest is the bundled one, whose balloon driver names its free
//! memory in pieces of 4 MiB, as Linux does.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use migration::report::Report as Moved;
use serde_json::json;
use test_guest::{BalloonMode, Idle, Workload};
use test_migration::{Side, Spec, beat_on};

use crate::report::{Goal, Report};
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

/// One move.
struct Move {
    total_ms: f64,
    sent_mib: f64,
    /// What the guest uses, of what the host has spent on it.
    in_use_mib: f64,
    source_cpu_ms: f64,
    destination_cpu_ms: f64,
    /// The largest gap that the guest saw in its own clock meanwhile.
    gap_ms: f64,
}

impl FreePages {
    /// Runs it.
    pub fn run(&self) -> Result<Report> {
        let name = self.preset.to_possible_value();
        let name = name.map_or_else(String::new, |name| name.get_name().to_owned());
        let mut report = Report::new("free-pages", name);
        let mib = match self.preset {
            FreePagesPreset::One => 1024,
            FreePagesPreset::Four => 4096,
            FreePagesPreset::Eight => 8192,
        };
        let subjects = [("idle", 16), ("used and freed", mib / 10 * 8)]
            .into_iter()
            .flat_map(|(guest, freed)| [("on", true), ("off", false)].map(|h| (guest, freed, h)));
        let subjects: Vec<_> = subjects.collect();
        let mut moves: Vec<Vec<Move>> = subjects.iter().map(|_| Vec::new()).collect();
        // The first move of each warms up and is not counted.
        for run in 0..=self.runs {
            for ((guest, freed, (word, hints)), moves) in subjects.iter().zip(&mut moves) {
                let moved = moved(mib, *freed, *hints)?;
                if run > 0 {
                    report.runs.push(json!({
                        "guest": guest,
                        "hints": word,
                        "total_ms": moved.total_ms,
                        "sent_mib": moved.sent_mib,
                        "in_use_mib": moved.in_use_mib,
                        "source_cpu_ms": moved.source_cpu_ms,
                        "destination_cpu_ms": moved.destination_cpu_ms,
                        "gap_ms": moved.gap_ms,
                    }));
                    moves.push(moved);
                }
            }
        }
        for ((guest, _, (word, _)), moves) in subjects.iter().zip(&moves) {
            let name = format!("{guest}, hints {word}");
            let mut add = |metric: &str, value: fn(&Move) -> f64, unit| {
                let values: Vec<_> = moves.iter().map(value).collect();
                report.summarise(format!("{name}: {metric}"), &values, unit);
            };
            add("total", |m| m.total_ms, "ms");
            add("sent", |m| m.sent_mib, "MiB");
            add("in use", |m| m.in_use_mib, "MiB");
            add("CPU at the source", |m| m.source_cpu_ms, "ms");
            add("CPU at the destination", |m| m.destination_cpu_ms, "ms");
            add("gap", |m| m.gap_ms, "ms");
        }
        judge(&mut report);
        Ok(report)
    }
}

fn judge(report: &mut Report) {
    let used = "used and freed, hints";
    for metric in ["total", "sent"] {
        let (on, off) = (
            format!("{used} on: {metric}"),
            format!("{used} off: {metric}"),
        );
        let name = format!("{metric}, with hints to without");
        report.compare(&name, &on, &off);
        if let Some(ratio) = report.ratios.get(&name) {
            let goal = Goal::at_most(name, *ratio, 0.1, "of it");
            report.goals.push(goal);
        }
    }
    let name = "sent to in use";
    let (sent, in_use) = (format!("{used} on: sent"), format!("{used} on: in use"));
    report.compare(name, &sent, &in_use);
    if let Some(ratio) = report.ratios.get(name) {
        let goal = Goal::at_most(name, *ratio, 1.05, "of it");
        report.goals.push(goal);
    }
}

/// Boots a machine that has used and freed so much, moves it once and ends it.
fn moved(memory_mib: u32, freed_mib: u32, hints: bool) -> Result<Move> {
    let mut spec = Spec::of(Workload {
        heartbeat: 5,
        idle: Idle::Halt,
        balloon: BalloonMode::Follow,
        balloon_mib: freed_mib,
        ..Workload::default()
    });
    spec.memory_mib = memory_mib.into();
    (spec.balloon, spec.hints) = (true, hints);
    let mut side = Side::boot(&spec)?;
    beat_on(&mut side)?;
    let freed = u64::from(freed_mib) << 20;
    let in_use = spent(&side)?.saturating_sub(freed);
    let before = cpu_ms(&mut side)?;
    let mut destination = side.begin_move(&spec, None)?;
    let outcome = side.outcome()?;
    ensure!(outcome["result"] == "moved", "it did not move: {outcome:#}");
    let source_cpu_ms = cpu_ms(&mut side)? - before;
    let destination_cpu_ms = cpu_ms(&mut destination)?;
    let gap = crate::switchover::gap::after(&mut destination.console)?;
    let report: Moved =
        serde_json::from_value(outcome["report"].clone()).context("this is no report")?;
    let mib = |bytes: u64| (bytes >> 10) as f64 / 1024.0;
    Ok(Move {
        total_ms: ms(total(&report)),
        sent_mib: mib(report.memory_bytes),
        in_use_mib: mib(in_use),
        source_cpu_ms,
        destination_cpu_ms,
        gap_ms: gap.as_secs_f64() * 1e3,
    })
}

/// Bytes that the host has spent on the guest's memory.
fn spent(side: &Side) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(fs::File::from(side.memory()?).metadata()?.blocks() * 512)
}

/// Processor time of a core and its balloon so far, their guest's included.
fn cpu_ms(side: &mut Side) -> Result<f64> {
    let mut ids = vec![side.core().id()];
    ids.extend(side.devices().iter().map(|device| device.id()));
    let mut total = 0.0;
    for id in ids {
        let stat = fs::read_to_string(format!("/proc/{id}/stat"))?;
        // After the name, which may hold anything: state is field 3, utime and stime 14 and 15.
        let (_, fields) = stat.rsplit_once(')').context("this is no stat")?;
        let ticks = fields.split_whitespace().skip(11).take(2);
        for ticks in ticks {
            // 100 a second, on every x86 computer.
            total += ticks.parse::<f64>()? * 10.0;
        }
    }
    Ok(total)
}
