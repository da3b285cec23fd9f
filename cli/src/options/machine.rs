//! Options of what makes, starts and ends machines.

use std::path::PathBuf;

use clap::Args;

use super::{Names, Wait};
use crate::value::{Disk, Escape, HugePages, Net, Size, Vfio, VhostUser};

/// Makes a machine, starts it and attaches to its console.
#[derive(Debug, Args)]
pub struct Run {
    /// A definition file (TOML), in the place of the options that define a machine
    #[arg(value_name = "FILE", conflicts_with = "definition")]
    pub file: Option<PathBuf>,
    /// Name of the machine; by default the file's, or the first of vm1, vm2, … that is free
    #[arg(long)]
    pub name: Option<String>,
    /// Returns when the machine runs, and leaves the console alone
    #[arg(long, short)]
    pub detach: bool,
    /// Keeps the machine when it has ended, so that it can be started again
    #[arg(long)]
    pub keep: bool,
    /// Runs the bundled guest, which needs no kernel of yours, on a scratch disk in $TMPDIR
    #[arg(long, conflicts_with_all = ["file", "kernel", "initrd", "firmware", "disk", "keep"])]
    pub demo: bool,
    /// Leaves the machine paused
    #[arg(long)]
    pub paused: bool,
    /// The key that leaves the console
    #[arg(long, value_name = "KEY", default_value = "^]")]
    pub escape: Escape,
    #[command(flatten)]
    pub define: Define,
}

/// What a machine is made of.
#[derive(Debug, Default, Args)]
#[group(id = "definition", multiple = true)]
pub struct Define {
    /// Kernel: a bzImage (vmlinuz), or an ELF file with a PVH note (vmlinux)
    #[arg(long, value_name = "PATH", required_unless_present_any = ["file", "demo", "firmware"])]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Firmware to start in, which boots from the first disk, in the place of a kernel: a ROM image, as
    /// of SeaBIOS
    #[arg(long, value_name = "PATH", conflicts_with_all = ["kernel", "initrd", "cmdline"])]
    pub firmware: Option<PathBuf>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// What vCPUs show of the host's processor: host, or no more than x86-64-v1, -v2, -v3 or -v4, so
    /// that the machine can move to other processors [default: host]
    #[arg(long, value_name = "LEVEL")]
    pub cpu: Option<String>,
    /// RAM, with K, M, G or T [default: 512M]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<Size>,
    /// Puts RAM on huge pages of 2M or 1G
    #[arg(long, value_name = "SIZE")]
    pub hugepages: Option<HugePages>,
    /// Makes all RAM present before the guest starts
    #[arg(long)]
    pub prefault: bool,
    /// Disks, with image and settings.
    #[arg(
        long,
        value_name = "DISK",
        help = "A disk: IMAGE[,read-only][,queues=N][,serial=TEXT][,id=NAME]"
    )]
    pub disk: Vec<Disk>,
    /// Network cards, with tap and settings.
    #[arg(
        long,
        value_name = "NET",
        help = "A network card: tap:NAME[,mac=MAC][,queue-pairs=N][,mtu=N][,id=NAME]"
    )]
    pub net: Vec<Net>,
    /// Gives the machine a memory balloon, by which its guest gives memory back
    #[arg(long, value_name = "SIZE", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub balloon: Option<Size>,
    /// Devices that other processes serve.
    #[arg(
        long,
        value_name = "DEVICE",
        help = "A device that another process serves: TYPE,socket=PATH[,queues=N][,tag=TAG][,id=NAME]"
    )]
    pub vhost_user: Vec<VhostUser>,
    /// PCI devices that are passed through.
    #[arg(
        long,
        value_name = "DEVICE",
        help = "A PCI device of the host, bound to vfio-pci, for the guest: host=ADDRESS[,id=NAME]; \
                or one of another vfio-user server, socket=PATH, or one for tests, synthetic"
    )]
    pub vfio: Vec<Vfio>,
}

/// Lists machines.
#[derive(Debug, Args)]
pub struct List {
    /// Only machines in this state: off, starting, running, paused, stopping or failed
    #[arg(long, value_name = "STATE")]
    pub state: Vec<String>,
}

/// Shows machines with all they have.
#[derive(Debug, Args)]
pub struct Show {
    /// Machines
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Starts machines that are off.
#[derive(Debug, Args)]
pub struct Start {
    #[command(flatten)]
    pub names: Names,
    /// Leaves them paused
    #[arg(long)]
    pub paused: bool,
    /// Starts also those that have moved to another host: they must have ended there
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub wait: Wait,
}

/// Switches machines off: presses the power button, or ends them at once.
#[derive(Debug, Args)]
pub struct Stop {
    #[command(flatten)]
    pub names: Names,
    /// Ends them at once, without asking the guests
    #[arg(long, short)]
    pub force: bool,
    #[command(flatten)]
    pub wait: Wait,
}

/// Shows a machine that works while its disk process is killed.
#[derive(Debug, Args)]
pub struct Demo {
    /// Another guest's kernel; by default the bundled guest, where it is installed
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Its command line; by default what makes the bundled guest use its disk
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// A network card beside the disk, as of `godwit run`
    #[arg(long, value_name = "NET")]
    pub net: Vec<Net>,
}
