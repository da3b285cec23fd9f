//! The guest's console lines: `@name key=value …`, one line each.

use super::value::Value;
use super::{Ipv4, Text};
use core::fmt;

/// A line that starts like a report and is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadReport {
    /// The part of the line that does not fit.
    pub part: Text,
}

impl fmt::Display for BadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest printed a report with '{}' in it", self.part)
    }
}

impl core::error::Error for BadReport {}

macro_rules! reports {
    ($($(#[$doc:meta])* $variant:ident = $name:literal { $($(#[$fdoc:meta])* $field:ident: $type:ty),* $(,)? })*) => {
        /// One line of the guest's console.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Report { $($(#[$doc])* $variant { $($(#[$fdoc])* $field: $type),* },)* }

        impl fmt::Display for Report {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$variant { $($field),* } => {
                        f.write_str(concat!("@", $name))?;
                        $(f.write_str(concat!(" ", stringify!($field), "="))?; $field.write(f)?;)*
                    })*
                }
                Ok(())
            }
        }

        impl Report {
            /// The name of every kind of report, without the `@`.
            pub const NAMES: &[&str] = &[$($name),*];

            /// Reads a console line; `None` for a line that is no report.
            ///
            /// # Errors
            /// A line that starts with `@` and is not wholly understood.
            pub fn parse(line: &str) -> Result<Option<Self>, BadReport> {
                let Some(line) = line.trim().strip_prefix('@') else {
                    return Ok(None);
                };
                let mut words = line.split_ascii_whitespace();
                let name = words.next().unwrap_or_default();
                let report = match name {
                    $($name => Self::$variant { $($field: field(&mut words, stringify!($field))?),* },)*
                    _ => return Err(BadReport { part: Text::new(name) }),
                };
                match words.next() {
                    Some(extra) => Err(BadReport { part: Text::new(extra) }),
                    None => Ok(Some(report)),
                }
            }
        }
    };
}

fn field<'a, V: Value>(
    words: &mut impl Iterator<Item = &'a str>,
    key: &'static str,
) -> Result<V, BadReport> {
    let word = words.next().ok_or(BadReport {
        part: Text::new(key),
    })?;
    word.strip_prefix(key)
        .and_then(|rest| rest.strip_prefix('='))
        .and_then(V::parse)
        .ok_or(BadReport {
            part: Text::new(word),
        })
}

