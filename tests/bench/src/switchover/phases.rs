//! Where the time of a blackout goes, by the reports of several moves.

use migration::report::{Report as Moved, Side};

use super::godwit::ms;
use crate::report::{Goal, Report};

/// A prediction is right if it is as close to the truth, in percent of the truth.
const CLOSE: u64 = 25;
/// How many are to be right, in percent.
const RIGHT: f64 = 90.0;

/// Adds a metric for each span of the blackout; of devices the slowest counts.
pub(crate) fn summarise(report: &mut Report, name: &str, moves: &[&Moved]) {
    for (side, of) in [
        ("source", (|m| &m.source) as fn(&Moved) -> &Side),
        ("destination", |m| &m.destination),
    ] {
        let mut names: Vec<(bool, &str)> = Vec::new();
        for span in moves.iter().flat_map(|m| blackout(m, of(m))) {
            let phase = (span.track == "core", span.name.as_str());
            if !names.contains(&phase) {
                names.push(phase);
            }
        }
        for (core, phase) in names {
            let slowest = |m: &&Moved| {
                let spans = blackout(m, of(m))
                    .filter(|s| s.name == phase && (s.track == "core") == core)
                    .map(|s| s.end_us - s.start_us);
                Some(ms(spans.max()?))
            };
            let values: Vec<_> = moves.iter().filter_map(slowest).collect();
            let who = if core { "core" } else { "devices" };
            report.summarise(format!("{name}: {side} {who} {phase}"), &values, "ms");
        }
    }
    let predicted: Vec<_> = moves.iter().map(|m| ms(m.predicted_us)).collect();
    report.summarise(format!("{name}: predicted"), &predicted, "ms");
    let ratio = |m: &&Moved| m.predicted_us as f64 / m.blackout_us.max(1) as f64;
    let ratios: Vec<_> = moves.iter().map(ratio).collect();
    report.summarise(format!("{name}: predicted to truth"), &ratios, "×");
}

/// How many of the predictions were close to the truth.
pub(crate) fn judge_predictions(report: &mut Report, name: &str, moves: &[&Moved]) {
    if moves.is_empty() {
        return;
    }
    let is_close = |m: &&&Moved| {
        m.predicted_us.abs_diff(m.blackout_us) * 100 <= m.blackout_us.saturating_mul(CLOSE)
    };
    let right = moves.iter().filter(is_close).count() * 100;
    let right = right as f64 / moves.len() as f64;
    let name = format!("{name}: predictions within {CLOSE} %");
    report.goals.push(Goal::at_least(name, right, RIGHT, "%"));
}

/// Microseconds from the stop of the last device until all states were loaded, if devices have any:
/// both sides run on this computer, so their clocks are the same.
pub(crate) fn state_copying_us(moved: &Moved) -> Option<u64> {
    let stopped = moved.source.origin_us + moved.source.span("core", "barrier D")?.end_us;
    let loads = moved
        .destination
        .spans
        .iter()
        .filter(|s| s.name == "load" && s.track != "core");
    let loaded = moved.destination.origin_us + loads.map(|span| span.end_us).max()?;
    Some(loaded.saturating_sub(stopped))
}

/// The spans of one side that began in the blackout.
fn blackout<'a>(
    moved: &'a Moved,
    side: &'a Side,
) -> impl Iterator<Item = &'a migration::report::Span> {
    let stop = moved.source.span("core", "barrier B");
    let begin = stop.map_or(0, |span| moved.source.origin_us + span.start_us);
    let begin = begin.saturating_sub(side.origin_us);
    side.spans.iter().filter(move |span| span.start_us >= begin)
}
