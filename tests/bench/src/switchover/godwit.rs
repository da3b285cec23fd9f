//! One move of one of our machines.

use anyhow::{Context as _, Result, ensure};
use migration::report::Report;
use test_migration::{Side, Spec};

use super::{Move, gap};
use crate::memory;

/// Boots the machine, moves it once and ends it.
pub(crate) fn moved(spec: &Spec) -> Result<Move> {
    let mut side = Side::boot(spec)?;
    gap::warm_up(&mut side.console, u64::from(spec.workload.span) << 8)?;
    memory::warm_up(usize::try_from(spec.memory_mib)? << 20)?;
    let mut destination = side.begin_move(spec, None)?;
    let report = report(&mut side)?;
    let gap = gap::after(&mut destination.console)?;
    Ok(Move {
        gap_ms: gap.as_secs_f64() * 1e3,
        said_ms: ms(report.blackout_us),
        total_ms: ms(total(&report)),
        bytes: report.memory_bytes,
        report: Some(report),
    })
}

/// Waits until it has moved; the report of that.
pub(crate) fn report(side: &mut Side) -> Result<Report> {
    let outcome = side.outcome()?;
    ensure!(outcome["result"] == "moved", "it did not move: {outcome:#}");
    serde_json::from_value(outcome["report"].clone()).context("this is no report")
}

/// Without the start of the destination's processes, which the source waits for first.
pub(crate) fn total(report: &Report) -> u64 {
    let end = report.source.spans.iter().map(|span| span.end_us).max();
    let begin = report.source.span("core", "negotiate").map(|s| s.end_us);
    end.unwrap_or(0) - begin.unwrap_or(0)
}

/// Microseconds in milliseconds.
pub(crate) fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}
