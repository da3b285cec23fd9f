//! What the owner of a machine can do with it.

use std::time::Duration;

use anyhow::Result;
use api::core::State;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use test_framework::machine::{DEADLINE, Definition, Device, Machine, make_image};
use test_guest::{BlkMode, Report, Workload, command};
use test_machine::{active, beat, finish, is_silent};

/// Beats, and dirties memory, until it is told to stop.
fn beating() -> Workload {
    Workload {
        heartbeat: 20,
        span: 4,
        dirty: 10,
        poweroff: true,
        ..Workload::default()
    }
}

#[test]
fn a_paused_machine_stands_still_and_resumes() -> Result<()> {
    let mut machine = Machine::start(&Definition::of(&beating()))?;
    beat(&mut machine)?;
    for _ in 0..5 {
        machine.pause()?;
        assert_eq!(machine.state()?, State::Paused);
        machine.pause()?;
        // What it had said before is still on its way.
        while !is_silent(&mut machine, Duration::from_millis(100)) {}
        machine.resume()?;
        machine.resume()?;
        assert_eq!(machine.state()?, State::Running);
        beat(&mut machine)?;
    }
    machine.console.send(command::STOP)?;
    finish(&mut machine)?;
    Ok(())
}

#[test]
fn a_machine_can_wait_for_its_owner() -> Result<()> {
    let mut definition = Definition::of(&beating());
    definition.options.push("--paused".into());
    let mut machine = Machine::start(&definition)?;
    assert!(is_silent(&mut machine, Duration::from_millis(300)));
    assert_eq!(machine.state()?, State::Paused);
    machine.resume()?;
    beat(&mut machine)?;
    machine.console.send(command::STOP)?;
    finish(&mut machine)?;
    Ok(())
}

#[test]
fn pausing_under_io_loses_no_request() -> Result<()> {
    let folder = TempDir::new()?;
    let image = folder.path().join("disk");
    make_image(&image, 16)?;
    let workload = Workload {
        blk: BlkMode::Loop,
        depth: 8,
        ..beating()
    };
    let mut definition = Definition::of(&workload);
    definition.devices.push(Device::Blk { image, queues: 4 });
    let mut machine = Machine::start(&definition)?;
    active(&mut machine)?;
    for _ in 0..20 {
        beat(&mut machine)?;
        machine.pause()?;
        machine.resume()?;
    }
    beat(&mut machine)?;
    machine.console.send(command::STOP)?;
    assert!(finish(&mut machine)?.blocks.1 > 100);
    Ok(())
}

#[test]
fn the_owner_resets_a_machine_under_io() -> Result<()> {
    let folder = TempDir::new()?;
    let image = folder.path().join("disk");
    make_image(&image, 16)?;
    let workload = Workload {
        blk: BlkMode::Loop,
        ..beating()
    };
    let mut definition = Definition::of(&workload);
    definition.devices.push(Device::Blk { image, queues: 2 });
    let mut machine = Machine::start(&definition)?;
    for _ in 0..3 {
        active(&mut machine)?;
        beat(&mut machine)?;
        machine.reset()?;
    }
    active(&mut machine)?;
    machine.pause()?;
    machine.reset()?;
    assert_eq!(machine.state()?, State::Paused, "a reset starts nothing");
    machine.resume()?;
    active(&mut machine)?;
    machine.console.send(command::STOP)?;
    finish(&mut machine)?;
    Ok(())
}

#[test]
fn terminating_ends_the_core_with_success() -> Result<()> {
    let mut machine = Machine::start(&Definition::of(&beating()))?;
    beat(&mut machine)?;
    machine.terminate()?;
    machine.wait_for_power_off()
}

#[test]
fn sigterm_and_sigint_end_the_core_with_success() -> Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut machine = Machine::start(&Definition::of(&beating()))?;
        beat(&mut machine)?;
        machine.core().signal(signal)?;
        machine.wait_for_power_off()?;
    }
    Ok(())
}

#[test]
fn what_the_guest_said_last_is_brought_out() -> Result<()> {
    let mut machine = Machine::start(&Definition::of(&Workload {
        poweroff: true,
        ..Workload::default()
    }))?;
    machine.wait_for_power_off()?;
    machine
        .console
        .report("the last line", DEADLINE, |report| {
            matches!(report, Report::Done { .. }).then_some(())
        })?;
    Ok(())
}
