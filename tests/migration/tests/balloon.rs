//! Balloons in machines that move: free pages are not sent, and nothing else is lost.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use test_framework::console::Line;
use test_framework::machine::DEADLINE;
use test_guest::{BalloonMode, Report, Workload};
use test_machine::work;
use test_migration::{Fault, Kind, Moved, Side, Spec, beat_on, finish};

const MIB: u64 = 1 << 20;

fn spec(balloon: BalloonMode, balloon_mib: u32) -> Spec {
    let mut spec = Spec::of(Workload {
        heartbeat: 20,
        balloon,
        balloon_mib,
        ..work()
    });
    spec.balloon = true;
    spec
}

/// Bytes of the host's memory that the machine has.
fn spent(side: &Side) -> Result<u64> {
    Ok(File::from(side.memory()?).metadata()?.blocks() * 512)
}

/// What a guest that has freed `freed` bytes may send: what it uses, and a little that it writes
/// again and again.
fn most(side: &Side, freed: u64) -> Result<u64> {
    Ok(spent(side)?.saturating_sub(freed) + 4 * MIB)
}

fn wait_for(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while !done()? {
        ensure!(Instant::now() < end, "timed out: {what}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(())
}

/// Has the guest give so many bytes, and no more, and waits until it has.
fn gives(side: &Side, bytes: u64) -> Result<()> {
    side.set_balloon_target(bytes)?;
    wait_for("it is given", || Ok(side.balloon()? == (bytes, bytes)))
}

fn sent(outcome: &test_migration::Outcome) -> u64 {
    outcome["report"]["memory_bytes"]
        .as_u64()
        .unwrap_or(u64::MAX)
}

/// A guest that does at random what a driver may, moved a hundred times.
fn a_hundred_times(cpus: u32) -> Result<()> {
    let mut spec = spec(BalloonMode::Random, 16);
    spec.cpus = cpus;
    spec.options = vec![("max-downtime-ms", 100)];
    spec.flags = vec!["auto-converge"];
    let mut side = Side::boot(&spec)?;
    for number in 0..100 {
        beat_on(&mut side)?;
        // Said here, or never: the next side has a console of its own.
        let wrong = |line: &&Line| line.text.starts_with("@badpage");
        if let Some(line) = side.console.history().iter().find(wrong) {
            bail!("after {number} moves: {}", line.text);
        }
        side = side.move_on(&spec)?.side;
    }
    let done = finish(side)?;
    let Some(Report::Balloon {
        inflated,
        deflated,
        reported,
        hinted,
        reused,
        rounds,
        ended,
        bad,
        ..
    }) = done.balloon
    else {
        bail!("the balloon has no last word");
    };
    ensure!(bad == 0, "{bad} pages are wrong");
    ensure!(
        inflated > 1000 && deflated > 1000 && reported > 1000 && hinted > 10_000 && reused > 1000,
        "too little was done to show anything: {:?}",
        done.balloon
    );
    // A guest that the host gives no time may miss one.
    ensure!(rounds > 50 && ended > 50, "{rounds} rounds, {ended} ended");
    Ok(())
}

#[test]
fn a_guest_that_hints_and_reuses_at_random_moves_a_hundred_times() -> Result<()> {
    a_hundred_times(1)
}

#[test]
fn the_same_with_two_vcpus() -> Result<()> {
    a_hundred_times(2)
}

#[test]
fn what_the_guest_gives_returns_to_the_host_here_and_there() -> Result<()> {
    let mut spec = spec(BalloonMode::Follow, 64);
    spec.memory_mib = 128;
    let mut side = Side::boot(&spec)?;
    beat_on(&mut side)?;
    wait_for("memory is used", || Ok(spent(&side)? > 64 * MIB))?;
    gives(&side, 48 * MIB)?;
    let left = spent(&side)?;
    ensure!(left < 32 * MIB, "{left} bytes are left");
    // What it has used and not given is free all the same.
    let most = most(&side, 16 * MIB)?;
    let Moved { mut side, outcome } = side.move_on(&spec)?;
    ensure!(sent(&outcome) < most, "more than {most}: {outcome:#}");
    beat_on(&mut side)?;
    wait_for("the link is up", || Ok(side.balloon().is_ok()))?;
    assert_eq!(side.balloon()?, (48 * MIB, 48 * MIB));
    let there = spent(&side)?;
    ensure!(there < 32 * MIB, "{there} bytes came");
    // What comes back must be zero, which the guest checks.
    gives(&side, 0)?;
    let done = finish(side)?;
    ensure!(
        matches!(
            done.balloon,
            Some(Report::Balloon {
                inflated: 0x3000,
                deflated: 0x3000,
                bad: 0,
                ..
            })
        ),
        "{done:?}"
    );
    Ok(())
}

#[test]
fn reported_pages_return_to_the_host() -> Result<()> {
    let mut spec = spec(BalloonMode::Report, 64);
    spec.memory_mib = 128;
    let mut side = Side::boot(&spec)?;
    beat_on(&mut side)?;
    wait_for("memory is given", || Ok(spent(&side)? < 32 * MIB))?;
    let done = finish(side)?;
    ensure!(
        matches!(
            done.balloon,
            Some(Report::Balloon {
                reported: 0x4000,
                ..
            })
        ),
        "{done:?}"
    );
    Ok(())
}

/// Free pages that the guest fills with a poison: it finds none spoilt here, nor there, where the
/// balloon must know of it as well.
#[test]
fn poisoned_pages_stay_and_travel() -> Result<()> {
    let mut spec = spec(BalloonMode::Poison, 64);
    spec.memory_mib = 128;
    let mut side = Side::boot(&spec)?;
    for _ in 0..2 {
        beat_on(&mut side)?;
        let before = spent(&side)?;
        ensure!(before > 64 * MIB, "{before} bytes are left");
        let Moved {
            side: next,
            outcome,
        } = side.move_on(&spec)?;
        side = next;
        ensure!(sent(&outcome) > 64 * MIB, "{outcome:#}");
        wait_for("the link is up", || Ok(side.balloon().is_ok()))?;
    }
    beat_on(&mut side)?;
    gives(&side, 16 * MIB)?;
    gives(&side, 0)?;
    let done = finish(side)?;
    ensure!(
        matches!(
            done.balloon,
            Some(Report::Balloon {
                inflated: 0x1000,
                reported: 0x4000,
                hinted: 0,
                rounds: 0,
                bad: 0,
                ..
            })
        ),
        "{done:?}"
    );
    Ok(())
}

#[test]
fn what_the_guest_has_said_of_its_memory_moves() -> Result<()> {
    let spec = spec(BalloonMode::Follow, 16);
    let mut side = Side::boot(&spec)?;
    beat_on(&mut side)?;
    let said =
        |side: &Side| -> Result<_> { Ok(side.balloon_statistics()?.get("free_bytes").copied()) };
    wait_for("it is asked again", || Ok(said(&side)? > Some(1)))?;
    side.set_balloon_statistics_interval(0)?;
    let before = said(&side)?;
    let mut side = side.move_on(&spec)?.side;
    beat_on(&mut side)?;
    wait_for("the link is up", || Ok(side.balloon().is_ok()))?;
    assert_eq!(said(&side)?, before);
    // The question that it had open goes on.
    side.set_balloon_statistics_interval(1)?;
    wait_for("it is asked here", || Ok(said(&side)? > before))?;
    finish(side)?;
    Ok(())
}

#[test]
fn pages_that_were_used_and_freed_are_not_sent() -> Result<()> {
    let mut spec = spec(BalloonMode::Follow, 128);
    spec.memory_mib = 192;
    let mut side = Side::boot(&spec)?;
    beat_on(&mut side)?;
    wait_for("memory is used", || Ok(spent(&side)? > 128 * MIB))?;
    let most = most(&side, 128 * MIB)?;
    let Moved { mut side, outcome } = side.move_on(&spec)?;
    ensure!(sent(&outcome) < most, "more than {most}: {outcome:#}");
    beat_on(&mut side)?;
    let done = finish(side)?;
    let Some(Report::Balloon { hinted, ended, .. }) = done.balloon else {
        bail!("the balloon has no last word");
    };
    ensure!(hinted >= 0x8000 && ended == 1, "{done:?}");
    Ok(())
}

#[test]
fn the_guest_has_its_pages_back_however_a_migration_ends() -> Result<()> {
    let mut spec = spec(BalloonMode::Follow, 64);
    spec.memory_mib = 128;
    let mut side = Side::boot(&spec)?;
    beat_on(&mut side)?;
    let mut ended = 0;
    // While memory is copied, and in the blackout.
    for fault in [("ram0", Fault::Cut(1 << 16)), ("balloon", Fault::Cut(10))] {
        let (source, _, outcome) = side.try_move(&spec, Some(fault))?;
        ensure!(outcome["result"] == "kept", "{outcome:#}");
        side = source;
        ended += 1;
        told(&mut side, ended)?;
    }
    // Cancelled while the guest is waited for.
    let late = Fault::Delay("Ready", std::time::Duration::from_secs(30));
    let _destination = side.begin_move(&spec, Some(("control", late)))?;
    wait_for("it copies", || {
        Ok(side.progress()?["round"].as_u64() > Some(1))
    })?;
    side.cancel()?;
    ensure!(side.outcome()?["result"] == "kept");
    told(&mut side, ended + 1)?;
    finish(side)?;
    Ok(())
}

/// Waits until the guest has heard so many times that it may use its pages again.
fn told(side: &mut Side, times: u64) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    loop {
        let said = side
            .console
            .ask("its balloon", DEADLINE, |report| match report {
                Report::Balloon { ended, .. } => Some(*ended),
                _ => None,
            });
        let (_, ended) = said.context("the guest says nothing of its balloon")?;
        if ended >= times {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the guest was told {ended} times");
    }
}

#[test]
fn a_balloon_whose_process_is_killed_goes_on() -> Result<()> {
    let mut spec = spec(BalloonMode::Follow, 64);
    spec.memory_mib = 128;
    let mut side = Side::boot(&spec)?;
    beat_on(&mut side)?;
    gives(&side, 48 * MIB)?;
    let given = (48 * MIB, 48 * MIB);
    // The last round of hints is one that the next process must not use again.
    let (mut side, _, outcome) = side.try_move(&spec, Some(("ram0", Fault::Cut(1 << 16))))?;
    ensure!(outcome["result"] == "kept", "{outcome:#}");
    told(&mut side, 1)?;
    side.restart_device(0)?;
    wait_for("another process answers", || {
        Ok(side.balloon().is_ok_and(|size| size == given))
    })?;
    let Moved { mut side, outcome } = side.move_on(&spec)?;
    ensure!(sent(&outcome) < 32 * MIB, "{outcome:#}");
    beat_on(&mut side)?;
    gives(&side, 0)?;
    let done = finish(side)?;
    let Some(Report::Balloon {
        inflated,
        deflated,
        rounds,
        ended,
        bad: 0,
        ..
    }) = done.balloon
    else {
        bail!("{done:?}");
    };
    // No target but those that were set was ever seen.
    ensure!(
        (inflated, deflated) == (0x3000, 0x3000) && rounds >= 2 && ended >= 2,
        "{done:?}"
    );
    Ok(())
}

#[test]
fn memory_that_is_shared_needs_no_hints() -> Result<()> {
    let mut spec = spec(BalloonMode::Random, 16);
    spec.kind = Kind::Shared;
    let mut side = Side::boot(&spec)?;
    for _ in 0..3 {
        beat_on(&mut side)?;
        side = side.move_on(&spec)?.side;
    }
    finish(side)?;
    Ok(())
}
