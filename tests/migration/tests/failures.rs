//! A failure at every point, in every process and in every connection: the machine goes on where
//! it was, nothing is lost, and the next attempt succeeds.

use std::time::Duration;

use anyhow::{Result, ensure};
use api::core::State;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use test_framework::machine::{DEADLINE, make_image};
use test_guest::{BlkMode, Workload};
use test_machine::work;
use test_migration::{Fault, Kind, Side, Spec, Wires, beat_on, finish, warm_up};

fn spec(folder: &TempDir) -> Result<Spec> {
    let mut spec = Spec::of(Workload {
        heartbeat: 20,
        span: 8,
        dirty: 20,
        blk: BlkMode::Loop,
        ..work()
    });
    for name in ["a", "b"] {
        let image = folder.path().join(name);
        make_image(&image, 16)?;
        spec.disks.push((image, 2));
    }
    Ok(spec)
}

/// Whatever went wrong: the machine runs here, the other side ends, and it can still move.
fn goes_on(mut source: Side, mut destination: Side, spec: &Spec) -> Result<Side> {
    ensure!(source.state()? == State::Running, "the source does not run");
    beat_on(&mut source)?;
    destination.core().wait(DEADLINE)?;
    let mut moved = source.move_on(spec)?.side;
    beat_on(&mut moved)?;
    Ok(moved)
}

#[test]
fn connections_that_fail_at_every_point() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = spec(&folder)?;
    let mut side = Side::boot(&spec)?;
    warm_up(&mut side)?;
    let faults = [
        ("control", Fault::Cut(10)),
        ("control", Fault::Cut(3000)),
        ("control", Fault::Flip(100)),
        ("control", Fault::Flip(8000)),
        ("control", Fault::CutBack(0)),
        ("control", Fault::CutBack(20)),
        ("ram0", Fault::Cut(0)),
        ("ram0", Fault::Cut(1_000_000)),
        ("ram1", Fault::Flip(1_000_000)),
        ("ram1", Fault::Flip(4)),
        ("disk0", Fault::Cut(0)),
        ("disk0", Fault::Cut(60)),
        ("disk1", Fault::Flip(100)),
        ("disk1", Fault::Flip(20)),
        // Another version of the frame, and a newer schema in it.
        ("disk0", Fault::Flip(8)),
        ("disk0", Fault::Flip(12)),
    ];
    for fault in faults {
        let (source, destination, outcome) = side.try_move(&spec, Some(fault))?;
        ensure!(outcome["result"] == "kept", "{fault:?}: {outcome:#}");
        ensure!(outcome["reason"].is_string(), "{fault:?}: {outcome:#}");
        side = goes_on(source, destination, &spec)?;
    }
    assert_eq!(finish(side)?.pages, 8 << 8);
    Ok(())
}

#[test]
fn a_destination_that_dies() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = spec(&folder)?;
    let mut side = Side::boot(&spec)?;
    warm_up(&mut side)?;
    for victim in ["core", "device"] {
        // It does not stop before the victim is dead.
        spec.options = vec![("max-downtime-ms", 0)];
        let mut destination = side.begin_move(&spec, None)?;
        while side.progress()?["round"].as_u64() < Some(2) {}
        match victim {
            "core" => destination.core().signal(Signal::SIGKILL)?,
            _ => destination.devices()[1].signal(Signal::SIGKILL)?,
        }
        if victim == "device" {
            // Nobody misses it before it is to load.
            side.cancel()?;
        }
        let outcome = side.outcome()?;
        ensure!(outcome["result"] == "kept", "{victim}: {outcome:#}");
        spec.options.clear();
        side = goes_on(side, destination, &spec)?;
    }
    finish(side)?;
    Ok(())
}

#[test]
fn a_device_that_dies_at_the_destination_before_it_loads() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = spec(&folder)?;
    let mut side = Side::boot(&spec)?;
    warm_up(&mut side)?;
    let wires = Wires::connect(Kind::Unix, spec.channels, &spec.ids(), None)?;
    let mut destination = Side::expect(&spec, wires.destination, None)?;
    // It was connected to when its machine was made, which the listening core shows.
    destination.state()?;
    destination.devices()[0].signal(Signal::SIGKILL)?;
    side.migrate(&spec, wires.source)?;
    let outcome = side.outcome()?;
    ensure!(outcome["result"] == "kept", "{outcome:#}");
    finish(goes_on(side, destination, &spec)?)?;
    Ok(())
}

