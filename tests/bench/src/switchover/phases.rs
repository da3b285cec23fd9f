//! Where the time of a blackout goes, by the reports of several moves.

use migration::report::{Report as Moved, Side};

use super::godwit::ms;
use crate::report::Report;

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
