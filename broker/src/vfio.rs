//! PCI devices of the host: whether one can be given to a machine, and what its process is handed.
//!
//! The kernel gives away whole IOMMU groups: a device whose group holds another one that a driver of
//! the host uses stays with the host (`Documentation/driver-api/vfio.rst`).

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::resources::ResourceError;

const SYSFS: &str = "/sys/bus/pci/devices";
const NODES: &str = "/dev/vfio";
/// The driver that lets go of a device.
const DRIVER: &str = "vfio-pci";
/// Drivers that leave a device of the same group alone.
const HARMLESS: &[&str] = &[DRIVER, "pci-stub", "pcieport"];

/// Opens a device: the container for its mappings, and its group.
///
/// # Errors
/// It is not there, not ready to be given away, or in use.
pub(crate) fn open(address: &str) -> Result<Vec<OwnedFd>, ResourceError> {
    let group = check(Path::new(SYSFS), address)?;
    let open = |name: &str| {
        let path = Path::new(NODES).join(name);
        let node = OpenOptions::new().read(true).write(true).open(&path);
        node.map(OwnedFd::from)
            .map_err(|error| ResourceError::Vfio {
                address: address.to_owned(),
                problem: closed(&path, &error),
            })
    };
    Ok(vec![open("vfio")?, open(&group)?])
}

/// The name of the device's group, whose devices must all be out of the host's hands.
fn check(sysfs: &Path, address: &str) -> Result<String, ResourceError> {
    let refuse = |problem: String| ResourceError::Vfio {
        address: address.to_owned(),
        problem,
    };
    let device = sysfs.join(address);
    if !device.is_dir() {
        return Err(refuse(
            "there is none at this address, see lspci -D".to_owned(),
        ));
    }
    let driver = name_of(&device.join("driver"));
    if driver.as_deref() != Some(DRIVER) {
        let has = driver.map_or("it has no driver".to_owned(), |name| {
            format!("its driver is {name}")
        });
        return Err(refuse(format!(
            "{has}: give it to {DRIVER} with \
             driverctl --nosave set-override {address} {DRIVER}"
        )));
    }
    let group_of = name_of(&device.join("iommu_group"));
    let group = group_of.ok_or_else(|| {
        refuse(
            "it is behind no IOMMU: turn it on in the computer's firmware, and in the kernel's command \
             line with intel_iommu=on where the processor is Intel's"
                .to_owned(),
        )
    })?;
    let others = fs::read_dir(device.join("iommu_group/devices"))
        .map_err(|error| refuse(format!("its IOMMU group {group} cannot be read: {error}")))?;
    for other in others.flatten() {
        if let Some(driver) = name_of(&other.path().join("driver"))
            && !HARMLESS.contains(&driver.as_str())
        {
            let other = other.file_name().display().to_string();
            return Err(refuse(format!(
                "{other} is in the same IOMMU group {group} and has the driver {driver}: give it to \
                 {DRIVER}, too, with driverctl --nosave set-override {other} {DRIVER}"
            )));
        }
    }
    Ok(group)
}

/// The last part of where a link points to.
fn name_of(link: &Path) -> Option<String> {
    let target: PathBuf = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// Why a node cannot be opened, and what to do.
fn closed(path: &Path, error: &io::Error) -> String {
    let path = path.display();
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY) => {
            format!("another machine or program has it ({path} is in use): switch that off first")
        }
        Some(Errno::EACCES | Errno::EPERM) => {
            format!("the broker may not open {path}: let its user read and write it")
        }
        Some(Errno::ENOENT) => {
            format!("there is no {path}: load the kernel's module {DRIVER}")
        }
        _ => format!("{path} cannot be opened: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs with devices, each with its driver and group.
    fn sysfs(devices: &[(&str, &str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (address, driver, group) in devices {
            let device = root.path().join(address);
            fs::create_dir(&device).unwrap();
            if !driver.is_empty() {
                symlink(format!("../drivers/{driver}"), device.join("driver")).unwrap();
            }
            if !group.is_empty() {
                let members = root.path().join("groups").join(group).join("devices");
                fs::create_dir_all(&members).unwrap();
                symlink(&device, members.join(address)).unwrap();
                let link = root.path().join("groups").join(group);
                symlink(link, device.join("iommu_group")).unwrap();
            }
        }
        root
    }

    #[test]
    fn a_device_is_given_away_with_its_group() {
        let root = sysfs(&[
            ("0000:00:1c.0", "pcieport", "7"),
            ("0000:01:00.0", "vfio-pci", "7"),
            ("0000:01:00.1", "", "7"),
        ]);
        assert_eq!(check(root.path(), "0000:01:00.0").unwrap(), "7");
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let root = sysfs(&[
            ("0000:01:00.0", "nvme", "1"),
            ("0000:02:00.0", "", "2"),
            ("0000:03:00.0", "vfio-pci", ""),
            ("0000:04:00.0", "vfio-pci", "4"),
            ("0000:04:00.1", "snd_hda_intel", "4"),
        ]);
        for (address, expected) in [
            ("0000:09:00.0", "there is none at this address"),
            ("0000:01:00.0", "its driver is nvme: give it to vfio-pci"),
            ("0000:02:00.0", "it has no driver: give it to vfio-pci"),
            ("0000:03:00.0", "it is behind no IOMMU"),
            ("0000:04:00.0", "0000:04:00.1 is in the same IOMMU group 4"),
        ] {
            let error = check(root.path(), address).unwrap_err().to_string();
            assert!(error.contains(address), "{error}");
            assert!(error.contains(expected), "{error}");
        }
    }
}