#[test]
fn a_migration_is_cancelled_while_it_copies() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = spec(&folder)?;
    // As fast as it goes: something is left after every round.
    (spec.workload.span, spec.workload.dirty) = (32, 0);
    spec.options = vec![("max-downtime-ms", 0)];
    let mut side = Side::boot(&spec)?;
    warm_up(&mut side)?;
    let destination = side.begin_move(&spec, None)?;
    while side.progress()?["round"].as_u64() < Some(3) {}
    beat_on(&mut side)?;
    side.cancel()?;
    let outcome = side.outcome()?;
    ensure!(outcome["result"] == "kept", "{outcome:#}");
    assert!(side.cancel().is_err(), "there is none any more");
    spec.options.clear();
    finish(goes_on(side, destination, &spec)?)?;
    Ok(())
}

#[test]
fn a_machine_that_does_not_fit_is_refused_with_every_reason() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = spec(&folder)?;
    let mut side = Side::boot(&spec)?;
    warm_up(&mut side)?;
    let mut other = spec.clone();
    (other.cpus, other.memory_mib) = (2, 128);
    other.disks[0].1 = 1;
    let wires = Wires::connect(Kind::Unix, spec.channels, &spec.ids(), None)?;
    let destination = Side::expect(&other, wires.destination, None)?;
    side.migrate(&spec, wires.source)?;
    let outcome = side.outcome()?;
    let reason = outcome["reason"].as_str().unwrap_or_default();
    for part in ["vCPUs", "memory", "device disk0: its number of queues"] {
        assert!(reason.contains(part), "{part} in {reason}");
    }
    finish(goes_on(side, destination, &spec)?)?;
    Ok(())
}

#[test]
fn a_guest_that_is_too_fast_is_given_up_or_slowed_down() -> Result<()> {
    let mut spec = Spec::of(Workload {
        heartbeat: 50,
        span: 32,
        dirty: 0,
        ..work()
    });
    spec.channels = 1;
    let bandwidth = ("max-bandwidth", 64 << 20);
    spec.options = vec![("max-downtime-ms", 0), ("patience-s", 1), bandwidth];
    let mut side = Side::boot(&spec)?;
    warm_up(&mut side)?;
    let (mut source, mut destination, outcome) = side.try_move(&spec, None)?;
    let reason = outcome["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("the guest dirties"), "{outcome:#}");
    beat_on(&mut source)?;
    destination.core().wait(DEADLINE)?;
    spec.options = vec![("max-downtime-ms", 100), ("patience-s", 50), bandwidth];
    spec.flags = vec!["auto-converge"];
    let mut side = source.move_on(&spec)?.side;
    beat_on(&mut side)?;
    assert_eq!(finish(side)?.pages, 32 << 8);
    Ok(())
}

#[test]
fn connections_that_stand_still() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = spec(&folder)?;
    spec.options = vec![("blackout-limit-ms", 3000)];
    let mut side = Side::boot(&spec)?;
    warm_up(&mut side)?;
    for name in ["control", "disk1"] {
        // What comes before the stop passes: hello and wiring are shorter than the core's state.
        let fault = Fault::Stall(if name == "control" { 12_000 } else { 0 });
        let (mut source, destination, outcome) = side.try_move(&spec, Some((name, fault)))?;
        ensure!(outcome["result"] == "kept", "{name}: {outcome:#}");
        beat_on(&mut source)?;
        drop(destination);
        side = source.move_on(&spec)?.side;
        beat_on(&mut side)?;
    }
    finish(side)?;
    Ok(())
}

#[test]
fn a_lost_word_after_the_commit_leaves_it_to_somebody() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = spec(&folder)?;
    let mut side = Side::boot(&spec)?;
    warm_up(&mut side)?;
    // Welcome, Ready and Loaded pass, and Running does not.
    let said = said_before_running()?;
    let (source, mut destination, outcome) =
        side.try_move(&spec, Some(("control", Fault::CutBack(said))))?;
    ensure!(outcome["result"] == "undecided", "{outcome:#}");
    assert_eq!(source.state()?, State::Paused);
    assert!(source.resume().is_err(), "nobody runs it by mistake");
    beat_on(&mut destination)?;
    assert_eq!(destination.state()?, State::Running);
    source.decide(true)?;
    let mut source = source;
    source.core().wait(Duration::from_secs(20))?;
    assert_eq!(finish(destination)?.pages, 8 << 8);
    Ok(())
}

/// Bytes of what a destination says before the machine runs there.
fn said_before_running() -> Result<usize> {
    // Three messages of a header and a short string: Welcome, Ready, Loaded.
    Ok(["Welcome", "Ready", "Loaded"]
        .iter()
        .map(|word| 12 + 1 + word.len())
        .sum())
}
