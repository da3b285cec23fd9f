//! What a machine is: the definition from which a core makes it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use thiserror::Error;

use super::migrate::Incoming;
use crate::hypervisor::CpuLevel;
use crate::memory::HugePages;
use crate::migration::without::Without;
use crate::remote::Endpoint;
use crate::remote::vfio_user::VfioUserConfig;
use crate::remote::vhost_user::VhostUserConfig;

/// Most vCPUs of a machine.
pub const MOST_VCPUS: u32 = 32;

/// A machine.
#[derive(Debug)]
pub struct MachineConfig {
    /// Its name, in messages.
    pub name: String,
    /// What it starts in.
    pub boot: BootConfig,
    /// Number of vCPUs, 1 to [`MOST_VCPUS`].
    pub cpus: u32,
    /// What they show of the host's processor.
    pub cpu: CpuLevel,
    /// Bytes of RAM.
    pub memory: u64,
    /// Pages behind the RAM.
    pub hugepages: Option<HugePages>,
    /// Whether all RAM is made present before the guest starts.
    pub prefault: bool,
    /// Where the first serial port leads.
    pub serial: SerialConfig,
    /// Devices in other processes, in the order of their PCI addresses, and how to
    /// reach their back-ends.
    pub vhost_user: Vec<(VhostUserConfig, Endpoint)>,
    /// PCI devices of other processes, whose addresses follow.
    pub vfio_user: Vec<(VfioUserConfig, Endpoint)>,
    /// Links to the processes of devices, by the names of the devices.
    pub links: Vec<(String, OwnedFd)>,
    /// The KVM device.
    pub kvm: KvmSource,
    /// Where it comes from, if it is not booted.
    pub incoming: Option<Incoming>,
    /// Is told that a machine has come, when it has.
    pub end: Option<File>,
    /// What its migrations leave out.
    pub without: Without,
}

/// What a machine starts in.
#[derive(Debug)]
pub enum BootConfig {
    /// A kernel.
    Kernel {
        /// Its image: bzImage or ELF with a PVH note.
        kernel: ImageSource,
        /// Initial RAM disk.
        initrd: Option<ImageSource>,
        /// Kernel command line.
        cmdline: String,
    },
    /// A firmware: its image, as it is in ROM.
    Firmware(ImageSource),
}

/// A file that is put into memory.
#[derive(Debug)]
pub struct ImageSource {
    /// Its path; only its name in messages when it is open.
    pub path: PathBuf,
    /// The open file.
    pub file: Option<File>,
}

/// Where the first serial port leads.
#[derive(Debug)]
pub enum SerialConfig {
    /// This process's terminal or pipes.
    Stdio,
    /// Nowhere.
    Null,
    /// A file, for output only.
    File(PathBuf),
    /// An open socket or terminal, both ways.
    Fd(OwnedFd),
}

/// Where KVM comes from.
#[derive(Debug)]
pub enum KvmSource {
    /// A device to open.
    Path(PathBuf),
    /// An open device.
    Fd(OwnedFd),
}

/// Why no machine can be made of a definition.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// vCPUs.
    #[error("{cpus} vCPUs are not possible: give 1 to {MOST_VCPUS}")]
    Cpus {
        /// vCPUs asked for.
        cpus: u32,
    },
    /// Memory.
    #[error("{memory} bytes of memory are not possible: give at least 16M and at most 1T")]
    Memory {
        /// Bytes asked for.
        memory: u64,
    },
    /// Two devices of one name.
    #[error("two devices are named {id}: give each an id of its own")]
    DuplicateDevice {
        /// The name.
        id: String,
    },
    /// A device that cannot come from elsewhere.
    #[error("device {id} is a PCI device of vfio-user, with which no machine can arrive")]
    Arrival {
        /// Its name.
        id: String,
    },
}

impl MachineConfig {
    /// Refuses a definition that cannot work, before anything is opened or started.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(1..=MOST_VCPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus { cpus: self.cpus });
        }
        if !((16 << 20)..=(1 << 40)).contains(&self.memory) {
            return Err(ConfigError::Memory {
                memory: self.memory,
            });
        }
        let vfio_user = self.vfio_user.iter().map(|(device, _)| &device.id);
        if let (Some(_), Some(id)) = (&self.incoming, vfio_user.clone().next()) {
            return Err(ConfigError::Arrival { id: id.clone() });
        }
        let vhost_user = self.vhost_user.iter().map(|(device, _)| &device.id);
        let mut ids: Vec<_> = vhost_user.chain(vfio_user).collect();
        ids.sort();
        match ids.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(ConfigError::DuplicateDevice {
                id: pair[0].clone(),
            }),
            None => Ok(()),
        }
    }
}
