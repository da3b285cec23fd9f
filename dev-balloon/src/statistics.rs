//! What the guest says of its memory (virtio 1.3, 5.5.6.3), pairs of a tag and a value; and when it
//! is asked.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::time::{TimeSpec, TimeValLike as _};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Bytes of an entry: le16 tag, le64 value.
pub(crate) const ENTRY: usize = 10;
/// Entries that are believed; there are fewer tags.
pub(crate) const MOST: usize = 64;
/// Longest time between two questions, in seconds.
pub(crate) const MAX_INTERVAL: u32 = 3600;

/// Tag, name. What is a size is in bytes.
const NAMES: [&str; 16] = [
    "swapped_in_bytes",
    "swapped_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "disk_cache_bytes",
    "huge_page_allocations",
    "huge_page_failures",
    "oom_kills",
    "stalled_allocations",
    "scanned_asynchronously",
    "scanned_directly",
    "reclaimed_asynchronously",
    "reclaimed_directly",
];

/// The entries of a report, without those that nobody knows.
pub(crate) fn parse(report: &[u8]) -> Vec<(u16, u64)> {
    let entry = |bytes: &[u8]| {
        let (tag, value) = bytes.split_first_chunk::<2>()?;
        let value = u64::from_le_bytes(value.try_into().ok()?);
        let tag = u16::from_le_bytes(*tag);
        name(tag).map(|_| (tag, value))
    };
    let entries = report.chunks_exact(ENTRY).take(MOST);
    entries.filter_map(entry).collect()
}

/// What a tag is called.
pub(crate) fn name(tag: u16) -> Option<&'static str> {
    NAMES.get(usize::from(tag)).copied()
}

/// Runs out each time that the guest is to be asked.
#[derive(Debug)]
pub(crate) struct Timer(TimerFd);

impl Timer {
    /// One that never runs out.
    pub(crate) fn new() -> nix::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).map(Self)
    }

    /// From now on it runs out every so many seconds; 0: never.
    pub(crate) fn set(&self, seconds: u32) -> nix::Result<()> {
        let every = Expiration::Interval(TimeSpec::seconds(seconds.into()));
        self.0.set(every, TimerSetTimeFlags::empty())
    }

    /// Whether it has run out since this was asked last.
    pub(crate) fn has_run_out(&self) -> bool {
        let mut count = [0; 8];
        nix::unistd::read(&self.0, &mut count) == Ok(count.len())
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_or_cut_is_passed_over() {
        let mut report = Vec::new();
        for (tag, value) in [(4u16, 1u64 << 30), (999, 7), (5, 2 << 30)] {
            report.extend(tag.to_le_bytes());
            report.extend(value.to_le_bytes());
        }
        report.extend([4, 0, 1]);
        assert_eq!(parse(&report), [(4, 1 << 30), (5, 2 << 30)]);
        assert_eq!(name(5), Some("total_bytes"));
        assert_eq!(parse(&[]), []);
    }
}
