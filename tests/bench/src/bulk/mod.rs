//! `bench bulk`: how fast memory moves, by channels, beside plain socket streams; and how much slower
//! the guest is meanwhile.

mod streams;

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use test_framework::console::Console;
use test_framework::machine::DEADLINE;
use test_guest::{Idle, Workload};
use test_migration::{Side, Spec};

use crate::memory::warm_up;
use crate::report::{Goal, Report};
use crate::switchover::godwit;

/// Channels that are compared.
const CHANNELS: [usize; 4] = [1, 2, 4, 8];
/// MiB of a machine's memory, and of those which its guest has written.
const MEMORY_MIB: u64 = 512;
const WRITTEN_MIB: u32 = 256;
/// The same in bytes.
const SPAN: usize = (WRITTEN_MIB as usize) << 20;
/// Our part of what plain streams carry.
const GOAL: f64 = 0.8;
/// Milliseconds between two heartbeats: seldom, as the guest does nothing else while it prints one.
const BEAT_MS: u32 = 100;
/// How long the guest is watched.
const WATCHED: Duration = Duration::from_secs(1);

/// The benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Bulk {
    /// Runs of each.
    pub runs: usize,
}

impl Bulk {
    /// Runs it.
    pub fn run(self) -> Result<Report> {
        let mut report = Report::new("bulk", "all");
        for channels in CHANNELS {
            let (mut ours, mut plain) = (Vec::new(), Vec::new());
            // The first run warms up memory and is not counted.
            for run in 0..=self.runs {
                let moved = copied(channels)?;
                let (bytes, time) = streams::carry(channels, SPAN)?;
                let carried = rate(bytes as u64, time);
                if run == 0 {
                    continue;
                }
                report.runs.push(json!({
                    "channels": channels, "godwit_mib_s": moved, "streams_mib_s": carried,
                }));
                ours.push(moved);
                plain.push(carried);
            }
            let (godwit, streams) = (
                format!("{channels} channels"),
                format!("{channels} plain streams"),
            );
            report.summarise(godwit.clone(), &ours, "MiB/s");
            report.summarise(streams.clone(), &plain, "MiB/s");
            let name = format!("{channels} channels to plain streams");
            report.compare(name.clone(), &godwit, &streams);
            if let Some(&ratio) = report.ratios.get(&name) {
                report.goals.push(Goal::at_least(name, ratio, GOAL, "×"));
            }
        }
        self.slow_down(&mut report)?;
        Ok(report)
    }

    /// A guest that writes memory as fast as it can, alone and while it is copied.
    fn slow_down(self, report: &mut Report) -> Result<()> {
        let (mut alone, mut copied) = (Vec::new(), Vec::new());
        for _ in 0..self.runs {
            let (before, meanwhile) = watched()?;
            report.runs.push(json!({
                "guest_alone_mib_s": before, "guest_copied_mib_s": meanwhile,
            }));
            alone.push(before);
            copied.push(meanwhile);
        }
        let (before, meanwhile) = ("guest writes, alone", "guest writes, while it is copied");
        report.summarise(before, &alone, "MiB/s");
        report.summarise(meanwhile, &copied, "MiB/s");
        report.compare(
            "guest writes while it is copied to alone",
            meanwhile,
            before,
        );
        Ok(())
    }
}

/// MiB a second of the round that sends all memory.
fn copied(channels: usize) -> Result<f64> {
    // Once its span is written it sleeps nearly all the time: the streams have all processors.
    let mut spec = machine(1);
    spec.workload.idle = Idle::Halt;
    spec.channels = channels;
    let mut side = Side::boot(&spec)?;
    side.console.fill(DEADLINE)?;
    warm_up(SPAN)?;
    let _destination = side.begin_move(&spec, None)?;
    let report = godwit::report(&mut side)?;
    let round = report.rounds.first().context("no memory was copied")?;
    ensure!(
        round.bytes >= SPAN as u64,
        "only {} bytes were sent",
        round.bytes
    );
    Ok(rate(round.bytes, Duration::from_micros(round.us)))
}

/// MiB a second that the guest writes, alone and from the first page that is copied until it runs at
/// the destination.
fn watched() -> Result<(f64, f64)> {
    let spec = machine(0);
    let mut side = Side::boot(&spec)?;
    side.console.fill(DEADLINE)?;
    let alone = writes(&mut side.console)?;
    warm_up(SPAN)?;
    let mut destination = side.begin_move(&spec, None)?;
    let deadline = Instant::now() + DEADLINE;
    while side.progress()?["phase"] != "copying" {
        ensure!(Instant::now() < deadline, "the migration did not begin");
        sleep(Duration::from_millis(5));
    }
    let (begin, before) = written(&mut side.console)?;
    godwit::report(&mut side)?;
    let (end, after) = written(&mut destination.console)?;
    Ok((alone, rate((after - before) << 12, end - begin)))
}

/// MiB a second that the guest writes now.
fn writes(console: &mut Console) -> Result<f64> {
    let (begin, before) = written(console)?;
    sleep(WATCHED);
    let (end, after) = written(console)?;
    Ok(rate((after - before) << 12, end - begin))
}

/// Pages that the guest has written, and when it said so.
fn written(console: &mut Console) -> Result<(Instant, u64)> {
    console.ask("what it wrote", DEADLINE, |report| match *report {
        test_guest::Report::Dirty { pages, .. } => Some(pages),
        _ => None,
    })
}

/// A machine that dirties so many MiB a second, or as fast as it can, and has no devices.
fn machine(dirty: u32) -> Spec {
    let mut spec = Spec::of(Workload {
        heartbeat: BEAT_MS,
        span: WRITTEN_MIB,
        dirty,
        ..Workload::default()
    });
    spec.options.clear();
    spec.memory_mib = MEMORY_MIB;
    spec
}

/// MiB a second.
fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / time.as_secs_f64()
}
