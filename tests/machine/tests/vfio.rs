//! PCI devices of other processes, over vfio-user: the synthetic one of `godwit-vfio`.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};
use api::core::Link;
use nix::sys::signal::Signal;
use tempfile::{TempDir, tempfile};
use test_framework::machine::{DEADLINE, Definition, Device, Machine, make_image};
use test_guest::{BlkMode, Idle, Report, Workload};
use test_machine::{active, beat, becomes, finish, stop, work};

const COPIES: u32 = 100;

/// A guest that copies, with an interrupt for each copy.
fn copying() -> Workload {
    Workload {
        copies: COPIES,
        idle: Idle::Halt,
        ..work()
    }
}

/// A guest that has memory to look after when it has copied, until it is told to stop.
fn staying() -> Definition {
    let mut definition = Definition::of(&Workload {
        heartbeat: 50,
        span: 4,
        dirty: 4,
        ..copying()
    });
    definition.devices.push(Device::Copier);
    definition
}

/// Waits until the guest has done all copies of a device, rightly.
fn copied(machine: &mut Machine) -> Result<u32> {
    let (_, (dev, copies, irqs, errors)) =
        machine
            .console
            .report("the end of the copies", DEADLINE, |report| match *report {
                Report::Copy {
                    dev,
                    copies,
                    irqs,
                    errors,
                    end: true,
                    ..
                } => Some((dev, copies, irqs, errors)),
                _ => None,
            })?;
    assert_eq!((copies, irqs, errors), (COPIES.into(), COPIES.into(), 0));
    Ok(dev)
}

#[test]
fn a_guest_uses_devices_of_both_protocols() -> Result<()> {
    let folder = TempDir::new()?;
    let image = folder.path().join("disk");
    make_image(&image, 16)?;
    let mut definition = Definition::of(&Workload {
        blk: BlkMode::Verify,
        ..copying()
    });
    definition.cpus = 2;
    definition.devices = vec![
        Device::Copier,
        Device::Blk { image, queues: 2 },
        Device::Copier,
    ];
    let mut machine = Machine::start(&definition)?;
    assert_eq!(active(&mut machine)?.0, 3);
    let both = [copied(&mut machine)?, copied(&mut machine)?];
    assert!(both == [0, 1] || both == [1, 0], "{both:?}");
    finish(&mut machine)?;
    Ok(())
}

#[test]
fn the_owner_sees_how_the_device_does() -> Result<()> {
    let mut definition = staying();
    definition.links = true;
    let mut machine = Machine::start(&definition)?;
    copied(&mut machine)?;
    assert_eq!(machine.device_names()?, ["device0"]);
    let status = becomes(&machine, "linked", |status| status.link == Link::Up)?;
    assert_eq!((status.kind.as_str(), status.connected), ("vfio", true));
    assert_eq!((status.reconnects, status.trouble.as_str()), (0, ""));
    stop(machine)
}

#[test]
fn a_device_is_as_new_after_a_reset() -> Result<()> {
    let mut machine = Machine::start(&staying())?;
    for _ in 0..3 {
        copied(&mut machine)?;
        beat(&mut machine)?;
        machine.reset()?;
    }
    // In the middle of its work, too.
    active(&mut machine)?;
    machine.reset()?;
    copied(&mut machine)?;
    machine.pause()?;
    machine.resume()?;
    beat(&mut machine)?;
    stop(machine)
}

#[test]
fn a_machine_outlives_the_process_of_its_device() -> Result<()> {
    let definition = staying();
    let mut machine = Machine::start(&definition)?;
    for round in 1..=3 {
        copied(&mut machine)?;
        machine.devices()[0].signal(Signal::SIGKILL)?;
        let lost = becomes(&machine, "lost", |status| !status.connected)?;
        ensure!(lost.trouble.contains("hung up"), "{lost:?}");
        beat(&mut machine)?;
        beat(&mut machine)?;
        machine.restart_device(&definition, 0)?;
        let back = machine.device_status("device0")?;
        assert_eq!((back.connected, back.reconnects), (true, round));
        assert_eq!(back.trouble, "");
        machine.reset()?;
    }
    copied(&mut machine)?;
    stop(machine)
}

#[test]
fn a_machine_with_such_a_device_does_not_move() -> Result<()> {
    let mut machine = Machine::start(&staying())?;
    copied(&mut machine)?;
    let (control, _other) = UnixStream::pair()?;
    let migrate = machine.move_by(async |mover| {
        let control = std::os::fd::OwnedFd::from(control).into();
        mover
            .migrate(control, Vec::new(), HashMap::new(), HashMap::new())
            .await
    });
    let file = std::os::fd::OwnedFd::from(tempfile()?).into();
    let snapshot =
        machine.move_by(async |mover| mover.snapshot(file, Vec::new(), HashMap::new()).await);
    for refused in [migrate, snapshot] {
        let error = refused.expect_err("it is refused");
        match error.downcast_ref() {
            Some(api::Error::NotMigratable(why)) => {
                assert_eq!(
                    why,
                    "device device0 cannot move: it is a PCI device of vfio-user"
                );
            }
            _ => panic!("{error:#}"),
        }
    }
    beat(&mut machine)?;
    stop(machine)
}
