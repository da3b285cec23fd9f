//! Machines whose devices are processes, at work.

use std::fs;
use std::time::Instant;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use test_framework::machine::{DEADLINE, Definition, Device, Machine, make_image};
use test_framework::network;
use test_guest::{Activate, BlkMode, Idle, NetMode, Report, Workload, command};
use test_machine::{active, beat, finish, network, work};

fn disk(folder: &TempDir, queues: u16) -> Result<Device> {
    let image = folder.path().join(format!("disk{queues}"));
    make_image(&image, 32)?;
    Ok(Device::Blk { image, queues })
}

#[test]
fn what_is_written_to_a_disk_is_read_back() -> Result<()> {
    for idle in [Idle::Poll, Idle::Halt] {
        let folder = TempDir::new()?;
        let workload = Workload {
            blk: BlkMode::Verify,
            blk_mib: 8,
            idle,
            ..work()
        };
        let mut definition = Definition::of(&workload);
        definition.cpus = 2;
        definition.devices.push(disk(&folder, 4)?);
        let mut machine = Machine::start(&definition)?;
        let outcome = finish(&mut machine)?;
        assert_eq!(outcome.blocks, (2048, 2048));
        if idle == Idle::Halt {
            assert!(outcome.irqs > 0, "interrupts wake the guest");
        }
        let image = fs::read(folder.path().join("disk4"))?;
        assert!(
            image[..8 << 20]
                .chunks(4096)
                .all(|block| block.iter().any(|b| *b != 0))
        );
        assert!(
            image[8 << 20..].iter().all(|b| *b == 0),
            "nothing else was written"
        );
    }
    Ok(())
}

#[test]
fn requests_that_must_fail_fail() -> Result<()> {
    let folder = TempDir::new()?;
    let mut definition = Definition::of(&Workload {
        blk: BlkMode::Errors,
        ..work()
    });
    definition.devices.push(disk(&folder, 1)?);
    let mut machine = Machine::start(&definition)?;
    finish(&mut machine)?;
    Ok(())
}

#[test]
fn packets_go_out_and_come_back() -> Result<()> {
    network("net0", 4)?;
    for (pairs, net) in [(1, NetMode::Ping), (4, NetMode::Udp)] {
        let workload = Workload {
            net,
            packets: 2000,
            ..work()
        };
        let mut definition = Definition::of(&workload);
        definition.devices.push(Device::Net {
            tap: "net0".into(),
            pairs,
        });
        let mut machine = Machine::start(&definition)?;
        let outcome = finish(&mut machine)?;
        assert_eq!(outcome.packets, (2000, 2000), "{pairs} pairs");
    }
    Ok(())
}

#[test]
fn thirty_two_devices_with_many_queues_are_active_at_once() -> Result<()> {
    network::enter()?;
    let folder = TempDir::new()?;
    let workload = Workload {
        activate: Activate::All,
        blk: BlkMode::Verify,
        blk_mib: 1,
        ring: 16,
        ..work()
    };
    let mut definition = Definition::of(&workload);
    definition.memory_mib = 512;
    for number in 0..24 {
        let image = folder.path().join(format!("disk{number}"));
        make_image(&image, 1)?;
        definition.devices.push(Device::Blk {
            image,
            queues: if number == 0 { 64 } else { 8 },
        });
    }
    for number in 0..8 {
        let tap = format!("many{number}");
        network::add_tap(&tap, std::net::Ipv4Addr::new(10, 77, number, 1), 16)?;
        definition.devices.push(Device::Net { tap, pairs: 16 });
    }
    let mut machine = Machine::start(&definition)?;
    let (devices, queues) = active(&mut machine)?;
    assert_eq!(devices, 32);
    // A network device has a control queue besides its pairs.
    assert_eq!(queues, 64 + 23 * 8 + 8 * 33);
    let outcome = finish(&mut machine)?;
    assert_eq!(outcome.blocks, (24 * 256, 24 * 256));
    Ok(())
}

#[test]
fn all_kinds_of_work_at_once() -> Result<()> {
    network("all0", 1)?;
    let folder = TempDir::new()?;
    let workload = Workload {
        heartbeat: 100,
        blk: BlkMode::Loop,
        net: NetMode::Loop,
        span: 16,
        dirty: 50,
        idle: Idle::Mixed,
        ..work()
    };
    let mut definition = Definition::of(&workload);
    definition.cpus = 4;
    definition.devices = vec![
        disk(&folder, 2)?,
        Device::Net {
            tap: "all0".into(),
            pairs: 1,
        },
    ];
    let mut machine = Machine::start(&definition)?;
    for _ in 0..10 {
        beat(&mut machine)?;
    }
    machine.console.send(command::STOP)?;
    let outcome = finish(&mut machine)?;
    assert_eq!(outcome.packets.0, outcome.packets.1);
    assert_eq!(outcome.pages, 16 << 8);
    Ok(())
}

#[test]
fn a_killed_device_comes_back_with_its_requests() -> Result<()> {
    let folder = TempDir::new()?;
    let workload = Workload {
        heartbeat: 50,
        blk: BlkMode::Loop,
        depth: 8,
        ..work()
    };
    let mut definition = Definition::of(&workload);
    definition.devices.push(disk(&folder, 4)?);
    let mut machine = Machine::start(&definition)?;
    active(&mut machine)?;
    for _ in 0..5 {
        works_on(&mut machine)?;
        machine.devices()[0].signal(Signal::SIGKILL)?;
        machine.restart_device(&definition, 0)?;
    }
    works_on(&mut machine)?;
    machine.console.send(command::STOP)?;
    finish(&mut machine)?;
    Ok(())
}

/// Waits until the disk has completed requests since now.
fn works_on(machine: &mut Machine) -> Result<()> {
    let before = progress(machine)?;
    let end = Instant::now() + DEADLINE;
    while progress(machine)? <= before + 100 {
        ensure!(Instant::now() < end, "the disk stands still");
        beat(machine)?;
    }
    Ok(())
}

/// Requests that the disk has completed so far.
fn progress(machine: &mut Machine) -> Result<u64> {
    let (_, done) = machine
        .console
        .ask("progress", DEADLINE, |report| match *report {
            Report::Blk { reads, writes, .. } => Some(reads + writes),
            _ => None,
        })?;
    Ok(done)
}
