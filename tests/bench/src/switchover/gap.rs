//! What a guest says of a move.

use std::time::Duration;

use anyhow::Result;
use test_framework::console::Console;
use test_framework::machine::DEADLINE;
use test_guest::Report;

/// Heartbeats by which a guest has come to rest after its start.
const WARM_BEATS: u64 = 30;
/// GiB of memory that the computer has to find for the guest, a page and an exit at a time.
const FILL_DEADLINE: Duration = Duration::from_secs(300);
/// A gap is in the heartbeat after it; the stop may fall into one that is just being printed.
const BEATS_AFTER: u32 = 2;

/// Waits until the guest has set up its devices, has written its whole span (of `pages`), and beats.
pub(crate) fn warm_up(console: &mut Console, pages: u64) -> Result<()> {
    if pages > 0 {
        console.fill(FILL_DEADLINE)?;
    }
    beats(console, WARM_BEATS)
}

/// Waits for so many heartbeats more.
fn beats(console: &mut Console, count: u64) -> Result<()> {
    let mut first = None;
    console.report("heartbeats", DEADLINE, |report| match *report {
        Report::Beat { n, .. } => (n >= count + *first.get_or_insert(n)).then_some(()),
        _ => None,
    })?;
    Ok(())
}

/// The largest gap that the guest saw when it came to this console.
pub(crate) fn after(console: &mut Console) -> Result<Duration> {
    let mut largest = 0;
    for _ in 0..BEATS_AFTER {
        let (_, gap) = console.report("a heartbeat", DEADLINE, |report| match *report {
            Report::Beat { gap_us, .. } => Some(gap_us),
            _ => None,
        })?;
        largest = largest.max(gap);
    }
    Ok(Duration::from_micros(largest))
}
