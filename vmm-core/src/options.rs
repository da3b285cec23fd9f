//! The command line of `godwit-vmm`.
#![expect(unsafe_code, reason = "descriptors are inherited by number")]

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::File;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Parser;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{getsockopt, sockopt};
use vmm_core::hypervisor::CpuLevel;
use vmm_core::machine::config::{BootConfig, ImageSource, KvmSource, MachineConfig, SerialConfig};
use vmm_core::machine::control::Owner;
use vmm_core::machine::migrate::Incoming;
use vmm_core::memory::HugePages;
use vmm_core::migration::setup::Sockets;
use vmm_core::migration::snapshot::Files;
use vmm_core::migration::without::Mechanism;
use vmm_core::remote::Endpoint;
use vmm_core::remote::vfio_user::VfioUserConfig;
use vmm_core::remote::vhost_user::VhostUserConfig;
use vmm_core::transport::DeviceKind;

/// One virtual machine, whose devices are other processes.
#[derive(Debug, Parser)]
#[command(name = "godwit-vmm", version)]
pub struct Options {
    /// Name of the machine, in messages
    #[arg(long, default_value = "machine")]
    name: String,
    /// Kernel: a bzImage (vmlinuz), or an ELF file with a PVH note (vmlinux)
    #[arg(long, value_name = "PATH", required_unless_present = "firmware")]
    kernel: Option<PathBuf>,
    /// The kernel, inherited and open; --kernel is then only its name
    #[arg(long, value_name = "N", requires = "kernel")]
    kernel_fd: Option<RawFd>,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,
    /// The initial RAM disk, inherited and open; --initrd is then only its name
    #[arg(long, value_name = "N", requires = "initrd")]
    initrd_fd: Option<RawFd>,
    /// Kernel command line
    #[arg(
        long,
        default_value = "",
        value_name = "TEXT",
        allow_hyphen_values = true
    )]
    cmdline: String,
    /// Firmware to start in, in the place of a kernel: a ROM image, as of SeaBIOS
    #[arg(long, value_name = "PATH", conflicts_with_all = ["kernel", "initrd", "cmdline"])]
    firmware: Option<PathBuf>,
    /// The firmware, inherited and open; --firmware is then only its name
    #[arg(long, value_name = "N", requires = "firmware")]
    firmware_fd: Option<RawFd>,
    /// Number of vCPUs
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// What vCPUs show: host, or no more than a level that other processors have as well, x86-64-v1, x86-64-v2,
    /// x86-64-v3 or x86-64-v4
    #[arg(long, default_value_t, value_name = "LEVEL")]
    cpu: CpuLevel,
    /// RAM, with K, M, G or T
    #[arg(long, default_value = "512M", value_name = "SIZE", value_parser = size)]
    memory: u64,
    /// Puts RAM on huge pages of 2M or 1G
    #[arg(long, value_name = "SIZE", value_parser = huge_pages)]
    hugepages: Option<HugePages>,
    /// Makes all RAM present before the guest starts
    #[arg(long)]
    prefault: bool,
    /// A device, `TYPE,socket=PATH|fd=N`, and if wanted id=, queues=, queue-size=, mac=, tag=,
    /// config-size=, control-fd=
    #[arg(long = "vhost-user", value_name = "DEVICE")]
    vhost_user: Vec<String>,
    /// A PCI device of another process, `socket=PATH|fd=N`, and if wanted id=, control-fd=
    #[arg(long = "vfio-user", value_name = "DEVICE")]
    vfio_user: Vec<String>,
    /// Where the first serial port leads: stdio, null, file=PATH or fd=N
    #[arg(long, default_value = "stdio", value_name = "WHERE")]
    serial: String,
    /// Listens here for the machine's owner (D-Bus, peer to peer)
    #[arg(long, value_name = "PATH", conflicts_with = "control_fd")]
    control_socket: Option<PathBuf>,
    /// An inherited connection to the machine's owner, or a socket that listens for it
    #[arg(long, value_name = "N")]
    control_fd: Option<RawFd>,
    /// The KVM device
    #[arg(
        long,
        default_value = "/dev/kvm",
        value_name = "PATH",
        conflicts_with = "kvm_fd"
    )]
    kvm: PathBuf,
    /// An inherited KVM device
    #[arg(long, value_name = "N")]
    kvm_fd: Option<RawFd>,
    /// An inherited file, to read and to append to, that is told how it ended: exit status, a space,
    /// and why; before that, of a machine that came from another core, that it has "arrived", which
    /// it may not when something else is in the file already
    #[arg(long, value_name = "N")]
    end_fd: Option<RawFd>,
    /// Takes a machine over from another core, or from files, instead of booting one:
    /// control=N|snapshot=N[,ram=N]…[,state=ID:N]…[,memory=N], all inherited descriptors
    #[arg(long, value_name = "FROM", conflicts_with = "paused")]
    incoming: Option<String>,
    /// Mechanisms that its migrations leave out, for benchmarks: early-map, layout, parallel,
    /// channels
    #[arg(long, hide = true, value_name = "LIST", value_delimiter = ',')]
    without: Vec<Mechanism>,
    /// Does not start the guest before it is resumed
    #[arg(long)]
    pub paused: bool,
}

