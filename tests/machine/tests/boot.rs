//! Machines without devices: from power-on to the end.

use anyhow::Result;
use test_framework::machine::{DEADLINE, Definition, Machine};
use test_guest::{Idle, Report, Workload, command};
use test_machine::{beat, finish, work};

/// What the guest found when it was up.
fn up(machine: &mut Machine) -> Result<(u32, u64)> {
    let (_, up) = machine
        .console
        .report("the guest", DEADLINE, |report| match *report {
            Report::Up { cpus, mem_mib, .. } => Some((cpus, mem_mib)),
            _ => None,
        })?;
    Ok(up)
}

#[test]
fn a_guest_boots_finds_its_memory_and_powers_off() -> Result<()> {
    let mut definition = Definition::of(&Workload {
        span: 32,
        dirty: 200,
        seconds: 1,
        ..work()
    });
    definition.memory_mib = 256;
    let mut machine = Machine::start(&definition)?;
    let (cpus, mem_mib) = up(&mut machine)?;
    assert_eq!(cpus, 1);
    // Below 1 MiB some is reserved.
    assert!((255..=256).contains(&mem_mib), "{mem_mib} MiB");
    assert_eq!(finish(&mut machine)?.pages, 32 << 8);
    Ok(())
}

#[test]
fn more_vcpus_than_processors_start() -> Result<()> {
    let mut definition = Definition::of(&Workload {
        idle: Idle::Halt,
        ..work()
    });
    definition.cpus = 32;
    definition.memory_mib = 128;
    let mut machine = Machine::start(&definition)?;
    assert_eq!(up(&mut machine)?.0, 32);
    finish(&mut machine)?;
    Ok(())
}

#[test]
fn memory_above_4_gib_is_found() -> Result<()> {
    let mut definition = Definition::of(&work());
    definition.memory_mib = 5 << 10;
    let mut machine = Machine::start(&definition)?;
    let (_, mem_mib) = up(&mut machine)?;
    assert!((5119..=5120).contains(&mem_mib), "{mem_mib} MiB");
    finish(&mut machine)?;
    Ok(())
}

#[test]
fn prefaulted_memory_works_as_any() -> Result<()> {
    let mut definition = Definition::of(&Workload {
        span: 8,
        seconds: 1,
        ..work()
    });
    definition.options.push("--prefault".into());
    let mut machine = Machine::start(&definition)?;
    assert_eq!(finish(&mut machine)?.pages, 8 << 8);
    Ok(())
}

#[test]
fn a_guest_that_reboots_boots_again() -> Result<()> {
    let workload = Workload {
        heartbeat: 50,
        cpus: 2,
        ..Workload::default()
    };
    let mut definition = Definition::of(&workload);
    definition.cpus = 2;
    let mut machine = Machine::start(&definition)?;
    for _ in 0..3 {
        assert_eq!(up(&mut machine)?.0, 2);
        beat(&mut machine)?;
        machine.console.send(command::RESET)?;
    }
    up(&mut machine)?;
    machine.console.send(command::POWEROFF)?;
    machine.wait_for_power_off()
}

#[test]
fn a_triple_fault_ends_the_machine_and_says_so() -> Result<()> {
    let mut machine = Machine::start(&Definition::of(&Workload {
        heartbeat: 50,
        ..Workload::default()
    }))?;
    beat(&mut machine)?;
    machine.console.send(command::TRIPLE)?;
    let status = machine.wait()?;
    assert_eq!(status.code(), Some(3));
    let said = machine.core().stderr();
    assert!(
        said.starts_with("godwit-vmm: vCPU 0: triple fault at rip 0x"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    Ok(())
}
