//! A failure at every point, in every process and in every connection: the machine goes on where
//! it was, nothing is lost, and the next attempt succeeds.

use std::time::Duration;

use anyhow::{Result, ensure};
use api::core::State;
use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use test_framework::machine::DEADLINE;
use test_framework::network;
use test_guest::Workload;
use test_machine::work;
use test_migration::{Fault, Gate, Kind, Side, Spec, Wires, at_work, beat_on, finish};

/// Whatever went wrong: the machine runs here, the other side ends, and it can still move.
fn goes_on(mut source: Side, mut destination: Side, spec: &Spec) -> Result<Side> {
    ensure!(source.state()? == State::Running, "the source does not run");
    beat_on(&mut source)?;
    destination.core().wait(DEADLINE)?;
    let mut moved = source.move_on(spec)?.side;
    beat_on(&mut moved)?;
    Ok(moved)
}

/// Tries to move a machine whose connections fail like this, one after the other: each time it is
/// kept, for a reason in which that text is, and moves when nothing fails.
fn kept(faults: Vec<(&str, Fault, &str)>) -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2, 2])?;
    let mut side = at_work(&spec)?;
    for (name, fault, why) in faults {
        let (source, destination, outcome) = side.try_move(&spec, Some((name, fault.clone())))?;
        let reason = outcome["reason"].as_str().unwrap_or("none");
        ensure!(
            outcome["result"] == "kept" && reason.contains(why),
            "{name} {fault:?}: {outcome:#}"
        );
        side = goes_on(source, destination, &spec)?;
    }
    assert_eq!(finish(side)?.pages, 8 << 8);
    Ok(())
}

#[test]
fn connections_that_are_cut() -> Result<()> {
    kept(vec![
        ("control", Fault::Cut(10), "link to the other core is lost"),
        ("control", Fault::Cut(3000), ""),
        (
            "control",
            Fault::CutBack(0),
            "link to the other core is lost",
        ),
        ("control", Fault::CutBack(20), ""),
        ("ram0", Fault::Cut(0), "memory channel 0"),
        ("ram0", Fault::Cut(1_000_000), "memory channel 0"),
        ("ram1", Fault::Cut(1_000_000), "memory channel 1"),
        ("disk0", Fault::Cut(0), "disk0"),
        ("disk0", Fault::Cut(60), "disk0"),
    ])
}

#[test]
fn corruption_is_detected_and_never_loaded() -> Result<()> {
    kept(vec![
        // A message's beginning, its checksum, what it says; early and in the blackout.
        ("control", Fault::Flip(0), "sent no message: it begins"),
        // A length, which promises more than will come.
        ("control", Fault::Flip(5), "of its header instead of"),
        ("control", Fault::Flip(9), "of its header instead of"),
        ("control", Fault::Flip(100), "sent no message: checksum"),
        (
            "control",
            Fault::Spoil("Wiring", Duration::ZERO),
            "sent no message",
        ),
        (
            "control",
            Fault::Spoil("Core", Duration::ZERO),
            "sent no message",
        ),
        (
            "control",
            Fault::Spoil("Commit", Duration::ZERO),
            "sent no message",
        ),
        // What the destination says: that it is welcome, that it is ready, that it has loaded.
        ("control", Fault::FlipBack(14), "sent no message"),
        (
            "control",
            Fault::FlipBack(said(&["Welcome"])),
            "sent no message",
        ),
        (
            "control",
            Fault::FlipBack(said(&["Welcome", "Ready"]) + 14),
            "sent no message",
        ),
        // The beginning of a channel; of a record its kind, its first page, how much comes, the
        // header's checksum, that of a page, a page.
        ("ram1", Fault::Flip(4), "this is no memory channel 1"),
        ("ram0", Fault::Flip(16), "channel 0: the header of record 0"),
        ("ram0", Fault::Flip(16 + 9), "the header of record 0"),
        ("ram0", Fault::Flip(16 + 17), "the header of record 0"),
        ("ram0", Fault::Flip(16 + 33), "the header of record 0"),
        ("ram0", Fault::Flip(16 + 5), "the header of record 0"),
        ("ram1", Fault::Flip(16 + 36), "the content of record 0"),
        ("ram1", Fault::Flip(1_000_000), "memory channel 1: the"),
        // A frame's magic, its unit, a chunk's length, its state.
        ("disk0", Fault::Flip(0), "disk0"),
        ("disk1", Fault::Flip(40), "disk1"),
        ("disk0", Fault::Flip(96 + 5), "disk0"),
        ("disk1", Fault::Flip(110), "disk1"),
    ])
}

