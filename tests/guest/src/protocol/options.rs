//! The kernel command line: `key=value` words.

use super::value::{Activate, BalloonMode, BlkMode, Idle, Ipv4, NetMode, Value};
use super::{Report, Text};
use core::fmt;

/// A word of the command line that the guest does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadOption {
    /// The word as it was given.
    pub word: Text,
}

impl fmt::Display for BadOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest has no option '{}'", self.word)
    }
}

impl core::error::Error for BadOption {}

impl From<BadOption> for Report {
    fn from(bad: BadOption) -> Self {
        Report::Fail {
            reason: Text::new("unknown-option"),
            a: 0,
            b: 0,
            what: bad.word,
        }
    }
}

macro_rules! options {
    ($($(#[$doc:meta])* $field:ident: $type:ty = $default:expr,)*) => {
        /// What the guest is to do; its `Display` is the command line.
        ///
        /// Works of several kinds run at the same time, spread over the CPUs.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Workload { $($(#[$doc])* pub $field: $type,)* }

        impl Default for Workload {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl Workload {
            /// Every keyword, in the order of the command line.
            pub const KEYWORDS: &[&str] = &[$(stringify!($field)),*];

            fn set(&mut self, key: &str, value: &str) -> Option<()> {
                match key {
                    $(stringify!($field) => self.$field = <$type>::parse(value)?,)*
                    _ => return None,
                }
                Some(())
            }
        }

        impl fmt::Display for Workload {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let default = Self::default();
                let mut gap = "";
                $(if self.$field != default.$field {
                    write!(f, "{gap}{}=", stringify!($field))?;
                    self.$field.write(f)?;
                    gap = " ";
                })*
                let _ = gap;
                Ok(())
            }
        }
    };
}

options! {
    /// CPUs to use, the boot CPU included; 0: all that the ACPI tables name.
    cpus: u32 = 0,
    /// The time-stamp counter's frequency in kHz; 0: ask the hypervisor.
    tsc_khz: u64 = 0,
    /// What an idle CPU does.
    idle: Idle = Idle::Poll,
    /// Milliseconds that an idle CPU sleeps at most; what it finds only then has come without its
    /// interrupt, which is a failure. 0: a tenth of a second, and what was missed is made up for.
    nap: u32 = 0,
    /// Milliseconds between heartbeat lines; 0: none.
    heartbeat: u32 = 0,
    /// Stop by itself after so many seconds; 0: only when the work is done or on `stop`.
    seconds: u32 = 0,
    /// Power off when all work is done; otherwise wait for a console command.
    poweroff: bool = false,
    /// The sleep type that means S5 (`SLP_TYPa` of the `\_S5` package).
    slp_typ: u16 = 0,
    /// Where PCI configuration space lies, in MiB, if ACPI has no MCFG (QEMU's microvm: 3584); 0:
    /// ports 0xcf8 and 0xcfc.
    ecam_mib: u32 = 0,
    /// Milliseconds that a device may take for one request before the guest calls it lost.
    timeout: u32 = 30_000,

    /// Which devices to set up.
    activate: Activate = Activate::Needed,
    /// Queues of a block device, or queue pairs of a network device, at most; 0: all offered.
    queues: u16 = 0,
    /// Entries in each ring, at most; a power of two.
    ring: u16 = 32,
    /// Give every queue an MSI-X vector; without, only `idle=poll` works.
    msix: bool = true,
    /// Use VIRTIO_F_EVENT_IDX where it is offered.
    event_idx: bool = true,

    /// What to do with disks.
    blk: BlkMode = BlkMode::Off,
    /// MiB of each disk to use, from its start.
    blk_mib: u32 = 4,
    /// KiB of one request; a power of two, at most 64.
    blk_kib: u32 = 4,
    /// Requests in flight on each queue of a disk or counting device; at most a third of the ring.
    depth: u16 = 4,
    /// Random requests a second of each queue in `blk=loop`; 0: as fast as it goes.
    blk_rate: u32 = 0,

    /// What to do with network devices.
    net: NetMode = NetMode::Off,
    /// Address of the first network device; the third byte counts up from device to device.
    ip: Ipv4 = Ipv4([10, 77, 0, 2]),
    /// Address of the first device's peer; counts up in the same way.
    peer: Ipv4 = Ipv4([10, 77, 0, 1]),
    /// UDP port of the peer's echo service.
    port: u16 = 7,
    /// Pings or packets to send.
    packets: u32 = 1000,
    /// Bytes of UDP payload, 16 to 1400.
    packet_size: u16 = 512,

    /// Requests a second of each queue of counting devices; 0: none.
    count: u32 = 0,
    /// Copies that each copying device does; 0: none.
    copies: u32 = 0,
    /// What to do with a balloon.
    balloon: BalloonMode = BalloonMode::Off,
    /// MiB of memory for the balloon's work.
    balloon_mib: u32 = 16,
    /// MiB that `balloon=follow` has written besides, keeps, and checks in the end.
    kept_mib: u32 = 0,

    /// MiB a second to dirty, of all CPUs together; 0: as fast as it goes.
    dirty: u32 = 0,
    /// MiB of memory to dirty; 0: none.
    span: u32 = 0,
}

impl Workload {
    /// Reads a command line.
    ///
    /// Words that QEMU adds by itself (`virtio_mmio.…`) are passed over.
    ///
    /// # Errors
    /// The first word that is no option or whose value does not fit.
    pub fn parse(line: &str) -> Result<Self, BadOption> {
        let mut workload = Self::default();
        for word in line.split_ascii_whitespace() {
            if word.starts_with("virtio_mmio.") {
                continue;
            }
            let known = word
                .split_once('=')
                .and_then(|(key, value)| workload.set(key, value));
            if known.is_none() {
                return Err(BadOption {
                    word: Text::new(word),
                });
            }
        }
        Ok(workload)
    }
}
