//! Programs of others in the place of ours: the protocol is what both sides speak.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tempfile::TempDir;
use test_framework::console::Console;
use test_framework::machine::{DEADLINE, Definition, Device, Machine, make_image};
use test_framework::process::{Launch, Process};
use test_framework::programs::program;
use test_guest::{BlkMode, Report, Workload};
use test_machine::{finish, work};

/// Waits until somebody listens on `socket`.
fn listening(socket: &Path, process: &mut Process) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while !socket.exists() {
        ensure!(
            process.is_running(),
            "{} ended: {}",
            process.name(),
            process.stderr()
        );
        ensure!(Instant::now() < end, "{} does not listen", process.name());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// QEMU's storage daemon serves a disk of our machine.
#[test]
fn a_back_end_of_qemu_serves_our_guest() -> Result<()> {
    let folder = TempDir::new()?;
    let (image, socket) = (folder.path().join("disk"), folder.path().join("socket"));
    make_image(&image, 16)?;
    let blockdev = format!("driver=file,node-name=disk,filename={}", image.display());
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=4,addr.type=unix,addr.path={}",
        socket.display()
    );
    let mut daemon = Launch::new(Path::new("qemu-storage-daemon"))
        .option("--blockdev", blockdev)
        .option("--export", export)
        .start()?;
    listening(&socket, &mut daemon)?;

    let workload = Workload {
        blk: BlkMode::Verify,
        blk_mib: 4,
        ..work()
    };
    let mut definition = Definition::of(&workload);
    definition.devices.push(Device::Foreign {
        kind: "blk",
        socket,
    });
    let mut machine = Machine::start(&definition)?;
    assert_eq!(finish(&mut machine)?.blocks, (1024, 1024));
    Ok(())
}

/// Our block device serves a disk of QEMU's machine.
#[test]
fn our_back_end_serves_a_guest_of_qemu() -> Result<()> {
    let folder = TempDir::new()?;
    let (image, socket) = (folder.path().join("disk"), folder.path().join("socket"));
    make_image(&image, 16)?;
    let mut device = Launch::new(&program("godwit-blk")?)
        .option("--socket-path", &socket)
        .option("--blk-file", &image)
        .option("--num-queues", "4")
        .start()?;
    listening(&socket, &mut device)?;

    let workload = Workload {
        blk: BlkMode::Verify,
        blk_mib: 4,
        ..work()
    };
    let (ours, theirs) = UnixStream::pair()?;
    let mut launch = Launch::new(Path::new("qemu-system-x86_64"));
    let console = launch.inherit(theirs.into());
    let mut qemu = launch
        .option("-machine", "q35,accel=kvm,memory-backend=ram")
        .option("-bios", "qboot.rom")
        .option("-cpu", "host,-arch-capabilities")
        .option("-m", "128M")
        .option("-object", "memory-backend-memfd,id=ram,size=128M,share=on")
        .arg("-nodefaults")
        .arg("-no-reboot")
        .option("-display", "none")
        .option("-chardev", format!("socket,id=console,fd={console}"))
        .option("-serial", "chardev:console")
        .option(
            "-chardev",
            format!("socket,id=disk,path={}", socket.display()),
        )
        .option(
            "-device",
            "vhost-user-blk-pci,chardev=disk,num-queues=4,disable-legacy=on",
        )
        .option("-kernel", test_guest::program())
        .option("-append", workload.to_string())
        .start()?;
    let mut console = Console::new(ours)?;
    let mut blocks = (0, 0);
    let (_, ok) = console.report("the end of the work", DEADLINE, |report| match *report {
        Report::Blk {
            reads,
            writes,
            end: true,
            ..
        } => {
            blocks = (reads, writes);
            None
        }
        Report::Done { ok, .. } => Some(ok),
        _ => None,
    })?;
    ensure!(
        ok,
        "the guest found something wrong: {:#?}",
        console.history()
    );
    assert_eq!(blocks, (1024, 1024));
    ensure!(qemu.wait(DEADLINE)?.success(), "QEMU: {}", qemu.stderr());
    ensure!(
        device.is_running(),
        "our device waits for the next front-end"
    );
    Ok(())
}
