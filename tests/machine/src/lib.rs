//! Helpers for tests of whole machines with the bundled guest.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use api::core::DeviceStatus;
use test_framework::machine::{DEADLINE, Machine};
use test_framework::network;
use test_guest::{Report, Workload, command};

/// The host's side of the first network device, as the guest assumes it.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// Work that ends in power off.
pub fn work() -> Workload {
    Workload {
        poweroff: true,
        ..Workload::default()
    }
}

/// A network of the test's own, with one tap and an echo service behind it.
pub fn network(tap: &str, queues: u16) -> Result<()> {
    network::enter()?;
    network::add_tap(tap, HOST, queues)?;
    network::echo(HOST, 7)
}

/// Waits until the core says what is wanted of the first device.
pub fn becomes(
    machine: &Machine,
    what: &str,
    wanted: impl Fn(&DeviceStatus) -> bool,
) -> Result<DeviceStatus> {
    let end = Instant::now() + DEADLINE;
    loop {
        let status = machine.device_status("device0")?;
        if wanted(&status) {
            return Ok(status);
        }
        ensure!(Instant::now() < end, "never {what}: {status:?}");
    }
}

/// Tells the guest to stop, which finds nothing wrong with its devices.
pub fn stop(mut machine: Machine) -> Result<()> {
    machine.console.send(command::STOP)?;
    finish(&mut machine)?;
    Ok(())
}

/// The guest's last words: what each disk and network device did, and whether all was well.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Reads compared, writes, of all disks.
    pub blocks: (u64, u64),
    /// Packets sent and right answers, of all network devices.
    pub packets: (u64, u64),
    /// Pages that were compared at the end.
    pub pages: u64,
    /// Interrupts.
    pub irqs: u64,
}

/// Waits for the end of the guest's work, which must have gone well, and of the machine.
pub fn finish(machine: &mut Machine) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let (_, ok) = machine
        .console
        .report("the end of the work", DEADLINE, |report| {
            match *report {
                Report::Blk {
                    reads,
                    writes,
                    end: true,
                    ..
                } => {
                    outcome.blocks.0 += reads;
                    outcome.blocks.1 += writes;
                }
                Report::Net {
                    sent,
                    received,
                    end: true,
                    ..
                } => {
                    outcome.packets.0 += sent;
                    outcome.packets.1 += received;
                }
                Report::Verify { pages, .. } => outcome.pages += pages,
                Report::Done { ok, irqs, .. } => {
                    outcome.irqs = irqs;
                    return Some(ok);
                }
                _ => {}
            }
            None
        })?;
    ensure!(
        ok,
        "the guest found something wrong: {:#?}",
        machine.console.history()
    );
    machine.wait_for_power_off()?;
    Ok(outcome)
}

/// Waits until the guest runs with all its devices.
pub fn active(machine: &mut Machine) -> Result<(u32, u32)> {
    let (_, active) =
        machine
            .console
            .report("active devices", DEADLINE, |report| match *report {
                Report::Active {
                    devices, queues, ..
                } => Some((devices, queues)),
                _ => None,
            })?;
    Ok(active)
}

/// Waits for the next heartbeat; its number.
pub fn beat(machine: &mut Machine) -> Result<u64> {
    let (_, n) = machine
        .console
        .report("a heartbeat", DEADLINE, |report| match *report {
            Report::Beat { n, .. } => Some(n),
            _ => None,
        })?;
    Ok(n)
}

/// Whether the guest says nothing for a while.
pub fn is_silent(machine: &mut Machine, time: Duration) -> bool {
    machine
        .console
        .line(std::time::Instant::now() + time)
        .is_err()
}
