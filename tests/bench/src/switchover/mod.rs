//! `bench switchover`: how long a guest stands still while its machine moves.
//!
//! The gap is the largest that the guest sees in its own clock around the move: last instruction at
//! the source to first at the destination. What is compared runs in turn, in the same run: a machine
//! of many devices and one of few, ours and QEMU with the same guest.

pub(crate) mod gap;
pub(crate) mod godwit;
mod phases;
mod presets;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use migration::picture;
use serde_json::json;
use tempfile::TempDir;

use crate::peer::qemu;
use crate::report::Report;
use presets::{Plan, Subject, Who};

/// Milliseconds of a stop that are wanted, of ours and of QEMU alike.
pub(crate) const MAX_DOWNTIME_MS: u64 = 300;

/// Which machines move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SwitchoverPreset {
    /// A network device, a disk and a balloon, idle, beside a machine of vCPUs alone.
    OneEach,
    /// 8 network devices of 16 queue pairs and 16 disks of 4 queues, beside one of each.
    #[value(name = "seeds-24")]
    Seeds24,
    /// 16 network devices and 16 disks of 4 queues, beside QEMU.
    Many,
    /// 4 devices of 100 MiB of state that take 100 ms for a transition, beside one of them.
    #[value(name = "slow-4")]
    Slow4,
    /// Guests that dirty memory, beside QEMU.
    Dirty,
    /// Within this computer, memory kept: 2 and 32 devices.
    Local,
}

/// The benchmark.
#[derive(Clone, Debug)]
pub struct Switchover {
    /// Which machines.
    pub preset: SwitchoverPreset,
    /// Moves of each.
    pub runs: usize,
    /// Part of the names of those that move.
    pub only: String,
    /// Mechanisms: ours move without each of them, too.
    pub without: Vec<String>,
    /// Where the timeline of a move goes, for Perfetto's viewer.
    pub trace: Option<PathBuf>,
    /// Where a picture of it goes.
    pub svg: Option<PathBuf>,
}

/// One move of one machine.
pub(crate) struct Move {
    /// What the guest saw, in milliseconds.
    pub gap_ms: f64,
    /// What the program says of its own downtime, in milliseconds.
    pub said_ms: f64,
    /// From the first word between the two sides to the last, in milliseconds.
    pub total_ms: f64,
    /// Bytes of memory sent.
    pub bytes: u64,
    /// Ours: the report.
    pub report: Option<migration::report::Report>,
}

impl Switchover {
    /// Runs it. The calling thread must be in a network of its own.
    pub fn run(&self) -> Result<Report> {
        let folder = TempDir::new()?;
        let Plan { subjects, judge } = presets::plan(self.preset, folder.path())?;
        let mut subjects = presets::leave_out(subjects, &self.without);
        subjects.retain(|subject| subject.name.contains(&self.only));
        ensure!(
            !subjects.is_empty(),
            "no machine of this preset has a name with {:?}",
            self.only
        );
        let name = self.preset.to_possible_value();
        let name = name.map_or_else(String::new, |name| name.get_name().to_owned());
        let mut report = Report::new("switchover", name);
        let installed = qemu::is_installed();
        if !installed && subjects.iter().any(|s| matches!(s.who, Who::Qemu(..))) {
            let note = "qemu-system-x86_64 is absent: nothing to compare with";
            report.notes.push(note.into());
        }
        let mut moves: Vec<Vec<Move>> = subjects.iter().map(|_| Vec::new()).collect();
        // The first move of each warms up the page cache and is not counted.
        for run in 0..=self.runs {
            for (subject, moves) in subjects.iter().zip(&mut moves) {
                let moved = match &subject.who {
                    Who::Godwit(spec) => godwit::moved(spec)?,
                    Who::Qemu(..) if !installed => continue,
                    Who::Qemu(machine, channels) => machine.moved(*channels)?,
                };
                if run == 0 {
                    continue;
                }
                report.runs.push(json!({
                    "machine": subject.name,
                    "gap_ms": moved.gap_ms,
                    "said_ms": moved.said_ms,
                    "total_ms": moved.total_ms,
                    "bytes": moved.bytes,
                    "report": moved.report,
                }));
                moves.push(moved);
            }
        }
        for (subject, moves) in subjects.iter().zip(&moves) {
            summarise(&mut report, &subject.name, moves);
        }
        judge(&mut report);
        let whole = subjects.iter().zip(&moves);
        for (subject, moves) in
            whole.filter(|(s, _)| matches!(&s.who, Who::Godwit(spec) if spec.without.is_empty()))
        {
            let reports: Vec<_> = moves.iter().filter_map(|m| m.report.as_ref()).collect();
            phases::judge_predictions(&mut report, &subject.name, &reports);
        }
        for Subject { name, .. } in &subjects {
            for mechanism in &self.without {
                let without = format!("{name} without {mechanism}: gap");
                let ratio = format!("{name} without {mechanism} to with it, gap");
                report.compare(ratio, &without, &format!("{name}: gap"));
            }
        }
        // The last of ours, with all mechanisms, has the most devices.
        let ours = subjects.iter().zip(&moves).rfind(
            |(subject, _)| matches!(&subject.who, Who::Godwit(spec) if spec.without.is_empty()),
        );
        if let Some(typical) = ours.and_then(|(_, moves)| typical(moves)) {
            self.draw(typical)?;
        }
        Ok(report)
    }

    fn draw(&self, moved: &migration::report::Report) -> Result<()> {
        let write = |path: &Path, text: String| {
            fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))
        };
        if let Some(path) = &self.trace {
            write(path, serde_json::to_string(&picture::trace(moved))?)?;
        }
        if let Some(path) = &self.svg {
            write(path, picture::svg(moved))?;
        }
        Ok(())
    }
}

/// The report of the move whose gap is in the middle.
fn typical(moves: &[Move]) -> Option<&migration::report::Report> {
    let mut sorted: Vec<_> = moves.iter().collect();
    sorted.sort_by(|a, b| a.gap_ms.total_cmp(&b.gap_ms));
    sorted.get(sorted.len() / 2)?.report.as_ref()
}

fn summarise(report: &mut Report, name: &str, moves: &[Move]) {
    let all = |value: fn(&Move) -> f64| moves.iter().map(value).collect::<Vec<_>>();
    report.summarise(format!("{name}: gap"), &all(|m| m.gap_ms), "ms");
    report.summarise(format!("{name}: said"), &all(|m| m.said_ms), "ms");
    report.summarise(format!("{name}: total"), &all(|m| m.total_ms), "ms");
    let mib = |m: &Move| (m.bytes >> 10) as f64 / 1024.0;
    report.summarise(format!("{name}: sent"), &all(mib), "MiB");
    let apart = moves.iter().filter_map(|m| {
        let copying = phases::state_copying_us(m.report.as_ref()?)?;
        Some(m.gap_ms - godwit::ms(copying))
    });
    let apart: Vec<_> = apart.collect();
    report.summarise(format!("{name}: {}", presets::APART), &apart, "ms");
    let reports: Vec<_> = moves.iter().filter_map(|m| m.report.as_ref()).collect();
    phases::summarise(report, name, &reports);
}
