//! A device of the host, from its address to its descriptors.
//!
//! ```text
//! container ◄── group ──► device        the group's devices are all out of the host's hands
//!     │
//!     └── IOMMU of type 1, version 2    guest memory is mapped and pinned here
//! ```
//! Debian's kernels have this way only, and not `/dev/iommu`.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use device_kit::{OptionError, adopt};
use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{VFIO_GROUP_FLAGS_VIABLE, VFIO_TYPE1v2_IOMMU};

use super::ioctl;
use crate::config::{HOST, HOST_FD, HostFds};

/// What a device is used by.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) device: OwnedFd,
    pub(super) container: OwnedFd,
    /// The device is this process's as long as it is open.
    pub(super) group: OwnedFd,
}

/// Opens the device at `address`, by the descriptors of `handed` or by the names of `/dev/vfio`.
pub(super) fn open(address: &str, handed: Option<HostFds>) -> Result<Opened, OptionError> {
    let refuse = |problem: String| OptionError {
        option: HOST,
        value: address.to_owned(),
        problem,
    };
    let (container, group) = match handed {
        Some(handed) => (take(handed.container)?, take(handed.group)?),
        None => by_name(address).map_err(refuse)?,
    };
    let viable = ioctl::group_flags(group.as_fd())
        .map_err(|error| refuse(format!("its group cannot be examined: {error}")))?;
    if viable & VFIO_GROUP_FLAGS_VIABLE == 0 {
        return Err(refuse(
            "another device of its IOMMU group has a driver of the host: give all of \
             /sys/bus/pci/devices/ADDRESS/iommu_group/devices to vfio-pci"
                .to_owned(),
        ));
    }
    let device = join(address, &container, &group).map_err(refuse)?;
    Ok(Opened {
        device,
        container,
        group,
    })
}

/// Puts the group into the container, and opens the device.
fn join(address: &str, container: &OwnedFd, group: &OwnedFd) -> Result<OwnedFd, String> {
    let (container, group) = (container.as_fd(), group.as_fd());
    if !matches!(
        ioctl::has_extension(container, VFIO_TYPE1v2_IOMMU),
        Ok(true)
    ) {
        return Err("the kernel has no vfio_iommu_type1: load that module".to_owned());
    }
    let joined = ioctl::set_container(group, container)
        .and_then(|()| ioctl::set_iommu(container, VFIO_TYPE1v2_IOMMU));
    joined.map_err(|error| match error {
        Errno::EPERM => "its IOMMU does not isolate interrupts: load vfio_iommu_type1 with \
                         allow_unsafe_interrupts=1 if the guest is trusted"
            .to_owned(),
        error => format!("its IOMMU cannot be used: {error}"),
    })?;
    ioctl::device(group, address).map_err(|error| match error {
        Errno::ENODEV => "it is not bound to vfio-pci, or of another group".to_owned(),
        error => format!("it cannot be opened: {error}"),
    })
}

/// A descriptor that was handed over.
fn take(number: i32) -> Result<OwnedFd, OptionError> {
    adopt(number).ok_or_else(|| OptionError {
        option: HOST_FD,
        value: number.to_string(),
        problem: "is no open descriptor above 2; hand over /dev/vfio/vfio and the device's group"
            .to_owned(),
    })
}

fn by_name(address: &str) -> Result<(OwnedFd, OwnedFd), String> {
    let link = format!("/sys/bus/pci/devices/{address}/iommu_group");
    let group = fs::read_link(&link).map_err(|error| {
        format!("{link} cannot be read ({error}): the device must exist, and be behind an IOMMU")
    })?;
    let group = group.file_name().unwrap_or_default();
    let open = |path: &Path| {
        let node = OpenOptions::new().read(true).write(true).open(path);
        node.map(OwnedFd::from).map_err(|error| {
            let path = path.display();
            format!("{path} cannot be opened ({error}): bind the device to vfio-pci, and let nobody use it")
        })
    };
    let folder = Path::new("/dev/vfio");
    Ok((open(&folder.join("vfio"))?, open(&folder.join(group))?))
}