#[test]
fn versions_that_are_not_known_are_named() -> Result<()> {
    kept(vec![
        // A newer source and an older one.
        (
            "control",
            Fault::Say("Hello", "protocol", 2),
            "speaks version 2 of the protocol",
        ),
        (
            "control",
            Fault::Say("Hello", "protocol", 0),
            "speaks version 0 of the protocol",
        ),
        // States that the destination does not know, or not so new ones.
        (
            "control",
            Fault::Say("Hello", "core", 9),
            "the schema of core is 9 at the source",
        ),
        (
            "control",
            Fault::Say("Hello", "cor", b'x'),
            "knows no state of corx",
        ),
        (
            "control",
            Fault::Say("Core", "schema", 0),
            "schema 0 of core is unknown",
        ),
        (
            "control",
            Fault::Say("Wiring", "schema", 9),
            "schema 9 of wiring is unknown",
        ),
        (
            "ram0",
            Fault::Put(8, 1),
            "this is no memory channel 0 of version 2",
        ),
        // The frame, an old schema, a new one, another kind of device.
        ("disk0", Fault::Put(8, 2), "disk0"),
        ("disk0", Fault::Put(12, 0), "disk0"),
        ("disk1", Fault::Put(12, 9), "disk1"),
        ("disk1", Fault::Put(16, b'x'), "disk1"),
    ])
}

#[test]
fn a_migration_is_cancelled_while_it_copies() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2])?;
    let mut side = at_work(&spec)?;
    // The destination cannot become ready before it knows what for.
    let never = Fault::Wait("Wiring", Gate::default());
    let destination = side.begin_move(&spec, Some(("control", never)))?;
    while side.progress()?["round"].as_u64() < Some(3) {}
    beat_on(&mut side)?;
    side.cancel()?;
    let outcome = side.outcome()?;
    ensure!(outcome["result"] == "kept", "{outcome:#}");
    assert!(side.cancel().is_err(), "there is none any more");
    drop(destination);
    let mut moved = side.move_on(&spec)?.side;
    beat_on(&mut moved)?;
    finish(moved)?;
    Ok(())
}

#[test]
fn a_migration_is_cancelled_in_the_blackout() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = Spec::with_disks(&folder, &[2])?;
    spec.options.push(("blackout-limit-ms", 60_000));
    let side = at_work(&spec)?;
    let gate = Gate::default();
    let held = Fault::Wait("Loaded", gate.clone());
    let destination = side.begin_move(&spec, Some(("control", held)))?;
    gate.await_message()?;
    side.cancel()?;
    let outcome = side.outcome()?;
    ensure!(outcome["result"] == "kept", "{outcome:#}");
    finish(goes_on(side, destination, &spec)?)?;
    Ok(())
}

#[test]
fn a_snapshot_is_cancelled_while_it_is_written() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2])?;
    let mut side = at_work(&spec)?;
    // Nobody reads, and no socket holds so much memory.
    let wires = Wires::connect(Kind::Unix, spec.channels, &spec.ids(), None)?;
    side.begin_snapshot(wires.source)?;
    assert!(side.resume().is_err(), "it stands still");
    side.cancel()?;
    let outcome = side.outcome()?;
    let reason = outcome["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("cancelled"), "{outcome:#}");
    assert_eq!(side.state()?, State::Running);
    beat_on(&mut side)?;
    drop(wires.destination);
    finish(side.move_on(&spec)?.side)?;
    Ok(())
}

#[test]
fn a_machine_that_does_not_fit_is_refused_with_every_reason() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2, 2])?;
    let side = at_work(&spec)?;
    let mut other = spec.clone();
    (other.cpus, other.memory_mib, other.cpu) = (2, 128, "x86-64-v1");
    other.disks[0].1 = 1;
    let wires = Wires::connect(Kind::Unix, spec.channels, &spec.ids(), None)?;
    let destination = Side::expect(&other, wires.destination, None)?;
    side.migrate(&spec, wires.source)?;
    let outcome = side.outcome()?;
    let reason = outcome["reason"].as_str().unwrap_or_default();
    for part in [
        "vCPUs",
        "memory",
        "cpu is host at the source and x86-64-v1 at the destination",
        "lacks CX16, ",
        ", LAHF, ",
        "device disk0: its number of queues",
    ] {
        assert!(reason.contains(part), "{part} in {reason}");
    }
    finish(goes_on(side, destination, &spec)?)?;
    Ok(())
}

