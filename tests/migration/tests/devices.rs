//! A device process that fails, hangs or dies at each point of its life, on either side.

use anyhow::{Context as _, Result, ensure};
use api::core::State;
use tempfile::TempDir;
use test_framework::machine::DEADLINE;
use test_migration::{Counter, Side, Spec, Wires, answers, at_work, beat_on, finish};

/// A machine with a disk and a counting device, both at work.
fn spec(folder: &TempDir) -> Result<Spec> {
    let mut spec = Spec::with_disks(folder, &[2])?;
    spec.workload.count = 500;
    spec.counters.push(Counter {
        queues: 2,
        state_bytes: 300_000,
        ..Counter::default()
    });
    Ok(spec)
}

/// Place of the counting device among the machine's.
const COUNTER: usize = 1;

/// The machine runs here, and its counting device works.
fn works(side: &mut Side) -> Result<()> {
    ensure!(side.state()? == State::Running, "the machine does not run");
    beat_on(side)?;
    let before = answers(side)?;
    while answers(side)? < before + 20 {}
    Ok(())
}

/// Tries to move the machine to a destination that is `there`.
fn attempt(side: &Side, here: &Spec, there: &Spec) -> Result<(Side, serde_json::Value)> {
    let wires = Wires::connect(here.kind, here.channels, &here.ids(), None)?;
    let destination = Side::expect(there, wires.destination, None)?;
    side.migrate(here, wires.source)?;
    Ok((destination, side.outcome()?))
}

/// Fails at each point with `action` at the source. Afterwards its owner starts the device's
/// process anew where that is `needed`, the machine works, and it can still move.
fn at_the_source(action: &str) -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = spec(&folder)?;
    spec.options.push(("blackout-limit-ms", 3000));
    let mut side = at_work(&spec)?;
    let mut restarts = 0;
    for point in ["prepare", "stop", "save", "release"] {
        side.script(0, &format!("{point}={action}"))?;
        let (mut destination, outcome) = attempt(&side, &spec, &spec)?;
        ensure!(outcome["result"] == "kept", "{point}={action}: {outcome:#}");
        ensure!(
            outcome["reason"].is_string(),
            "{point}={action}: {outcome:#}"
        );
        let status = destination.core().wait(DEADLINE)?;
        ensure!(
            !status.success(),
            "{point}={action}: the destination is content"
        );
        side.script(0, "")?;
        let process = &mut side.devices()[COUNTER];
        if action == "hang" || !process.is_running() {
            side.restart_device(COUNTER)?;
            restarts += 1;
        }
        works(&mut side).with_context(|| format!("{point}={action}"))?;
        side = side.move_on(&spec)?.side;
        works(&mut side).with_context(|| format!("after {point}={action}"))?;
    }
    let done = finish(side)?;
    assert_eq!(done.pages, 8 << 8);
    assert_eq!(done.counts.1, restarts * 2, "queues that began anew");
    Ok(())
}

#[test]
fn that_fails_at_the_source() -> Result<()> {
    at_the_source("fail")
}

#[test]
fn that_hangs_at_the_source() -> Result<()> {
    at_the_source("hang")
}

#[test]
fn that_dies_at_the_source() -> Result<()> {
    at_the_source("die")
}

/// Fails at each point before the commit at the destination: the source runs on with all that it
/// had, and another destination is found good.
#[test]
fn that_fails_hangs_or_dies_at_the_destination() -> Result<()> {
    let folder = TempDir::new()?;
    let mut spec = spec(&folder)?;
    spec.options.push(("blackout-limit-ms", 3000));
    let mut side = at_work(&spec)?;
    let script = |script: &str| Counter {
        script: script.to_owned(),
        ..spec.counters[0].clone()
    };
    let small = Counter {
        map_limit: Some(8),
        ..spec.counters[0].clone()
    };
    for counter in [
        script("load=fail"),
        script("load=hang"),
        script("load=die"),
        small,
    ] {
        let mut there = spec.clone();
        there.counters = vec![counter.clone()];
        let (mut destination, outcome) = attempt(&side, &spec, &there)?;
        ensure!(outcome["result"] == "kept", "{counter:?}: {outcome:#}");
        let status = destination.core().wait(DEADLINE)?;
        ensure!(!status.success(), "{counter:?}: the destination is content");
        works(&mut side).with_context(|| format!("{counter:?}"))?;
        side = side.move_on(&spec)?.side;
        works(&mut side).with_context(|| format!("after {counter:?}"))?;
    }
    let done = finish(side)?;
    assert_eq!(done.pages, 8 << 8);
    assert_eq!(done.counts.1, 0, "queues that began anew");
    Ok(())
}

/// After the commit the machine is at the destination. It waits there for no device, and one that
/// hangs or dies works again when its owner has started it anew.
#[test]
fn that_hangs_or_dies_at_its_start_at_the_destination() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = spec(&folder)?;
    let mut side = at_work(&spec)?;
    for action in ["hang", "die"] {
        let mut there = spec.clone();
        there.counters[0].script = format!("start={action}");
        let (mut destination, outcome) = attempt(&side, &spec, &there)?;
        ensure!(outcome["result"] == "moved", "{action}: {outcome:#}");
        side.terminate()?;
        ensure!(destination.state()? == State::Running, "{action}");
        beat_on(&mut destination)?;
        destination.script(0, "")?;
        destination.restart_device(COUNTER)?;
        works(&mut destination).with_context(|| format!("start={action}"))?;
        side = destination.move_on(&spec)?.side;
        works(&mut side).with_context(|| format!("after start={action}"))?;
    }
    let done = finish(side)?;
    assert_eq!(done.pages, 8 << 8);
    assert_eq!(done.counts.1, 2 * 2, "queues that began anew");
    Ok(())
}

/// A device that says again and again that it cannot start is no reason for the others not to.
#[test]
fn that_fails_at_its_start_at_the_destination() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = spec(&folder)?;
    let side = at_work(&spec)?;
    let mut there = spec.clone();
    there.counters[0].script = "start=fail".to_owned();
    let (mut destination, outcome) = attempt(&side, &spec, &there)?;
    ensure!(outcome["result"] == "moved", "{outcome:#}");
    ensure!(destination.state()? == State::Running);
    beat_on(&mut destination)?;
    ensure!(destination.devices()[COUNTER].is_running(), "it has ended");
    destination.terminate()
}
