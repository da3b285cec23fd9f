//! `cargo xtask demo`: a machine whose devices are processes, at work.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;
use test_framework::machine::{Definition, Device, Machine, make_image};
use test_framework::{network, programs};
use test_guest::{BlkMode, NetMode, Report, Workload, command};

use crate::cargo;

/// What the guest does, and for how long.
const WORK: Duration = Duration::from_secs(5);

/// Boots the bundled guest with a disk and a network device, and shows its work.
pub fn demo() -> Result<()> {
    let built = cargo::build(false)?;
    programs::use_folder(built.clone());
    put_guest(&built)?;
    network::enter()?;
    let (host, guest) = (Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2));
    network::add_tap("demo0", host, 1)?;
    network::echo(host, 7)?;
    let folder = TempDir::new()?;
    let image = folder.path().join("disk");
    make_image(&image, 64)?;

    let workload = Workload {
        heartbeat: 1000,
        blk: BlkMode::Loop,
        blk_mib: 16,
        net: NetMode::Loop,
        ip: test_guest::Ipv4(guest.octets()),
        peer: test_guest::Ipv4(host.octets()),
        dirty: 50,
        span: 16,
        poweroff: true,
        ..Workload::default()
    };
    let definition = Definition {
        cpus: 2,
        memory_mib: 128,
        devices: vec![
            Device::Blk { image, queues: 1 },
            Device::Net {
                tap: "demo0".into(),
                pairs: 1,
            },
        ],
        ..Definition::of(&workload)
    };
    let mut machine = Machine::start(&definition)?;
    let core = machine.core().id();
    println!("\na machine of three processes:");
    println!("  godwit-vmm {core:>7}  2 vCPUs, 128 MiB");
    for device in machine.devices() {
        println!("  {} {:>7}", device.name(), device.id());
    }
    println!("\nits guest writes to its disk, reads back and compares, sends packets to an echo");
    println!("service and compares, and dirties memory and compares, all at once:\n");
    show(&mut machine, WORK)?;
    machine.pause()?;
    println!("  (paused for half a second: vCPUs and devices stand still)");
    std::thread::sleep(Duration::from_millis(500));
    machine.resume()?;
    machine.console.send(command::STOP)?;
    let ok = finish(&mut machine)?;
    machine.wait_for_power_off()?;
    if !ok {
        bail!("the guest found differences");
    }
    println!("\nno byte and no packet differed; the guest powered off.");
    println!("\nNext, a machine of your own, with the same guest:");
    println!("  export PATH={}:$PATH", built.display());
    println!("  godwit run --demo --name first");
    Ok(())
}

/// Puts the bundled guest where `godwit` looks for it: beside the programs.
fn put_guest(programs: &Path) -> Result<()> {
    let place = programs.join("godwit-demo-guest");
    // A machine may run the one that is there.
    let new = place.with_extension("new");
    fs::copy(test_guest::program(), &new)
        .and_then(|_| fs::rename(&new, &place))
        .with_context(|| format!("the guest cannot be put at {}", place.display()))
}

/// Prints what the guest reports for a while.
fn show(machine: &mut Machine, time: Duration) -> Result<()> {
    let end = std::time::Instant::now() + time;
    while std::time::Instant::now() < end {
        let line = machine.console.line(end + Duration::from_secs(10))?;
        println!("  {}", line.text);
        if let Ok(Some(Report::Fail { .. })) = Report::parse(&line.text) {
            bail!("the guest failed");
        }
    }
    Ok(())
}

/// Prints the guest's last reports; whether all was well.
fn finish(machine: &mut Machine) -> Result<bool> {
    let end = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        let line = machine.console.line(end)?;
        println!("  {}", line.text);
        match Report::parse(&line.text)? {
            Some(Report::Done { ok, .. }) => return Ok(ok),
            Some(Report::Fail { .. }) => return Ok(false),
            _ => {}
        }
    }
}