reports! {
    /// The guest's first instructions ran.
    First = "first" {}
    /// The machine is understood and all CPUs run.
    Up = "up" {
        /// CPUs that run.
        cpus: u32,
        /// RAM in MiB.
        mem_mib: u64,
        /// Frequency of the time-stamp counter.
        tsc_khz: u64,
        /// PCI functions found.
        pci: u32,
        /// Whether the local APICs are in x2APIC mode.
        x2apic: bool,
        /// Microseconds since the guest's first Rust code.
        t_us: u64,
    }
    /// A block device is set up.
    Disk = "disk" {
        /// Number among block devices, in PCI order.
        dev: u32,
        /// Queues in use.
        queues: u16,
        /// Queues that the device has.
        offered: u16,
        /// Capacity in sectors of 512 bytes.
        sectors: u64,
        /// Whether it refuses writes.
        read_only: bool,
        /// Its serial number (VIRTIO_BLK_T_GET_ID).
        id: Text,
    }
    /// A network device is set up.
    Nic = "nic" {
        /// Number among network devices, in PCI order.
        dev: u32,
        /// Queue pairs in use.
        pairs: u16,
        /// Queue pairs that the device has.
        offered: u16,
        /// Hardware address, as a number.
        mac: u64,
        /// Its address.
        ip: Ipv4,
    }
    /// All devices that were asked for are set up.
    Active = "active" {
        /// Devices.
        devices: u32,
        /// Their queues, control queues included.
        queues: u32,
        /// Microseconds since the guest's first Rust code.
        t_us: u64,
    }
    /// The first disk read is complete.
    FirstRead = "firstread" {
        /// Microseconds since the guest's first Rust code.
        t_us: u64,
    }
    /// A heartbeat of CPU 0.
    Beat = "beat" {
        /// Its number, from 1.
        n: u64,
        /// Largest gap of the guest's clock since the last heartbeat, in microseconds.
        gap_us: u64,
        /// Largest gap so far.
        max_us: u64,
        /// How often the clock went back.
        back: u64,
        /// Microseconds since the guest's first Rust code.
        t_us: u64,
    }
    /// What one block device did.
    Blk = "blk" {
        /// Number among block devices.
        dev: u32,
        /// Reads completed and compared.
        reads: u64,
        /// Writes completed.
        writes: u64,
        /// Flushes completed.
        flushes: u64,
        /// Bytes read and written.
        bytes: u64,
        /// Requests that ended with a wrong status or wrong data.
        errors: u64,
        /// Completions of a request that was not in flight.
        dup: u64,
        /// Requests that did not end in time.
        lost: u64,
        /// Whether this is the last word.
        end: bool,
    }
    /// A block did not hold what was written.
    BadBlock = "badblock" {
        /// Number among block devices.
        dev: u32,
        /// First sector of the request.
        sector: u64,
        /// Byte offset of the first wrong word in it.
        offset: u64,
        /// What should be there.
        want: u64,
        /// What was there.
        got: u64,
    }
    /// What one network device did.
    Net = "net" {
        /// Number among network devices.
        dev: u32,
        /// Packets of the test that were sent.
        sent: u64,
        /// Answers that were right.
        received: u64,
        /// Packets without an answer in time.
        lost: u64,
        /// Answers that came twice.
        dup: u64,
        /// Answers with wrong content.
        errors: u64,
        /// All frames received.
        frames: u64,
        /// Pings of the peer that were answered.
        pinged: u64,
        /// Whether this is the last word.
        end: bool,
    }
    /// What one counting device did.
    Count = "count" {
        /// Number among counting devices.
        dev: u32,
        /// Answers.
        answers: u64,
        /// How often a queue began to count from 0 again: its process is a new one.
        restarts: u64,
        /// Answers that were not the next one of their own request.
        errors: u64,
        /// Requests that did not end in time.
        lost: u64,
        /// Whether this is the last word.
        end: bool,
    }
    /// What one copying device did.
    Copy = "copy" {
        /// Number among copying devices.
        dev: u32,
        /// Copies that were right.
        copies: u64,
        /// Bytes of them.
        bytes: u64,
        /// Their interrupts that came.
        irqs: u64,
        /// Copies, answers and words of its memory that were wrong, and interrupts that did not come.
        errors: u64,
        /// Whether this is the last word.
        end: bool,
    }
    /// What was done with a balloon, in pages.
    Balloon = "balloon" {
        /// Given.
        inflated: u64,
        /// Taken back.
        deflated: u64,
        /// Reported as free.
        reported: u64,
        /// Named as free.
        hinted: u64,
        /// Used again before the host can have seen that they were named.
        reused: u64,
        /// Rounds of hints.
        rounds: u64,
        /// Times that the host said that all named pages may be used again.
        ended: u64,
        /// Pages that did not hold what they should.
        bad: u64,
        /// Whether this is the last word.
        end: bool,
    }
    /// Memory dirtied so far.
    Dirty = "dirty" {
        /// Pages written.
        pages: u64,
        /// Pages in the span.
        span: u64,
        /// Pages that did not hold what was written before.
        bad: u64,
    }
    /// The last check of all pages that were written.
    Verify = "verify" {
        /// Pages that were checked.
        pages: u64,
        /// Pages that did not hold what was written, now or at a revisit.
        bad: u64,
    }
    /// A page did not hold what was written.
    BadPage = "badpage" {
        /// Guest-physical address of the first wrong word.
        addr: u64,
        /// What should be there.
        want: u64,
        /// What was there.
        got: u64,
    }
    /// What the processor shows, as the hypervisor has it: registers of CPUID.
    Cpuid = "cpuid" {
        /// ECX of leaf 1.
        one_ecx: u32,
        /// EDX of leaf 1.
        one_edx: u32,
        /// EBX of leaf 7.
        seven_ebx: u32,
        /// ECX of leaf 0x8000_0001.
        extended_ecx: u32,
    }
    /// All work is done.
    Done = "done" {
        /// Whether nothing was wrong.
        ok: bool,
        /// Interrupts taken.
        irqs: u64,
        /// Largest gap of the guest's clock, in microseconds.
        max_us: u64,
        /// Microseconds since the guest's first Rust code.
        t_us: u64,
    }
    /// The guest gives up; it powers off or halts.
    Fail = "fail" {
        /// What happened.
        reason: Text,
        /// A number that belongs to it, in decimal (an address, a status, a line).
        a: u64,
        /// Another.
        b: u64,
        /// A word that belongs to it.
        what: Text,
    }
}
