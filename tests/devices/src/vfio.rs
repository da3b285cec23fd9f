//! `godwit-vfio` over a real vfio-user socket, without a guest: its synthetic device.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use test_framework::frontend::{PATIENCE, wait_for};
use test_framework::process::{Launch, Process};
use test_framework::programs::program;
use vfio_user::{Client, DmaRegion, IrqAction, IrqData, RegionFlags, pci};

use crate::cases::link::Core;

const PROGRAM: &str = "godwit-vfio";

const REGISTERS: u32 = pci::BAR0_REGION;
const MEMORY: u32 = pci::BAR0_REGION + 2;
const COMMAND: u64 = 0x04;
const BUS_MASTER: u16 = 1 << 2;

const SCRATCH: u64 = 0x08;
const STATUS: u64 = 0x0c;
const SOURCE: u64 = 0x10;
const DESTINATION: u64 = 0x18;
const LENGTH: u64 = 0x20;
const VECTOR: u64 = 0x24;
const GO: u64 = 0x28;
const ERROR: u64 = 0x2c;
const DONE: u32 = 1;
const FAILED: u32 = 2;

/// Where the guest's memory is, and how much.
const RAM: u64 = 1 << 32;
const RAM_LEN: u64 = 1 << 20;

/// A process that listens, and its socket's folder.
struct Device {
    process: Process,
    folder: tempfile::TempDir,
    link: Core,
}

impl Device {
    fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (ours, theirs) = UnixStream::pair()?;
        let mut launch = Launch::new(&program(PROGRAM)?).arg("--synthetic");
        let link = launch.inherit(theirs.into());
        let process = launch
            .option("--socket-path", folder.path().join("socket"))
            .option("--control-fd", link.to_string())
            .option("--unit", "card")
            .start()?;
        Ok(Device {
            process,
            folder,
            link: Core::new(ours)?,
        })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn connect(&self) -> Result<UnixStream> {
        wait_for("it listens", || UnixStream::connect(self.socket()).ok())
    }

    fn client(&self) -> Result<Client> {
        Ok(Client::new(self.connect()?, PATIENCE)?)
    }
}

fn get(client: &Client, at: u64) -> Result<u32> {
    let mut word = [0; 4];
    client.region_read(REGISTERS, at, &mut word)?;
    Ok(u32::from_le_bytes(word))
}

fn set(client: &Client, at: u64, value: u32) -> Result<()> {
    Ok(client.region_write(REGISTERS, at, &value.to_le_bytes())?)
}

/// Gives the device memory, and lets it access that.
fn give_memory(client: &Client) -> Result<File> {
    let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC)?);
    memory.set_len(RAM_LEN)?;
    let region = DmaRegion {
        address: RAM,
        size: RAM_LEN,
        offset: 0,
        readable: true,
        writable: true,
    };
    client.dma_map(region, Some(memory.as_fd()))?;
    client.region_write(pci::CONFIG_REGION, COMMAND, &BUS_MASTER.to_le_bytes())?;
    Ok(memory)
}

/// Copies, and returns status and error.
fn copy(client: &Client, source: u64, destination: u64, length: u32) -> Result<(u32, u32)> {
    client.region_write(REGISTERS, SOURCE, &source.to_le_bytes())?;
    client.region_write(REGISTERS, DESTINATION, &destination.to_le_bytes())?;
    set(client, LENGTH, length)?;
    set(client, GO, 1)?;
    Ok((get(client, STATUS)?, get(client, ERROR)?))
}

#[test]
fn it_copies_memory_and_interrupts() -> Result<()> {
    let device = Device::start()?;
    let client = device.client()?;
    let mut ids = [0; 4];
    client.region_read(pci::CONFIG_REGION, 0, &mut ids)?;
    assert_eq!(u32::from_le_bytes(ids), 0x6077_1234);
    let vectors = client.irq_info(pci::MSIX_IRQ)?.count;
    let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK);
    let events: Vec<EventFd> = (0..vectors).map(|_| event()).collect::<Result<_, _>>()?;
    let handed = events.iter().map(|event| Some(event.as_fd())).collect();
    let action = IrqAction::Trigger(IrqData::Eventfds(handed));
    client.set_irqs(pci::MSIX_IRQ, 0, &action)?;

    let memory = give_memory(&client)?;
    memory.write_all_at(b"godwit", 0x100)?;
    set(&client, VECTOR, 3)?;
    assert_eq!(copy(&client, RAM + 0x100, RAM + 0x8000, 6)?, (DONE, 0));
    let mut found = [0; 6];
    memory.read_exact_at(&mut found, 0x8000)?;
    assert_eq!(&found, b"godwit");
    let raised: Vec<_> = events
        .iter()
        .map(|event| event.read().unwrap_or(0))
        .collect();
    assert_eq!(raised, [0, 0, 0, 1]);
    assert_eq!(copy(&client, RAM + RAM_LEN - 5, RAM, 6)?, (FAILED, 2));
    client.dma_unmap(RAM, RAM_LEN)?;
    assert_eq!(copy(&client, RAM, RAM + 8, 6)?, (FAILED, 2));

    let statistics = device.link.statistics()?;
    assert_eq!(statistics["copied_bytes"], 6);
    assert_eq!(statistics["interrupts"], 3);
    assert_eq!(statistics["dma_maps"], 1);
    assert!(statistics["requests"] > 10, "{statistics:?}");
    assert_eq!(statistics["failed_requests"], 0);
    Ok(())
}