impl Options {
    /// The file that is told how it ended. To be asked for once.
    pub fn take_end_file(&mut self) -> Result<Option<File>> {
        let fd = self.end_fd.take();
        let file = fd.map(|fd| inherited("--end-fd", fd)).transpose()?;
        Ok(file.map(File::from))
    }

    /// The machine that they define, and who controls it. `end` is told that it has come, if it
    /// comes from another core.
    pub fn into_machine(self, end: Option<File>) -> Result<(MachineConfig, Option<Owner>)> {
        let owner = match (&self.control_socket, self.control_fd) {
            (Some(path), _) => Some(Owner::Listener(listen(path)?)),
            (None, Some(fd)) => Some(handed_over(inherited("--control-fd", fd)?)?),
            (None, None) => None,
        };
        let kvm = match self.kvm_fd {
            Some(fd) => KvmSource::Fd(inherited("--kvm-fd", fd)?),
            None => KvmSource::Path(self.kvm),
        };
        let mut vhost_user = Vec::new();
        let mut links = Vec::new();
        for (number, text) in self.vhost_user.iter().enumerate() {
            let device = device(number, text).with_context(|| format!("--vhost-user {text}"))?;
            links.extend(device.link.map(|link| (device.config.id.clone(), link)));
            vhost_user.push((device.config, device.endpoint));
        }
        let mut vfio_user = Vec::new();
        for (number, text) in self.vfio_user.iter().enumerate() {
            let device = pci_device(number, text).with_context(|| format!("--vfio-user {text}"))?;
            links.extend(device.link.map(|link| (device.config.id.clone(), link)));
            vfio_user.push((device.config, device.endpoint));
        }
        let initrd = self
            .initrd
            .map(|path| image(path, "--initrd-fd", self.initrd_fd));
        let boot = match (self.firmware, self.kernel) {
            (Some(path), _) => {
                BootConfig::Firmware(image(path, "--firmware-fd", self.firmware_fd)?)
            }
            (None, Some(path)) => BootConfig::Kernel {
                kernel: image(path, "--kernel-fd", self.kernel_fd)?,
                initrd: initrd.transpose()?,
                cmdline: self.cmdline,
            },
            (None, None) => bail!("give --kernel or --firmware"),
        };
        let config = MachineConfig {
            name: self.name,
            boot,
            cpus: self.cpus,
            cpu: self.cpu,
            memory: self.memory,
            hugepages: self.hugepages,
            prefault: self.prefault,
            serial: serial(&self.serial)?,
            vhost_user,
            vfio_user,
            links,
            kvm,
            end,
            incoming: match &self.incoming {
                Some(text) => Some(incoming(text).with_context(|| format!("--incoming {text}"))?),
                None => None,
            },
            without: self.without.into_iter().collect(),
        };
        Ok((config, owner))
    }
}

fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        unit => return Err(format!("{unit} is no unit: give K, M, G or T")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{digits:?} is no number"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "this is more than there can be".into())
}

