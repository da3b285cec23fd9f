//! The lock of an image goes with the machine: one side has it at every moment but the one in which
//! it is handed over, and a machine without its lock does not run.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use api::core::State;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use tempfile::TempDir;
use test_framework::machine::DEADLINE;
use test_migration::{Fault, Outcome, Side, Spec, at_work, beat_on, finish};

/// Longer than a thief needs.
const PAUSE: Duration = Duration::from_millis(500);

/// Somebody else who wants the image.
struct Thief(File);

impl Thief {
    fn new(image: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(image);
        Ok(Self(file.context("no image")?))
    }

    /// Whether it has the image now.
    fn tries(&self) -> Result<bool> {
        let range = nix::libc::flock {
            l_type: i16::try_from(nix::libc::F_WRLCK)?,
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        match fcntl(&self.0, FcntlArg::F_OFD_SETLK(&range)) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Tries until it has it.
    fn takes(&self) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        while !self.tries()? {
            ensure!(Instant::now() < end, "the image was never free");
        }
        Ok(())
    }
}

/// Begins a move that fails like this, and lets a thief take the image in it.
fn robbed(side: &Side, spec: &Spec, fault: Fault) -> Result<(Side, Thief, Outcome)> {
    let thief = Thief::new(&spec.disks[0].0)?;
    let destination = side.begin_move(spec, Some(("control", fault)))?;
    thief.takes()?;
    Ok((destination, thief, side.outcome()?))
}

fn reason(outcome: &Outcome) -> &str {
    outcome["reason"].as_str().unwrap_or("none")
}

#[test]
fn an_image_is_locked_while_its_machine_moves_and_where_it_arrives() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2])?;
    let thief = Thief::new(&spec.disks[0].0)?;
    let mut side = at_work(&spec)?;
    for _ in 0..3 {
        ensure!(!thief.tries()?, "free before the move");
        // After its welcome the destination is ready late, when all has been copied once.
        let late = Fault::Delay("Ready", Duration::from_secs(1));
        let mut destination = side.begin_move(&spec, Some(("control", late)))?;
        while side.progress()?["phase"] != "switchover" {
            ensure!(!thief.tries()?, "free while the machine is copied");
        }
        let outcome = side.outcome()?;
        ensure!(outcome["result"] == "moved", "{outcome:#}");
        side.terminate()?;
        drop(side);
        ensure!(!thief.tries()?, "free after the move");
        beat_on(&mut destination)?;
        side = destination;
    }
    finish(side)?;
    Ok(())
}

#[test]
fn a_paused_machine_has_its_lock_where_it_is() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2])?;
    let thief = Thief::new(&spec.disks[0].0)?;
    let side = at_work(&spec)?;
    side.pause()?;
    let mut side = side.move_on(&spec)?.side;
    ensure!(!thief.tries()?, "free after the move");
    side.resume()?;
    beat_on(&mut side)?;
    finish(side)?;
    Ok(())
}

#[test]
fn a_machine_without_its_lock_stays_paused_at_its_destination() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2])?;
    let side = at_work(&spec)?;
    let (mut destination, thief, outcome) = robbed(&side, &spec, Fault::Delay("Commit", PAUSE))?;
    ensure!(outcome["result"] == "moved", "{outcome:#}");
    let why = reason(&outcome);
    ensure!(why.contains("is locked by another process"), "{why}");
    ensure!(why.contains("stays paused"), "{why}");
    assert_eq!(destination.state()?, State::Paused);
    assert!(destination.resume().is_err(), "two writers");
    assert!(side.resume().is_err(), "two machines");
    drop(thief);
    destination.resume()?;
    beat_on(&mut destination)?;
    finish(destination)?;
    Ok(())
}

#[test]
fn a_machine_that_is_given_back_takes_its_lock_back() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2])?;
    let side = at_work(&spec)?;
    let spoilt = ("control", Fault::Spoil("Commit", Duration::ZERO));
    let (mut side, destination, outcome) = side.try_move(&spec, Some(spoilt))?;
    ensure!(outcome["result"] == "kept", "{outcome:#}");
    drop(destination);
    ensure!(!Thief::new(&spec.disks[0].0)?.tries()?, "free afterwards");
    beat_on(&mut side)?;
    finish(side)?;
    Ok(())
}

#[test]
fn a_machine_that_does_not_get_its_lock_back_stays_paused() -> Result<()> {
    let folder = TempDir::new()?;
    let spec = Spec::with_disks(&folder, &[2])?;
    let mut side = at_work(&spec)?;
    let (destination, thief, outcome) = robbed(&side, &spec, Fault::Spoil("Commit", PAUSE))?;
    ensure!(outcome["result"] == "kept", "{outcome:#}");
    let why = reason(&outcome);
    ensure!(why.contains("is locked by another process"), "{why}");
    assert_eq!(side.state()?, State::Paused);
    assert!(side.resume().is_err(), "two writers");
    drop((destination, thief));
    side.resume()?;
    beat_on(&mut side)?;
    finish(side)?;
    Ok(())
}