#[test]
fn memory_behind_a_bar_is_mapped_by_its_file() -> Result<()> {
    let device = Device::start()?;
    let client = device.client()?;
    let region = client.region_info(MEMORY)?;
    assert!(region.flags.contains(RegionFlags::MMAP));
    assert_eq!((region.size, region.areas.len()), (64 << 10, 1));
    assert_eq!(
        (region.areas[0].offset, region.areas[0].size),
        (0, 32 << 10)
    );
    let file = File::from(region.file.context("no file")?);
    file.write_all_at(b"mapped", region.offset + 0x7000)?;
    let mut found = [0; 6];
    client.region_read(MEMORY, 0x7000, &mut found)?;
    assert_eq!(&found, b"mapped");
    client.reset()?;
    file.read_exact_at(&mut found, region.offset + 0x7000)?;
    assert_eq!(found, [0; 6]);
    Ok(())
}

#[test]
fn the_device_outlives_a_front_end_and_its_memory_does_not() -> Result<()> {
    let device = Device::start()?;
    let client = device.client()?;
    give_memory(&client)?;
    set(&client, SCRATCH, 7)?;
    assert_eq!(copy(&client, RAM, RAM + 8, 8)?, (DONE, 0));
    drop(client);
    let client = device.client()?;
    assert_eq!(get(&client, SCRATCH)?, 7);
    assert_eq!(copy(&client, RAM, RAM + 8, 8)?, (FAILED, 2));
    give_memory(&client)?;
    assert_eq!(copy(&client, RAM, RAM + 8, 8)?, (DONE, 0));
    let statistics = device.link.statistics()?;
    assert_eq!(statistics["sessions"], 2);
    assert_eq!(statistics["failed_sessions"], 0);
    Ok(())
}

#[test]
fn garbage_ends_the_session_only() -> Result<()> {
    let device = Device::start()?;
    let mut stream = device.connect()?;
    stream.write_all(&[0xff; 64])?;
    // Who is sent away is told so by the end of the stream.
    let over = || (stream.peer_addr().is_err() || hung_up(&stream)).then_some(());
    wait_for("its session is over", over)?;
    let client = device.client()?;
    assert_eq!(get(&client, 0)?, u32::from_le_bytes(*b"GWDT"));
    assert_eq!(device.link.statistics()?["failed_sessions"], 1);
    Ok(())
}

fn hung_up(stream: &UnixStream) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLHUP)];
    poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].any().unwrap_or(false)
}

#[test]
fn it_works_in_a_sandbox_and_ends_promptly() -> Result<()> {
    let mut device = Device::start()?;
    let client = device.client()?;
    get(&client, 0)?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", device.process.id()))?;
    ensure!(status.contains("Seccomp:\t2"), "{status}");
    ensure!(status.contains("CapEff:\t0000000000000000"), "{status}");
    device.process.signal(Signal::SIGTERM)?;
    let ended = device.process.wait(PATIENCE)?;
    ensure!(ended.success(), "{ended}: {}", device.process.stderr());
    Ok(())
}

#[test]
fn a_connected_descriptor_is_served_once() -> Result<()> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut launch = Launch::new(&program(PROGRAM)?).arg("--synthetic");
    let number = launch.inherit(OwnedFd::from(theirs));
    let mut process = launch.option("--fd", number.to_string()).start()?;
    let client = Client::new(ours, PATIENCE)?;
    assert_eq!(get(&client, 0)?, u32::from_le_bytes(*b"GWDT"));
    drop(client);
    let ended = process.wait(PATIENCE)?;
    ensure!(ended.success(), "{ended}: {}", process.stderr());
    Ok(())
}

#[test]
fn mistakes_are_said_on_one_line() -> Result<()> {
    for (arguments, expected) in [
        (&["--synthetic"][..], "--socket-path"),
        (&["--fd=3"], "--synthetic"),
        (
            &["--fd=3", "--synthetic", "--host=0000:01:00.0"],
            "cannot be used with",
        ),
        (&["--fd=3", "--host=../etc"], "give a PCI address"),
        (
            &["--fd=3", "--synthetic", "--host-fd=4,5"],
            "cannot be used with",
        ),
        (
            &["--socket-path=/nowhere/s", "--host=ffff:ff:1f.7"],
            "--host ffff:ff:1f.7: ",
        ),
        (
            &[
                "--socket-path=/nowhere/s",
                "--host=ffff:ff:1f.7",
                "--host-fd=998,999",
            ],
            "--host-fd 998: is no open descriptor",
        ),
    ] {
        let output = Command::new(program(PROGRAM)?)
            .args(arguments)
            .stdin(Stdio::null())
            .output()?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(!output.status.success(), "{arguments:?}: {said}");
        ensure!(said.lines().count() == 1, "{arguments:?}: {said}");
        ensure!(said.contains(expected), "{arguments:?}: {said}");
    }
    let output = Command::new(program(PROGRAM)?)
        .arg("--print-capabilities")
        .output()?;
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(json["type"], "vfio");
    Ok(())
}