fn huge_pages(text: &str) -> Result<HugePages, String> {
    match text {
        "2M" => Ok(HugePages::Size2M),
        "1G" => Ok(HugePages::Size1G),
        _ => Err("give 2M or 1G".into()),
    }
}

fn serial(text: &str) -> Result<SerialConfig> {
    Ok(match text.split_once('=') {
        None if text == "stdio" => SerialConfig::Stdio,
        None if text == "null" => SerialConfig::Null,
        Some(("file", path)) => SerialConfig::File(path.into()),
        Some(("fd", number)) => SerialConfig::Fd(inherited("--serial fd", parse("fd", number)?)?),
        _ => bail!("--serial {text}: give stdio, null, file=PATH or fd=N"),
    })
}

fn image(path: PathBuf, option: &str, fd: Option<RawFd>) -> Result<ImageSource> {
    let file = fd.map(|fd| inherited(option, fd)).transpose()?;
    Ok(ImageSource {
        path,
        file: file.map(File::from),
    })
}

/// The owner on an inherited socket, of either sort.
fn handed_over(socket: OwnedFd) -> Result<Owner> {
    let listens = getsockopt(&socket, sockopt::AcceptConn)
        .context("--control-fd: give a Unix stream socket")?;
    Ok(if listens {
        Owner::Listener(UnixListener::from(socket))
    } else {
        Owner::Stream(UnixStream::from(socket))
    })
}

/// A socket for the owner; one that a dead machine left behind is replaced.
fn listen(path: &Path) -> Result<UnixListener> {
    let said = || format!("--control-socket {}", path.display());
    if UnixStream::connect(path).is_ok() {
        bail!("{}: another program listens there", said());
    }
    if path.exists() {
        std::fs::remove_file(path).with_context(said)?;
    }
    UnixListener::bind(path).with_context(said)
}

/// Takes over descriptor `number`, which must be open.
fn inherited(option: &str, number: RawFd) -> Result<OwnedFd> {
    if number < 3 {
        bail!("{option} {number}: give a descriptor from 3 on");
    }
    // SAFETY: it is only asked whether it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|_| anyhow!("{option} {number}: there is no such open descriptor"))?;
    // SAFETY: it is open, and the command line gives it to this process.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn parse<T: FromStr<Err: Display>>(key: &str, value: &str) -> Result<T> {
    value
        .parse()
        .map_err(|error| anyhow!("{key}={value}: {error}"))
}

/// What an option says of one device.
struct Device<C> {
    config: C,
    endpoint: Endpoint,
    link: Option<OwnedFd>,
}

/// Where a machine comes from: words of the form key=descriptor.
fn incoming(text: &str) -> Result<Incoming> {
    let (mut control, mut memory, mut core) = (None, None, None);
    let (mut ram, mut states) = (Vec::new(), BTreeMap::new());
    for word in text.split(',') {
        let Some((key, value)) = word.split_once('=') else {
            bail!("{word} is not of the form key=value")
        };
        let descriptor = |value: &str| inherited(key, parse(key, value)?);
        match key {
            "control" => control = Some(descriptor(value)?),
            "snapshot" => core = Some(descriptor(value)?),
            "memory" => memory = Some(descriptor(value)?),
            "ram" => ram.push(descriptor(value)?),
            "state" => {
                let (id, number) = value.rsplit_once(':').context("state needs ID:N")?;
                if states.insert(id.to_owned(), descriptor(number)?).is_some() {
                    bail!("there are two sockets for the state of {id}");
                }
            }
            _ => bail!("{key} is no part of it: there are control, snapshot, ram, state, memory"),
        }
    }
    match (control, core, memory) {
        (Some(control), None, memory) => Ok(Incoming::Migration {
            sockets: Sockets {
                control,
                ram,
                states,
            },
            memory,
        }),
        (None, Some(core), None) => Ok(Incoming::Snapshot(Files { core, ram, states })),
        _ => bail!("it needs control=N, or snapshot=N without memory"),
    }
}

