//! Each process of a machine, on either side, killed at each phase of its migration: exactly one
//! side has the machine, the guest has lost nothing, and the next attempt succeeds.

use anyhow::{Context as _, Result, ensure};
use api::core::State;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use test_framework::machine::DEADLINE;
use test_guest::{BalloonMode, NetMode};
use test_machine::network;
use test_migration::{Fault, Foreign, Gate, Outcome, Side, Spec, at_work, beat_on, finish};

/// The messages that are held up while somebody is killed: the machine is compared, copied, about to
/// stop, stopped, loaded, given away, and runs at the destination.
const PHASES: [&str; 7] = [
    "Hello", "Wiring", "Stopping", "Core", "Loaded", "Commit", "Running",
];

/// Where the machine is afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// At the source, as it was.
    Kept,
    /// At the destination.
    Moved,
    /// At one of them: who was killed may have done its part already.
    One,
    /// Paused at the source until somebody decides.
    Undecided,
    /// Its core was killed, and no other has it.
    Nowhere,
    /// It had moved, and its core there was killed.
    Lost,
}
use Place::{Kept, Lost, Moved, Nowhere, One, Undecided};

/// Where the machine is when this is killed at each of [`PHASES`].
const CORE_HERE: [Place; 7] = [Nowhere, Nowhere, Nowhere, Nowhere, Nowhere, Moved, Moved];
const CORE_THERE: [Place; 7] = [Kept, Kept, Kept, Kept, Undecided, Undecided, Lost];
const DEVICE_HERE: [Place; 7] = [Kept, Kept, One, One, One, Moved, Moved];
const DEVICE_THERE: [Place; 7] = [Kept, Kept, Kept, Kept, Kept, Kept, Moved];

/// Who is killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Core,
    Device(usize),
}

impl Victim {
    /// The device with this id.
    fn device(spec: &Spec, id: &str) -> Result<Self> {
        let number = spec.ids().iter().position(|known| known == id);
        Ok(Self::Device(number.context("no such device")?))
    }

    fn kill(self, side: &mut Side) -> Result<()> {
        let process = match self {
            Self::Core => side.core(),
            Self::Device(number) => &mut side.devices()[number],
        };
        process.signal(Signal::SIGKILL)?;
        process.wait(DEADLINE)?;
        Ok(())
    }
}

/// A machine with a disk and, if that is another, the device with this id, both at work.
fn spec(folder: &TempDir, victim: &str) -> Result<Spec> {
    let mut spec = Spec::with_disks(folder, &[2])?;
    match victim {
        "net0" => {
            network("kill0", 4)?;
            spec.workload.net = NetMode::Loop;
            spec.nics = vec![("kill0".into(), 1)];
        }
        "balloon" => {
            spec.workload.balloon = BalloonMode::Follow;
            spec.balloon = true;
        }
        "foreign0" => {
            spec.workload.count = 500;
            let (log, state) = (true, true);
            spec.foreign = vec![Foreign::Counter { log, state }];
        }
        _ => {}
    }
    Ok(spec)
}

/// Tries to move the machine, and kills the victim while `phase` is held up. The destination, and
/// what the source says if it can.
fn attempt(
    side: &mut Side,
    spec: &Spec,
    phase: &'static str,
    kill: impl FnOnce(&mut Side, &mut Side) -> Result<()>,
) -> Result<(Side, Option<Outcome>)> {
    let gate = Gate::default();
    let fault = Fault::Wait(phase, gate.clone());
    let mut destination = side.begin_move(spec, Some(("control", fault)))?;
    gate.await_message()?;
    kill(side, &mut destination)?;
    gate.open();
    let outcome = match side.core().is_running() {
        true => Some(side.outcome()?),
        false => None,
    };
    Ok((destination, outcome))
}

/// The machine goes on at the source, and the destination has ended.
fn goes_on(side: &mut Side, mut destination: Side) -> Result<()> {
    ensure!(side.state()? == State::Running, "the source does not run");
    beat_on(side)?;
    let status = destination.core().wait(DEADLINE)?;
    ensure!(!status.success(), "the destination is content");
    Ok(())
}

