//! Devices on QEMU's command line.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use test_framework::machine::Device;
use test_framework::process::{Launch, Process};

use super::Disks;

/// Slots of its bus besides the host bridge's.
const SLOTS: usize = 31;

/// Adds every device: disks and network cards of QEMU's own, or disks of the storage daemon in
/// `folder`.
pub(super) fn options(
    mut launch: Launch,
    devices: &[Device],
    disks: Disks,
    folder: &Path,
) -> Result<Launch> {
    for (number, device) in devices.iter().enumerate() {
        let place = place(number, devices.len());
        launch = match (device, disks) {
            (Device::Blk { image, queues }, Disks::Own) => launch
                .option(
                    "-drive",
                    format!(
                        "if=none,id=d{number},format=raw,file.locking=off,file.filename={}",
                        image.display()
                    ),
                )
                .option(
                    "-device",
                    format!("virtio-blk-pci,drive=d{number},num-queues={queues},{place}"),
                ),
            (Device::Blk { queues, .. }, Disks::StorageDaemon) => launch
                .option(
                    "-chardev",
                    format!(
                        "socket,id=d{number},path={}",
                        socket(folder, number).display()
                    ),
                )
                .option(
                    "-device",
                    format!("vhost-user-blk-pci,chardev=d{number},num-queues={queues},{place}"),
                ),
            (Device::Net { tap, pairs }, _) => {
                let (several, vectors) = if *pairs > 1 {
                    let vectors = 2 * pairs + 2;
                    (
                        format!(",queues={pairs}"),
                        format!(",mq=on,vectors={vectors}"),
                    )
                } else {
                    (String::new(), String::new())
                };
                launch
                    .option(
                        "-netdev",
                        format!("tap,id=n{number},ifname={tap},script=no,downscript=no{several}"),
                    )
                    .option(
                        "-device",
                        format!("virtio-net-pci,netdev=n{number},romfile=,{place}{vectors}"),
                    )
            }
            (Device::Balloon, _) => launch
                .option("-object", format!("iothread,id=hints{number}"))
                .option(
                    "-device",
                    format!(
                        "virtio-balloon-pci,free-page-hint=on,free-page-reporting=on,\
                         iothread=hints{number},{place}"
                    ),
                ),
            (Device::Foreign { kind, .. }, _) => bail!("QEMU has no {kind} of its own to compare"),
            (Device::Copier, _) => bail!("QEMU has no device that copies memory to compare"),
        };
    }
    Ok(launch)
}

/// Where a device is: as in our machines, a slot each before any second function.
fn place(number: usize, count: usize) -> String {
    let (slot, function) = (1 + number % SLOTS, number / SLOTS);
    let shared = function == 0 && number + SLOTS < count;
    let shared = if shared { ",multifunction=on" } else { "" };
    format!("disable-legacy=on,addr={slot:x}.{function}{shared}")
}

/// Starts a daemon that serves every disk, if there is any.
pub(super) fn storage_daemon(devices: &[Device], folder: &Path) -> Result<Option<Process>> {
    let mut launch = Launch::new(Path::new("qemu-storage-daemon"));
    let mut any = false;
    for (number, device) in devices.iter().enumerate() {
        let Device::Blk { image, queues } = device else {
            continue;
        };
        any = true;
        let listener =
            UnixListener::bind(socket(folder, number)).context("no socket for a disk")?;
        let listener = launch.inherit(listener.into());
        launch = launch
            .option(
                "--blockdev",
                format!(
                    "driver=file,node-name=d{number},locking=off,filename={}",
                    image.display()
                ),
            )
            .option(
                "--export",
                format!(
                    "type=vhost-user-blk,id=e{number},node-name=d{number},writable=on,\
                     num-queues={queues},addr.type=fd,addr.str={listener}"
                ),
            );
    }
    any.then(|| launch.start()).transpose()
}

fn socket(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("disk{number}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_shared_when_there_are_no_more() {
        assert_eq!(place(0, 31), "disable-legacy=on,addr=1.0");
        assert_eq!(place(0, 32), "disable-legacy=on,addr=1.0,multifunction=on");
        assert_eq!(place(1, 32), "disable-legacy=on,addr=2.0");
        assert_eq!(place(31, 32), "disable-legacy=on,addr=1.1");
    }
}
