//! Machines that move and lose nothing; `matrix.rs` has every way.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use api::core::State;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use test_framework::machine::DEADLINE;
use test_framework::network::Frames;
use test_guest::{NetMode, Workload};
use test_machine::network;
use test_migration::{
    Fault, Kind, Moved, Outcome, Side, Spec, at_work, beat_on, busy, finish, warm_up,
};

#[test]
fn memory_arrives_page_by_page_over_one_channel_and_over_most() -> Result<()> {
    let mut spec = Spec::of(busy());
    let mut side = at_work(&spec)?;
    for channels in [1, 16] {
        spec.channels = channels;
        side = side.move_on(&spec)?.side;
    }
    assert_eq!(finish(side)?.pages, 8 << 8);
    Ok(())
}

#[test]
fn shared_memory_is_not_copied() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = Spec::with_disks(&folder, &[2])?;
    spec.kind = Kind::Shared;
    let Moved { side, outcome } = at_work(&spec)?.move_on(&spec)?;
    assert_eq!(outcome["report"]["memory_bytes"], 0);
    assert_eq!(finish(side)?.pages, 8 << 8);
    Ok(())
}

#[test]
fn a_network_is_told_where_the_guest_is() -> Result<()> {
    network("told0", 4)?;
    let mut spec = Spec::of(Workload {
        net: NetMode::Loop,
        ..busy()
    });
    spec.nics = vec![("told0".into(), 1)];
    let side = at_work(&spec)?;
    let frames = Frames::listen()?;
    let is_rarp = |frame: &[u8]| frame.get(12..14) == Some(&[0x80, 0x35]);
    // Before the guest's own packets fill what the listener has room for.
    let heard = thread::spawn(move || frames.wait(is_rarp, DEADLINE));
    let mut side = side.move_on(&spec)?.side;
    let Ok(frame) = heard.join() else {
        anyhow::bail!("the listener panicked");
    };
    let frame = frame?;
    assert_eq!(frame[6..12], [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    beat_on(&mut side)?;
    finish(side)?;
    Ok(())
}

#[test]
fn only_what_was_used_is_sent_and_the_report_says_what_it_took() -> Result<()> {
    let mut spec = Spec::of(Workload {
        span: 4,
        dirty: 1,
        ..busy()
    });
    spec.memory_mib = 512;
    let side = at_work(&spec)?;
    let Moved { side, outcome } = side.move_on(&spec)?;
    let report = &outcome["report"];
    let bytes = report["memory_bytes"].as_u64().unwrap_or(u64::MAX);
    assert!((4 << 20..16 << 20).contains(&bytes), "{bytes} bytes");
    let span = |side: &str, name: &str| {
        let spans = report[side]["spans"].as_array().map(Vec::as_slice);
        let found = spans.unwrap_or_default().iter().find(|s| s["name"] == name);
        assert!(found.is_some(), "no {name} at the {side} in {report:#}");
    };
    for name in [
        "barrier A",
        "barrier B",
        "barrier C",
        "barrier D",
        "barrier E",
        "save",
    ] {
        span("source", name);
    }
    for name in ["wire", "load", "memory", "barrier E", "barrier F", "run"] {
        span("destination", name);
    }
    assert!(report["blackout_us"].as_u64() > Some(0));
    assert_eq!(finish(side)?.pages, 4 << 8);
    Ok(())
}

/// Page faults of a core that has faulted in guest memory before.
const FEW_FAULTS: u64 = 100;

/// What a side did in the blackout of a move: what it must do, and what it should have done before.
fn costs(outcome: &Outcome, side: &str) -> Result<(u64, Vec<(String, u64)>)> {
    let costs = outcome["report"][side]["costs"].as_object();
    let mut messages = None;
    let mut others = Vec::new();
    for (name, count) in costs.context("no costs")? {
        let count = count.as_u64().context("no number")?;
        match name.as_str() {
            "messages" => messages = Some(count),
            // Of stacks and heaps: the guest's memory has been touched before, thousands of pages.
            "page_faults" => ensure!(count < FEW_FAULTS, "{count} page faults at the {side}"),
            _ => others.push((name.clone(), count)),
        }
    }
    Ok((messages.context("no messages")?, others))
}

#[test]
fn all_is_wired_ahead_and_queues_cost_nothing_in_the_blackout() -> Result<()> {
    network("move1", 4)?;
    let mut counted = Vec::new();
    for queues in [1, 4] {
        let folder = TempDir::new()?;
        let mut spec = Spec::with_disks(&folder, &[queues, queues])?;
        spec.workload.net = NetMode::Loop;
        spec.nics = vec![("move1".into(), queues.min(2))];
        let side = at_work(&spec)?;
        let Moved { side, outcome } = side.move_on(&spec)?;
        for at in ["source", "destination"] {
            let (messages, others) = costs(&outcome, at)?;
            let any = others.iter().find(|(_, count)| *count > 0);
            ensure!(any.is_none(), "{any:?} at the {at} in {outcome:#}");
            ensure!(others.len() == 8, "{others:?}");
            counted.push((at, messages));
        }
        finish(side)?;
    }
    // Stop, save and let go; the end of loading, start: of three devices.
    assert_eq!(counted[..2], [("source", 3), ("destination", 2 * 3)]);
    assert_eq!(counted[..2], counted[2..]);
    Ok(())
}

#[test]
fn a_paused_machine_moves_and_stays_paused() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2])?;
    let side = at_work(&spec)?;
    side.pause()?;
    let mut side = side.move_on(&spec)?.side;
    assert_eq!(side.state()?, State::Paused);
    side.resume()?;
    beat_on(&mut side)?;
    finish(side)?;
    Ok(())
}