/// From now on this thread, and what it starts, reads `text` in the place of `/proc/meminfo`.
fn says_of_memory(folder: &TempDir, text: &str) -> Result<()> {
    let told = folder.path().join("meminfo");
    std::fs::write(&told, text)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let nothing = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(nothing, "/", nothing, private, nothing)?;
    let bind = MsFlags::MS_BIND;
    mount(Some(&told), "/proc/meminfo", nothing, bind, nothing)?;
    Ok(())
}

#[test]
fn a_host_with_too_little_memory_is_named_before_anything_is_copied() -> Result<()> {
    // Who is not root may mount in it.
    network::enter()?;
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2])?;
    let side = at_work(&spec)?;
    says_of_memory(&folder, "MemAvailable:       2048 kB\n")?;
    let (source, destination, outcome) = side.try_move(&spec, None)?;
    let reason = outcome["reason"].as_str().unwrap_or_default();
    ensure!(
        reason.contains("MiB of memory and the destination has 2 MiB free"),
        "{outcome:#}"
    );
    ensure!(outcome["result"] == "kept", "{outcome:#}");
    ensure!(
        source.progress()?["sent-bytes"] == 0,
        "something was copied"
    );
    umount("/proc/meminfo")?;
    finish(goes_on(source, destination, &spec)?)?;
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
    let bandwidth = ("max-bandwidth", 16 << 20);
    spec.options = vec![("max-downtime-ms", 0), ("patience-s", 1), bandwidth];
    let side = at_work(&spec)?;
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
fn connections_that_stand_still_in_the_blackout() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = Spec::with_disks(&folder, &[2, 2])?;
    spec.options.push(("blackout-limit-ms", 2000));
    let mut side = at_work(&spec)?;
    // What comes before the stop passes: hello and wiring are shorter than the core's state.
    for (name, passes) in [("control", 12_000), ("disk1", 0)] {
        let fault = Fault::Stall(passes);
        let (mut source, destination, outcome) = side.try_move(&spec, Some((name, fault)))?;
        ensure!(outcome["result"] == "kept", "{name}: {outcome:#}");
        beat_on(&mut source)?;
        // It does not know that its source has gone on.
        drop(destination);
        side = source.move_on(&spec)?.side;
        beat_on(&mut side)?;
    }
    finish(side)?;
    Ok(())
}

#[test]
fn connections_that_stand_still_while_the_guest_runs() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2, 2])?;
    let mut side = at_work(&spec)?;
    for (name, passes) in [
        ("control", 0),
        ("control", 3000),
        ("ram0", 0),
        ("ram1", 100_000),
    ] {
        let destination = side.begin_move(&spec, Some((name, Fault::Stall(passes))))?;
        beat_on(&mut side)?;
        side.cancel()?;
        let outcome = side.outcome()?;
        ensure!(outcome["result"] == "kept", "{name}: {outcome:#}");
        beat_on(&mut side)?;
        drop(destination);
        side = side.move_on(&spec)?.side;
        beat_on(&mut side)?;
    }
    finish(side)?;
    Ok(())
}

#[test]
fn a_lost_word_after_the_commit_leaves_it_to_somebody() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2, 2])?;
    let side = at_work(&spec)?;
    let (source, mut destination, outcome) =
        side.try_move(&spec, Some(("control", Fault::CutBefore("Running"))))?;
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

#[test]
fn a_machine_that_was_paused_stays_so_when_it_is_decided_that_it_is_here() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2, 2])?;
    let side = at_work(&spec)?;
    side.pause()?;
    let lost = Some(("control", Fault::CutBefore("Commit")));
    let (source, mut destination, outcome) = side.try_move(&spec, lost)?;
    ensure!(outcome["result"] == "undecided", "{outcome:#}");
    destination.core().wait(DEADLINE)?;
    source.decide(false)?;
    assert_eq!(source.state()?, State::Paused);
    source.resume()?;
    let mut source = source;
    beat_on(&mut source)?;
    finish(source.move_on(&spec)?.side)?;
    Ok(())
}

/// Bytes of what a destination says in these messages of one word.
fn said(words: &[&str]) -> usize {
    // A header and a short string.
    words.iter().map(|word| 16 + 1 + word.len()).sum()
}
