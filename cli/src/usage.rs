//! What a process of this computer uses, where the broker has no counters of that.

use std::collections::BTreeMap;
use std::fs;

use nix::unistd::{SysconfVar, sysconf};

/// Counter of CPU time, in microseconds.
pub const CPU: &str = "cpu_usec";
/// Memory that is present, in bytes: its own and what it maps of the guest's.
pub const RESIDENT: &str = "resident_bytes";
/// How all our processes' names begin. Another one of that number is not meant: the broker
/// may have numbers of its own, in a container for one.
const OURS: &str = "(godwit-";

/// Adds to `counters` what the process uses, if it is one of ours.
pub fn complete(counters: &mut BTreeMap<String, u64>, process: Option<u32>) {
    if counters.contains_key(CPU) {
        return;
    }
    let Some(process) = process else { return };
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let (Ok(Some(ticks)), Ok(Some(page))) =
        (sysconf(SysconfVar::CLK_TCK), sysconf(SysconfVar::PAGE_SIZE))
    else {
        return;
    };
    let unit = |value| u64::try_from(value).ok().filter(|&value| value > 0);
    if let (Some(ticks), Some(page)) = (unit(ticks), unit(page))
        && let Some((cpu, resident)) = parse(&stat, ticks, page)
    {
        counters.insert(CPU.into(), cpu);
        counters.insert(RESIDENT.into(), resident);
    }
}

/// CPU time in microseconds and memory in bytes, of a line of /proc/PID/stat (proc(5)).
fn parse(stat: &str, ticks: u64, page: u64) -> Option<(u64, u64)> {
    let (before, after) = stat.rsplit_once(") ")?;
    if !before.contains(OURS) {
        return None;
    }
    // From the third field on.
    let mut fields = after.split(' ');
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let resident: u64 = fields.nth(8)?.parse().ok()?;
    let cpu = user.checked_add(system)?.checked_mul(1_000_000)? / ticks;
    Some((cpu, resident.checked_mul(page)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "7 (godwit-blk) S 1 7 7 0 -1 4194560 500 0 0 0 150 50 0 0 20 0 5 0 \
                        1000 483000000 1906 18446744073709551615 1 1 0 0 0";

    #[test]
    fn a_line_of_ours_is_read() {
        assert_eq!(parse(STAT, 100, 4096), Some((2_000_000, 1906 * 4096)));
        assert_eq!(parse(&STAT.replace("godwit-blk", "bash"), 100, 4096), None);
        assert_eq!(parse("", 100, 4096), None);
        assert_eq!(parse("7 (godwit-blk) S 1", 100, 4096), None);
    }

    #[test]
    fn the_kernels_form_is_the_one_that_is_read() {
        let own = fs::read_to_string("/proc/self/stat").unwrap();
        let (_, rest) = own.split_once(") ").unwrap();
        let (_, resident) = parse(&format!("1 (godwit-x) {rest}"), 100, 4096).unwrap();
        assert!((1 << 20..1 << 34).contains(&resident), "{resident}");
    }

    #[test]
    fn what_the_broker_says_counts() {
        let mut counters = BTreeMap::from([(CPU.to_owned(), 7)]);
        complete(&mut counters, Some(std::process::id()));
        assert_eq!(counters.len(), 1);
    }
}
