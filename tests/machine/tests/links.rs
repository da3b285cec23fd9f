//! What a core knows of its devices by the links to their processes.

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};
use api::core::{DeviceStatus, Link};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use test_framework::machine::{Definition, Device, Machine, make_image};
use test_guest::{BlkMode, Workload};
use test_machine::{active, becomes, stop, work};

/// A machine whose disk works until it is told to stop.
fn busy(folder: &TempDir, links: bool) -> Result<(Definition, Machine)> {
    let image = folder.path().join("disk");
    make_image(&image, 32)?;
    let mut definition = Definition::of(&Workload {
        heartbeat: 50,
        blk: BlkMode::Loop,
        depth: 8,
        ..work()
    });
    definition.devices.push(Device::Blk { image, queues: 2 });
    definition.links = links;
    let mut machine = Machine::start(&definition)?;
    active(&mut machine)?;
    Ok((definition, machine))
}

fn requests(status: &DeviceStatus) -> u64 {
    status.statistics.get("requests").copied().unwrap_or(0)
}

#[test]
fn a_device_process_tells_how_it_does() -> Result<()> {
    let folder = TempDir::new()?;
    let (_, machine) = busy(&folder, true)?;
    assert_eq!(machine.device_names()?, ["device0"]);
    let first = becomes(&machine, "at work", |status| requests(status) > 100)?;
    assert_eq!(first.link, Link::Up);
    assert_eq!(
        (first.kind.as_str(), first.state.as_str()),
        ("blk", "Running")
    );
    assert_eq!((first.connected, first.reconnects), (true, 0));
    assert_eq!(
        (first.trouble.as_str(), first.last_error.as_str()),
        ("", "")
    );
    ensure!(first.mapped_bytes >= 64 << 20, "{first:?}");
    becomes(&machine, "further", |now| {
        requests(now) > requests(&first) + 100
    })?;
    machine.pause()?;
    assert_eq!(machine.device_status("device0")?.state, "Stop");
    machine.resume()?;
    ensure!(machine.device_status("device1").is_err());
    stop(machine)
}

#[test]
fn a_new_process_gets_a_new_link() -> Result<()> {
    let folder = TempDir::new()?;
    let (definition, mut machine) = busy(&folder, true)?;
    becomes(&machine, "at work", |status| requests(status) > 100)?;
    machine.devices()[0].signal(Signal::SIGKILL)?;
    let alone = becomes(&machine, "alone", |status| !status.connected)?;
    ensure!(
        alone.link != Link::Up || alone.statistics.is_empty(),
        "{alone:?}"
    );
    becomes(&machine, "without its link", |status| {
        status.link == Link::Lost
    })?;
    machine.restart_device(&definition, 0)?;
    let back = becomes(&machine, "back", |status| {
        status.link == Link::Up && status.connected && requests(status) > 100
    })?;
    assert_eq!(back.reconnects, 1);
    stop(machine)
}

#[test]
fn a_machine_needs_no_link_and_survives_a_bad_one() -> Result<()> {
    let folder = TempDir::new()?;
    let (_, machine) = busy(&folder, false)?;
    let status = machine.device_status("device0")?;
    assert_eq!((status.link, status.connected), (Link::None, true));
    assert_eq!(status.statistics.len(), 0);
    for junk in [b"\n".as_slice(), &[0xff; 10_000], b"OK \r\n"] {
        let (mut ours, theirs) = UnixStream::pair()?;
        machine.attach_link("device0", theirs.into())?;
        // The core may hang up in the middle of it.
        let _ = ours.write_all(junk);
        becomes(&machine, "lost", |status| status.link == Link::Lost)?;
    }
    let (_silent, theirs) = UnixStream::pair()?;
    machine.attach_link("device0", theirs.into())?;
    assert_eq!(machine.device_status("device0")?.link, Link::Waiting);
    let (_, theirs) = UnixStream::pair()?;
    ensure!(machine.attach_link("nobody", theirs.into()).is_err());
    machine.pause()?;
    machine.resume()?;
    stop(machine)
}
