//! What the bundled guest does in these tests, and how it is asked.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use test_framework::console::Console;
use test_framework::machine::DEADLINE;
use test_guest::{BlkMode, Report, Workload, command};

/// A guest that works on its disks until it is told to stop, and verifies what it reads.
pub fn busy() -> Workload {
    Workload {
        heartbeat: 50,
        blk: BlkMode::Loop,
        depth: 8,
        poweroff: true,
        ..Workload::default()
    }
}

/// A guest that only prints heartbeats.
pub fn idle() -> Workload {
    Workload {
        heartbeat: 50,
        ..Workload::default()
    }
}

/// Waits until disk `number` has done more.
pub fn works_on(console: &mut Console, number: u32) -> Result<()> {
    let before = progress(console, number)?;
    let end = Instant::now() + DEADLINE;
    while progress(console, number)? <= before + 100 {
        ensure!(Instant::now() < end, "disk {number} stands still");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Requests that a disk has completed so far.
pub fn progress(console: &mut Console, number: u32) -> Result<u64> {
    let wanted = |report: &Report| match *report {
        Report::Blk {
            dev,
            reads,
            writes,
            end: false,
            ..
        } if dev == number => Some(reads + writes),
        _ => None,
    };
    Ok(console.ask("progress", DEADLINE, wanted)?.1)
}

/// Ends the guest's work, all of which must have been right.
pub fn finish(console: &mut Console) -> Result<()> {
    console.send(command::STOP)?;
    let (_, ok) = console.report("the end of the work", DEADLINE, |report| match *report {
        Report::Done { ok, .. } => Some(ok),
        _ => None,
    })?;
    ensure!(
        ok,
        "the guest found something wrong: {:#?}",
        console.history()
    );
    Ok(())
}

/// Waits for two heartbeats that come after this was called, of a clock that never went back.
pub fn beats(console: &mut Console) -> Result<u64> {
    let begin = Instant::now();
    let mut fresh = 0;
    loop {
        let (at, (number, back)) =
            console.report("a heartbeat", DEADLINE, |report| match *report {
                Report::Beat { n, back, .. } => Some((n, back)),
                _ => None,
            })?;
        ensure!(back == 0, "the guest's clock went back {back} times");
        fresh += u32::from(at > begin);
        if fresh == 2 {
            return Ok(number);
        }
    }
}

/// Waits until the guest has found its devices.
pub fn active(console: &mut Console) -> Result<()> {
    let is_active = |report: &Report| matches!(report, Report::Active { .. }).then_some(());
    console
        .report("active devices", DEADLINE, is_active)
        .map(drop)
}
