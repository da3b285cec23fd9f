//! The blackout for a terminal: a line for each span, its bar where it lies.

use std::fmt::{self, Write as _};

use super::{Host, Ms, Placed, Timeline};
use crate::report::{Prediction, Report};

/// More devices than this are drawn as one: their slowest.
const MOST_DEVICES: usize = 4;

struct Row {
    host: Host,
    who: String,
    what: String,
    start: i64,
    end: i64,
}

/// What a prediction consists of, on a line of its own, or nothing.
struct Parts<'a>(&'a Prediction);

impl fmt::Display for Parts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.0;
        let parts = [
            ("memory", parts.memory_us),
            ("states", parts.states_us),
            ("core", parts.core_us),
            ("wake-ups", parts.wakes_us),
            ("link", parts.link_us),
            ("devices", parts.devices_us),
            ("transitions", parts.transitions_us),
        ];
        let mut before = "predicted: ";
        for (name, us) in parts.into_iter().filter(|&(_, us)| us > 0) {
            write!(f, "{before}{name} {}", Ms(super::signed(us)))?;
            before = ", ";
        }
        if before == ", " { writeln!(f) } else { Ok(()) }
    }
}

/// What the migration took, with bars `width` columns wide (10 at least).
pub fn text(report: &Report, width: usize) -> String {
    let timeline = Timeline::of(report);
    let mut out = String::new();
    let bytes = report.memory_bytes as f64 / f64::from(1 << 20);
    let rounds = report.rounds.len();
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "blackout {}, predicted {}; {bytes:.1} MiB of memory sent, {rounds} rounds before",
        Ms(timeline.blackout),
        Ms(super::signed(report.predicted_us)),
    );
    let _ = write!(out, "{}", Parts(&report.prediction));
    let width = width.max(10);
    let rows = rows(&timeline);
    let ends = rows.iter().map(|row| row.end);
    let end = ends.max().unwrap_or(0).clamp(1, timeline.blackout.max(1));
    let widest = |column: fn(&Row) -> &str| {
        let widths = rows.iter().map(|row| column(row).chars().count());
        widths.max().unwrap_or(0)
    };
    let (who, what) = (widest(|row| &row.who), widest(|row| &row.what));
    for row in &rows {
        let bar = bar(row, end, width);
        let took = Ms(row.end - row.start);
        let _ = writeln!(
            out,
            "{:<11} {:<who$} {:<what$} ▏{bar}▕ {took:>9}",
            row.host, row.who, row.what
        );
    }
    out
}

fn rows(timeline: &Timeline) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for host in [Host::Source, Host::Destination] {
        let tracks: Vec<_> = timeline
            .in_blackout()
            .filter(|(t, _)| t.host == host)
            .collect();
        let devices = tracks.iter().filter(|(t, _)| t.name != "core").count();
        for (track, spans) in tracks {
            let together = track.name != "core" && devices > MOST_DEVICES;
            for span in spans {
                let row = Row {
                    host,
                    who: if together {
                        "devices".into()
                    } else {
                        track.name.clone()
                    },
                    what: span.name.clone(),
                    start: span.start,
                    end: span.end,
                };
                let same = rows.iter_mut().find(|known| {
                    together && known.host == host && known.who == row.who && known.what == row.what
                });
                match same {
                    Some(known) => widen(known, span),
                    None => rows.push(row),
                }
            }
        }
    }
    rows.sort_by_key(|row| (row.start, row.end));
    rows
}

/// From the first that began to the last that ended.
fn widen(row: &mut Row, span: &Placed) {
    row.start = row.start.min(span.start);
    row.end = row.end.max(span.end);
}

fn bar(row: &Row, end: i64, width: usize) -> String {
    let column = |at: i64| {
        let at = i128::from(at.clamp(0, end)) * width as i128 / i128::from(end);
        usize::try_from(at).unwrap_or(0)
    };
    let start = column(row.start).min(width - 1);
    let length = (column(row.end) - start.min(column(row.end))).max(1);
    let rest = width - start - length;
    format!(
        "{}{}{}",
        " ".repeat(start),
        "█".repeat(length),
        " ".repeat(rest)
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::{report, span};
    use super::*;

    #[test]
    fn bars_lie_where_the_time_went() {
        let drawn = text(&report(0), 20);
        let lines: Vec<_> = drawn.lines().collect();
        assert_eq!(
            lines[0],
            "blackout 4.10 ms, predicted 3.90 ms; 3.0 MiB of memory sent, 1 rounds before"
        );
        assert_eq!(lines[1], "predicted: memory 3.00 ms, wake-ups 0.90 ms");
        assert_eq!(
            lines[2],
            "source      core   barrier B ▏█                   ▕   0.20 ms"
        );
        let commit = lines.iter().find(|line| line.contains("commit")).unwrap();
        assert!(
            commit.contains("▏          ██████████▕   2.00 ms"),
            "{commit}"
        );
        assert!(!drawn.contains("round  "), "what was before the stop");
    }

    #[test]
    fn many_devices_are_one_line() {
        let mut report = report(0);
        for number in 0..20 {
            let stop = span(&format!("net{number}"), "stop", 1300, 1400 + number);
            report.source.spans.push(stop);
        }
        let drawn = text(&report, 40);
        let stops: Vec<_> = drawn.lines().filter(|line| line.contains("stop")).collect();
        assert_eq!(stops.len(), 1, "{drawn}");
        assert!(stops[0].contains("devices stop") && stops[0].ends_with("0.55 ms"));
    }

    #[test]
    fn long_names_move_all_lines() {
        let mut report = report(0);
        let stop = span("balloon0", "stop", 1300, 1400);
        report.source.spans.push(stop);
        let drawn = text(&report, 40);
        let phase = |line: &str| line.chars().nth("destination balloon0 ".len());
        assert!(
            drawn.lines().skip(2).all(|line| phase(line) != Some(' ')),
            "{drawn}"
        );
    }

    #[test]
    fn a_migration_that_never_stopped_has_its_head() {
        let drawn = text(&Report::default(), 40);
        assert_eq!(drawn.lines().count(), 1);
    }
}