/// Kills a process of the source at each phase, and finds the machine in these places.
fn here(victim: &str, places: [Place; 7]) -> Result<()> {
    table(victim, places, true)
}

/// The same with one of the destination.
fn there(victim: &str, places: [Place; 7]) -> Result<()> {
    table(victim, places, false)
}

fn table(victim: &str, places: [Place; 7], is_here: bool) -> Result<()> {
    let folder = TempDir::new()?;
    let spec = spec(&folder, victim)?;
    let victim = match victim {
        "core" => Victim::Core,
        id => Victim::device(&spec, id)?,
    };
    let mut side = at_work(&spec)?;
    for (phase, place) in PHASES.into_iter().zip(places) {
        side = row(side, &spec, (victim, is_here), phase, place)
            .with_context(|| format!("{victim:?} at {phase}"))?;
        side = side.move_on(&spec)?.side;
        beat_on(&mut side).with_context(|| format!("after {victim:?} at {phase}"))?;
    }
    finish(side)?;
    Ok(())
}

/// One row of the table: the side that has the machine in the end.
fn row(
    mut side: Side,
    spec: &Spec,
    (victim, is_here): (Victim, bool),
    phase: &'static str,
    place: Place,
) -> Result<Side> {
    let (mut destination, outcome) = attempt(&mut side, spec, phase, |here, there| {
        victim.kill(if is_here { here } else { there })
    })?;
    let result = outcome
        .as_ref()
        .and_then(|outcome| outcome["result"].as_str());
    let place = match (place, result) {
        (One, Some("moved")) => Moved,
        (One, _) => Kept,
        (place, _) => place,
    };
    let expected = match place {
        Kept => Some("kept"),
        Undecided => Some("undecided"),
        Moved | Lost if outcome.is_some() => Some("moved"),
        _ => None,
    };
    ensure!(result == expected, "{outcome:#?} instead of {expected:?}");
    match (place, victim) {
        (Kept, Victim::Device(number)) if is_here => {
            side.restart_device(number)?;
            goes_on(&mut side, destination)?;
            Ok(side)
        }
        (Kept, _) => {
            goes_on(&mut side, destination)?;
            Ok(side)
        }
        (Undecided, _) => {
            ensure!(side.state()? == State::Paused, "the source runs");
            ensure!(side.resume().is_err(), "nobody runs it by mistake");
            side.decide(false)?;
            goes_on(&mut side, destination)?;
            Ok(side)
        }
        (Nowhere, _) => {
            let status = destination.core().wait(DEADLINE)?;
            ensure!(!status.success(), "the destination is content");
            drop(side);
            at_work(spec)
        }
        (Lost, _) => {
            // Its devices there may still hold their images.
            drop((side, destination));
            at_work(spec)
        }
        (Moved | One, _) => {
            ensure!(destination.state()? == State::Running, "it does not run");
            if let Victim::Device(number) = victim
                && !is_here
            {
                destination.restart_device(number)?;
            }
            beat_on(&mut destination)?;
            Ok(destination)
        }
    }
}

#[test]
fn the_core_of_the_source() -> Result<()> {
    here("core", CORE_HERE)
}

#[test]
fn the_core_of_the_destination() -> Result<()> {
    there("core", CORE_THERE)
}

#[test]
fn a_disk_of_the_source() -> Result<()> {
    here("disk0", DEVICE_HERE)
}

#[test]
fn a_disk_of_the_destination() -> Result<()> {
    there("disk0", DEVICE_THERE)
}

#[test]
fn a_network_card_of_the_source() -> Result<()> {
    here("net0", DEVICE_HERE)
}

#[test]
fn a_network_card_of_the_destination() -> Result<()> {
    there("net0", DEVICE_THERE)
}

#[test]
fn a_balloon_of_the_source() -> Result<()> {
    here("balloon", DEVICE_HERE)
}

#[test]
fn a_balloon_of_the_destination() -> Result<()> {
    there("balloon", DEVICE_THERE)
}

#[test]
fn a_back_end_of_others_at_the_source() -> Result<()> {
    here("foreign0", DEVICE_HERE)
}

#[test]
fn a_back_end_of_others_at_the_destination() -> Result<()> {
    there("foreign0", DEVICE_THERE)
}