/// One device of the form TYPE,key=value,…
fn device(number: usize, text: &str) -> Result<Device<VhostUserConfig>> {
    let mut words = text.split(',');
    let kind: DeviceKind = words
        .next()
        .unwrap_or_default()
        .parse()
        .map_err(|e| anyhow!("{e}"))?;
    let (mut endpoint, mut link) = (None, None);
    let mut config = VhostUserConfig::new(kind, format!("device{number}"));
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            bail!("{word} is not of the form key=value")
        };
        match key {
            "socket" => endpoint = Some(Endpoint::Path(value.into())),
            "fd" => endpoint = Some(Endpoint::Connected(inherited("fd", parse(key, value)?)?)),
            "control-fd" => link = Some(inherited(key, parse(key, value)?)?),
            "id" => config.id = value.into(),
            "queues" => config.queues = Some(parse(key, value)?),
            "queue-size" => config.queue_size = parse(key, value)?,
            "config-size" => config.config_size = Some(parse(key, value)?),
            "tag" => config.tag = Some(value.into()),
            "mac" => config.mac = Some(mac(value)?),
            _ => bail!(
                "{key} is no setting of a device: there are socket, fd, control-fd, id, queues, queue-size, config-size, tag, mac"
            ),
        }
    }
    Ok(Device {
        config,
        endpoint: endpoint.context("it needs socket=PATH or fd=N")?,
        link,
    })
}

/// One PCI device of the form key=value,…
fn pci_device(number: usize, text: &str) -> Result<Device<VfioUserConfig>> {
    let (mut endpoint, mut link) = (None, None);
    let mut config = VfioUserConfig::new(format!("vfio{number}"));
    for word in text.split(',') {
        let Some((key, value)) = word.split_once('=') else {
            bail!("{word} is not of the form key=value")
        };
        match key {
            "socket" => endpoint = Some(Endpoint::Path(value.into())),
            "fd" => endpoint = Some(Endpoint::Connected(inherited("fd", parse(key, value)?)?)),
            "control-fd" => link = Some(inherited(key, parse(key, value)?)?),
            "id" => config.id = value.into(),
            _ => bail!("{key} is no setting of a PCI device: there are socket, fd, control-fd, id"),
        }
    }
    Ok(Device {
        config,
        endpoint: endpoint.context("it needs socket=PATH or fd=N")?,
        link,
    })
}

fn mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Result<Vec<_>, _> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect();
    let bytes = bytes.ok().and_then(|bytes| bytes.try_into().ok());
    bytes.with_context(|| format!("mac={text}: give six hexadecimal bytes, as 52:54:00:12:34:56"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("1Q").is_err());
        assert!(size("G").is_err());
        assert!(size("99999999999T").is_err());
    }

    #[test]
    fn devices_are_named_by_their_settings() {
        let blk = device(3, "blk,socket=/run/d,queues=4").unwrap();
        assert_eq!(blk.config.id, "device3");
        assert_eq!(blk.config.queues, Some(4));
        assert!(blk.link.is_none());
        let wrong = |text| format!("{:#}", device(0, text).err().unwrap());
        assert_eq!(wrong("blk"), "it needs socket=PATH or fd=N");
        assert!(wrong("toaster,socket=/x").contains("toaster"));
        assert!(wrong("blk,socket=/x,size=3").starts_with("size is no setting"));
        assert!(wrong("blk,socket=/x,queues=many").starts_with("queues=many: "));
        assert!(wrong("blk,socket=/x,control-fd=999").contains("no such open descriptor"));
        assert!(wrong("blk,fd=999").contains("no such open descriptor"));
        assert!(wrong("net,socket=/x,mac=1:2").contains("six hexadecimal bytes"));
    }

    #[test]
    fn pci_devices_need_nothing_but_a_socket() {
        let device = pci_device(2, "socket=/run/gpu").unwrap();
        assert_eq!(device.config.id, "vfio2");
        let wrong = |text| format!("{:#}", pci_device(0, text).err().unwrap());
        assert_eq!(wrong("id=gpu"), "it needs socket=PATH or fd=N");
        assert!(wrong("socket=/x,queues=3").starts_with("queues is no setting of a PCI device"));
        assert!(wrong("fd=999").contains("no such open descriptor"));
    }
}