#[test]
fn a_machine_that_is_reset_while_it_is_copied_boots_where_it_arrives() -> Result<()> {
    let spec = Spec::of(busy());
    let mut side = Side::boot(&spec)?;
    for _ in 0..10 {
        beat_on(&mut side)?;
    }
    side.pause()?;
    // After its welcome the destination is ready late, when all has been copied once.
    let late = Fault::Delay("Ready", Duration::from_secs(2));
    let mut destination = side.begin_move(&spec, Some(("control", late)))?;
    while side.progress()?["round"].as_u64() < Some(2) {}
    side.reset()?;
    let outcome = side.outcome()?;
    ensure!(outcome["result"] == "moved", "{outcome:#}");
    destination.resume()?;
    destination.console.fill(DEADLINE)?;
    assert_eq!(finish(destination)?.pages, 8 << 8);
    Ok(())
}

#[test]
fn what_devices_write_while_they_stop_arrives() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = Spec::with_disks(&folder, &[4])?;
    spec.workload.depth = 8;
    let mut side = at_work(&spec)?;
    for _ in 0..3 {
        let late = Fault::Delay("Ready", Duration::from_secs(4));
        let destination = side.begin_move(&spec, Some(("control", late)))?;
        let round = |side: &Side| anyhow::Ok(side.progress()?["round"].as_u64().unwrap_or(0));
        while round(&side)? < 2 {}
        // Requests that are in flight now end only when the vCPUs stand still: what their ends
        // write is in no log but the device's, since all that the guest wrote before was sent.
        side.devices()[0].signal(Signal::SIGSTOP)?;
        let stopped = round(&side)?;
        while side.progress()?["phase"] != "switchover" {}
        ensure!(
            round(&side)? >= stopped + 3,
            "too few rounds to show anything"
        );
        side.devices()[0].signal(Signal::SIGCONT)?;
        let outcome = side.outcome()?;
        ensure!(outcome["result"] == "moved", "{outcome:#}");
        side = destination;
        beat_on(&mut side)?;
    }
    finish(side)?;
    Ok(())
}

#[test]
fn a_snapshot_is_the_machine_as_it_was() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = Spec::with_disks(&folder, &[2])?;
    spec.cpus = 2;
    let mut side = Side::boot(&spec)?;
    let before = warm_up(&mut side)?;
    side.console.fill(DEADLINE)?;
    side.pause()?;
    side.snapshot(&spec, folder.path())?;
    // Its disk stays as it is, since the first machine does not go on.
    side.terminate()?;
    drop(side);
    let mut again = Side::restore(&spec, folder.path())?;
    assert_eq!(again.state()?, State::Paused);
    again.resume()?;
    assert!(beat_on(&mut again)? > before);
    assert_eq!(finish(again)?.pages, 8 << 8);

    // One flipped bit anywhere, and there is no machine.
    for name in ["core", "ram0", "disk0"] {
        let path = folder.path().join(name);
        let whole = std::fs::read(&path)?;
        let mut wrong = whole.clone();
        let at = wrong.len() / 2;
        wrong[at] ^= 4;
        std::fs::write(&path, &wrong)?;
        let mut side = Side::restore(&spec, folder.path())?;
        let status = side.core().wait(DEADLINE)?;
        assert_eq!(status.code(), Some(1), "{name}");
        std::fs::write(&path, &whole[..at])?;
        let mut side = Side::restore(&spec, folder.path())?;
        assert_eq!(side.core().wait(DEADLINE)?.code(), Some(1), "{name} cut");
        std::fs::write(&path, &whole)?;
    }
    Ok(())
}

#[test]
fn a_machine_goes_on_after_its_snapshot() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2])?;
    let mut side = at_work(&spec)?;
    side.snapshot(&spec, folder.path())?;
    beat_on(&mut side)?;
    finish(side)?;
    Ok(())
}
