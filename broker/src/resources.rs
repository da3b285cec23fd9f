//! What a machine's processes are handed, opened here: /dev/kvm, kernels, images, taps.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::definition::{Definition, DeviceKind, Disk, Vfio};
use crate::{tap, vfio};

const KVM: &str = "/dev/kvm";

/// Why something is not to be had. Each says what to do.
#[derive(Debug, Error)]
pub enum ResourceError {
    /// KVM.
    #[error(
        "{KVM} cannot be opened ({source}): load the kvm module, and let the broker's user use it (group kvm)"
    )]
    Kvm {
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file.
    #[error("{what} {path} cannot be opened: {source}")]
    File {
        /// `kernel`, `initrd` or `disk`.
        what: &'static str,
        /// Its path.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Something else than a file.
    #[error("{what} {path} is neither a file nor a block device")]
    NoFile {
        /// `kernel`, `initrd` or `disk`.
        what: &'static str,
        /// Its path.
        path: String,
    },
    /// Another file than before.
    #[error("disk {path} is another file than the one the machine was started with")]
    Replaced {
        /// Its path.
        path: String,
    },
    /// A PCI device of the host.
    #[error("PCI device {address} cannot be given to a machine: {problem}")]
    Vfio {
        /// Its address.
        address: String,
        /// What is in the way, and what to do.
        problem: String,
    },
    /// A tap.
    #[error("tap {name} cannot be opened ({source}): {advice}")]
    Tap {
        /// Its name.
        name: String,
        /// What to do.
        advice: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Which file an image is, whatever its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
}

/// Opens KVM.
pub(crate) fn kvm() -> Result<OwnedFd, ResourceError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(KVM)
        .map(OwnedFd::from)
        .map_err(|source| ResourceError::Kvm { source })
}

/// Opens a file that is only read.
pub(crate) fn readable(what: &'static str, path: &str) -> Result<OwnedFd, ResourceError> {
    file(what, path, true).map(|(file, _)| file)
}

fn file(
    what: &'static str,
    path: &str,
    read_only: bool,
) -> Result<(OwnedFd, FileIdentity), ResourceError> {
    let failed = |source| ResourceError::File {
        what,
        path: path.to_owned(),
        source,
    };
    let file: File = OpenOptions::new()
        .read(true)
        .write(!read_only)
        // A pipe must not hold the broker up.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(ResourceError::NoFile {
            what,
            path: path.to_owned(),
        });
    }
    let identity = FileIdentity {
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    Ok((file.into(), identity))
}

/// What a machine needs and this host does not have, as far as that can be known without taking
/// anything.
pub(crate) fn missing(definition: &Definition) -> Vec<String> {
    let mut missing = Vec::new();
    let mut note = |result: Result<(), ResourceError>| {
        missing.extend(result.err().map(|error| error.to_string()));
    };
    note(kvm().map(drop));
    for (key, path) in definition.boot.files() {
        note(readable(key, path).map(drop));
    }
    for device in &definition.devices {
        if let DeviceKind::Disk(disk) = &device.kind {
            note(file("disk", &disk.path, disk.read_only).map(drop));
        }
    }
    if definition.hugepages.is_none()
        && let Some(free) = available_memory()
        && free < definition.memory
    {
        missing.push(format!(
            "it has {} MiB of memory, {} are free here",
            definition.memory >> 20,
            free >> 20
        ));
    }
    missing
}

/// Bytes of memory that can be had without swapping; nothing if the kernel does not say.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

/// What a device process is handed.
#[derive(Debug, Default)]
pub(crate) struct DeviceResources {
    /// An image, or the queues of a tap.
    pub(crate) descriptors: Vec<OwnedFd>,
    /// Which file the image is.
    pub(crate) identity: Option<FileIdentity>,
}

impl DeviceResources {
    /// Opens them. With `known`, the image must still be that file.
    pub(crate) fn open(
        kind: &DeviceKind,
        known: Option<FileIdentity>,
    ) -> Result<Self, ResourceError> {
        match kind {
            DeviceKind::Disk(Disk {
                path, read_only, ..
            }) => {
                let (image, identity) = file("disk", path, *read_only)?;
                if known.is_some_and(|known| known != identity) {
                    return Err(ResourceError::Replaced { path: path.clone() });
                }
                Ok(Self {
                    descriptors: vec![image],
                    identity: Some(identity),
                })
            }
            DeviceKind::Net(net) => Ok(Self {
                descriptors: tap::open(&net.tap, net.queue_pairs)?,
                identity: None,
            }),
            DeviceKind::Vfio(Vfio::Host(address)) => Ok(Self {
                descriptors: vfio::open(address)?,
                identity: None,
            }),
            DeviceKind::Balloon(_) | DeviceKind::VhostUser(_) | DeviceKind::Vfio(_) => {
                Ok(Self::default())
            }
        }
    }
}
