//! QEMU's migration.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use test_framework::machine::DEADLINE;
use test_hosts::Qmp;

use super::{Machine, Running};
use crate::cpu_time::CpuTime;
use crate::memory;
use crate::switchover::{MAX_DOWNTIME_MS, Move, gap};

/// Bytes a second that QEMU may send: more than it can.
const BANDWIDTH: u64 = 1 << 36;
/// Time between two looks at how far it is.
const POLL: Duration = Duration::from_millis(5);

impl Machine {
    /// Boots the machine, moves it once over a Unix socket and ends it. With more than one of
    /// `channels` memory goes over so many more of them (multifd).
    pub(crate) fn moved(&self, channels: usize) -> Result<Move> {
        let source = self.booted()?;
        memory::warm_up(usize::try_from(self.memory_mib)? << 20)?;
        Ok(self.move_on(source, channels, true)?.moved)
    }

    /// Starts it, and waits until its guest has come to rest.
    pub(crate) fn booted(&self) -> Result<Running> {
        let mut running = self.launch(false)?;
        gap::warm_up(&mut running.console, u64::from(self.workload.span) << 8)
            .with_context(|| format!("qemu said: {}", running.process.stderr()))?;
        Ok(running)
    }

    /// Moves it as [`Self::moved`] does, with free page hints if it has a balloon, or without them.
    pub(crate) fn move_on(&self, source: Running, channels: usize, hints: bool) -> Result<Moved> {
        let mut destination = self.launch(true)?;
        let way = format!("unix:{}", destination.folder.path().join("way").display());
        let mut there = destination.commands()?;
        let mut here = source.commands()?;
        for qmp in [&mut there, &mut here] {
            set_up(qmp, channels, hints)?;
        }
        let before = CpuTime::of(source.process.id())?;
        there.execute("migrate-incoming", json!({ "uri": way }))?;
        here.execute("migrate", json!({ "uri": way }))?;
        let done = completed(&mut here).with_context(|| {
            let (here, there) = (source.process.stderr(), destination.process.stderr());
            format!("qemu said: {here}; at the destination: {there}")
        })?;
        let times = [
            CpuTime::of(source.process.id())?.since(before),
            CpuTime::of(destination.process.id())?,
        ];
        let gap = gap::after(&mut destination.console)?;
        let ms = |key: &str| {
            done[key]
                .as_f64()
                .with_context(|| format!("no {key} in {done}"))
        };
        let moved = Move {
            gap_ms: gap.as_secs_f64() * 1e3,
            said_ms: ms("downtime")?,
            total_ms: ms("total-time")?,
            bytes: done["ram"]["transferred"].as_u64().unwrap_or(0),
            report: None,
        };
        Ok(Moved {
            moved,
            times,
            machine: destination,
        })
    }
}

/// A machine that has moved.
pub(crate) struct Moved {
    pub moved: Move,
    /// Processor time that it took at the source and at the destination.
    pub times: [CpuTime; 2],
    /// Where it is now.
    pub machine: Running,
}

impl Running {
    fn commands(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp)
            .with_context(|| format!("qemu takes no commands; it said: {}", self.process.stderr()))
    }
}

fn set_up(qmp: &mut Qmp, channels: usize, hints: bool) -> Result<()> {
    let mut parameters = json!({
        "max-bandwidth": BANDWIDTH,
        "downtime-limit": MAX_DOWNTIME_MS,
    });
    let mut capabilities = Vec::new();
    if channels > 1 {
        capabilities.push(json!({ "capability": "multifd", "state": true }));
        parameters["multifd-channels"] = channels.into();
    }
    // Hints have no switch; a migration that could become postcopy does not ask for them.
    capabilities.push(json!({ "capability": "postcopy-ram", "state": !hints }));
    qmp.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": capabilities }),
    )?;
    qmp.execute("migrate-set-parameters", parameters)?;
    Ok(())
}

/// Waits until it is over; what QEMU says of it.
fn completed(qmp: &mut Qmp) -> Result<Value> {
    let end = Instant::now() + DEADLINE;
    while Instant::now() < end {
        let said = qmp.execute("query-migrate", json!({}))?;
        match said["status"].as_str() {
            Some("completed") => return Ok(said),
            Some("failed" | "cancelled") => bail!("the migration failed: {said}"),
            _ => sleep(POLL),
        }
    }
    bail!("the migration did not end within {} s", DEADLINE.as_secs())
}
