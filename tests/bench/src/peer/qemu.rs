//! QEMU with the bundled guest.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use test_framework::console::Console;
use test_framework::machine::Device;
use test_framework::process::{Launch, Process};
use test_guest::Workload;

const PROGRAM: &str = "qemu-system-x86_64";

/// Whether it is there.
pub(crate) fn is_installed() -> bool {
    Command::new(PROGRAM)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok()
}

/// Starts a microvm, its fastest machine, with its own devices in the place of ours.
pub(crate) fn microvm(
    workload: &Workload,
    devices: &[Device],
) -> Result<(Process, Console, Instant)> {
    // What the guest cannot find out there: microvm has no MCFG and another sleep type.
    let workload = Workload {
        ecam_mib: 3584,
        slp_typ: 5,
        ..workload.clone()
    };
    let (ours, theirs) = UnixStream::pair().context("no console")?;
    let mut launch = Launch::new(Path::new(PROGRAM));
    let console = launch.inherit(theirs.into());
    launch = launch
        .option("-machine", "microvm,accel=kvm,pcie=on,rtc=on")
        .option("-cpu", "host,-arch-capabilities")
        .option("-m", "64M")
        .option("-smp", "1")
        .arg("-nodefaults")
        .arg("-no-user-config")
        .option("-display", "none")
        .arg("-no-reboot")
        .option(
            "-chardev",
            "socket,id=console,fd=".to_owned() + &console.to_string(),
        )
        .option("-serial", "chardev:console")
        .option("-kernel", test_guest::program())
        .option("-append", workload.to_string());
    for (number, device) in devices.iter().enumerate() {
        launch = match device {
            Device::Blk { image, .. } => launch
                .option(
                    "-drive",
                    format!(
                        "if=none,id=d{number},format=raw,file.locking=off,file.filename={}",
                        image.display()
                    ),
                )
                .option(
                    "-device",
                    format!("virtio-blk-pci,drive=d{number},disable-legacy=on"),
                ),
            Device::Foreign { kind, .. } => bail!("QEMU has no {kind} of its own to compare"),
            Device::Net { tap, .. } => launch
                .option(
                    "-netdev",
                    format!("tap,id=n{number},ifname={tap},script=no,downscript=no"),
                )
                .option(
                    "-device",
                    format!("virtio-net-pci,netdev=n{number},disable-legacy=on,romfile="),
                ),
        };
    }
    let started = Instant::now();
    Ok((launch.start()?, Console::new(ours)?, started))
}
