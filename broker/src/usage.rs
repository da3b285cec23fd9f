//! What a process uses, as the kernel counts it (proc_pid_stat(5), proc_pid_status(5)).

use std::fs;
use std::io;

use nix::unistd::{SysconfVar, sysconf};

use crate::process::ProcessId;

/// What a process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    /// CPU time, in microseconds.
    pub(crate) cpu_usec: u64,
    /// Memory that is present, in bytes, with what it maps of the guest's.
    pub(crate) resident_bytes: u64,
    /// Of these, what is its own: anonymous and private, no guest memory, no program text.
    pub(crate) own_bytes: u64,
}

impl Usage {
    /// Of a process that has not ended.
    ///
    /// # Errors
    /// It has ended, and its number may be another's.
    pub(crate) fn of(process: &ProcessId) -> io::Result<Self> {
        let pid = process.pid;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let ticks = sysconf(SysconfVar::CLK_TCK)?.and_then(|ticks| u64::try_from(ticks).ok());
        let ticks = ticks.filter(|&ticks| ticks > 0).unwrap_or(100);
        let (cpu, start) = times(&stat).ok_or(io::ErrorKind::InvalidData)?;
        if start != process.start {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Self {
            cpu_usec: cpu.saturating_mul(1_000_000) / ticks,
            resident_bytes: bytes(&status, "VmRSS:"),
            own_bytes: bytes(&status, "RssAnon:"),
        })
    }

    /// By the names that statistics have on the bus.
    pub(crate) fn counters(self) -> [(String, u64); 3] {
        [
            ("cpu_usec", self.cpu_usec),
            ("resident_bytes", self.resident_bytes),
            ("own_bytes", self.own_bytes),
        ]
        .map(|(name, value)| (name.to_owned(), value))
    }
}

/// CPU time, and when the process was started, in clock ticks.
fn times(stat: &str) -> Option<(u64, u64)> {
    // The second field may hold anything, in parentheses.
    let (_, after) = stat.rsplit_once(") ")?;
    let mut fields = after.split_whitespace();
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let start = fields.nth(6)?.parse().ok()?;
    Some((user.checked_add(system)?, start))
}

/// A line of the status, which is in KiB. A process that is ending has no memory, and no line.
fn bytes(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    let kibibytes: u64 = number.and_then(|n| n.parse().ok()).unwrap_or(0);
    kibibytes.saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Process;

    #[test]
    fn the_fields_are_found() {
        let stat = "7 (a (b) c) S 1 7 7 0 -1 4194560 500 0 0 0 150 50 0 0 20 0 5 0 \
                    1000 483000000 1906 18446744073709551615 1 1 0 0 0";
        assert_eq!(times(stat), Some((200, 1000)));
        assert_eq!(times("7 (x) S 1"), None);
        let status = "Name:\tx\nVmRSS:\t  1906 kB\nRssAnon:\t 12 kB\n";
        assert_eq!(bytes(status, "VmRSS:"), 1906 << 10);
        assert_eq!(bytes(status, "RssShmem:"), 0);
    }

    #[tokio::test]
    async fn a_process_is_not_taken_for_another() {
        let own = Process::new(std::process::id(), String::new()).unwrap();
        let usage = Usage::of(own.id()).unwrap();
        assert!(usage.own_bytes > 0 && usage.own_bytes < usage.resident_bytes);
        let mut other = own.id().clone();
        other.start += 1;
        assert!(Usage::of(&other).is_err());
    }
}
