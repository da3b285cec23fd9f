//! The blackout as SVG: a row for each lane of each process, both hosts on one time axis.

use std::fmt::Write as _;

use super::{Host, Ms, Placed, Timeline, Track};
use crate::report::Report;

/// Pixels of the labels on the left, of the time axis, and of a row.
const LEFT: f64 = 150.0;
const AXIS: f64 = 900.0;
const ROW: f64 = 18.0;
/// Pixels above the first row.
const TOP: f64 = 44.0;
/// Pixels of a character, for what fits into a box.
const CHARACTER: f64 = 5.6;
/// Marks on the time axis, at most.
const MARKS: i64 = 12;
/// One colour for each name of a span, in turn.
const COLOURS: [&str; 10] = [
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#ff9da7",
    "#9c755f", "#8cd17d",
];

/// The picture, a whole SVG document.
pub fn svg(report: &Report) -> String {
    let timeline = Timeline::of(report);
    let tracks: Vec<_> = timeline.in_blackout().collect();
    let end = timeline.blackout.max(1);
    let rows: usize = tracks.iter().map(|(_, spans)| lanes(spans)).sum();
    let (width, height) = (LEFT + AXIS + 10.0, TOP + rows as f64 * ROW + 8.0);
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"10\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"4\" y=\"14\" font-size=\"12\">Blackout of {}, predicted {}</text>",
        Ms(timeline.blackout),
        Ms(super::signed(report.predicted_us))
    );
    axis(&mut out, end, height);
    let mut names = Vec::new();
    let mut row = 0;
    for (track, spans) in &tracks {
        label(&mut out, track, row);
        for span in spans {
            draw(&mut out, span, row, end, &mut names);
        }
        row += lanes(spans);
    }
    out.push_str("</svg>\n");
    out
}

fn lanes(spans: &[&Placed]) -> usize {
    spans.iter().map(|span| span.lane + 1).max().unwrap_or(0)
}

fn x(at: i64, end: i64) -> f64 {
    LEFT + at.clamp(0, end) as f64 / end as f64 * AXIS
}

fn y(row: usize) -> f64 {
    TOP + row as f64 * ROW
}

fn axis(out: &mut String, end: i64, height: f64) {
    let steps = (0..18).flat_map(|power| [1, 2, 5].map(|n: i64| n * 10i64.pow(power)));
    let step = steps
        .into_iter()
        .find(|step| end / step < MARKS)
        .unwrap_or(end);
    for mark in 0..=end / step {
        let at = x(mark * step, end);
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" y1=\"34\" x2=\"{at:.1}\" y2=\"{height}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"30\" text-anchor=\"middle\" fill=\"#555\">{}</text>",
            Ms(mark * step)
        );
    }
}

fn label(out: &mut String, track: &Track, row: usize) {
    let at = y(row) + ROW - 5.0;
    let colour = match track.host {
        Host::Source => "#000",
        Host::Destination => "#06c",
    };
    let name = escaped(&format!("{} {}", track.host, track.name));
    let _ = writeln!(
        out,
        "<text x=\"4\" y=\"{at}\" fill=\"{colour}\">{name}</text>"
    );
}

fn draw(out: &mut String, span: &Placed, row: usize, end: i64, names: &mut Vec<String>) {
    let number = names.iter().position(|name| *name == span.name);
    let number = number.unwrap_or_else(|| {
        names.push(span.name.clone());
        names.len() - 1
    });
    let colour = COLOURS[number % COLOURS.len()];
    let (left, right, top) = (x(span.start, end), x(span.end, end), y(row + span.lane));
    let width = (right - left).max(0.7);
    let name = escaped(&span.name);
    let took = Ms(span.end.saturating_sub(span.start));
    let _ = write!(
        out,
        "<rect x=\"{left:.1}\" y=\"{}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\" \
         fill-opacity=\"0.75\"><title>{name}, {took}</title></rect>",
        top + 2.0,
        ROW - 4.0
    );
    if name.chars().count() as f64 * CHARACTER < width {
        let (x, y) = (left + 3.0, top + ROW - 5.0);
        let _ = write!(out, "<text x=\"{x:.1}\" y=\"{y}\">{name}</text>");
    }
    out.push('\n');
}

/// As text of an element: names come from the other host, too.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn every_span_of_the_blackout_is_a_box_on_the_axis() {
        let drawn = svg(&report(0));
        // The background, and all but what was before the stop.
        assert_eq!(drawn.matches("<rect").count(), 1 + 13 - 2);
        assert!(drawn.contains("Blackout of 4.10 ms, predicted 3.90 ms"));
        assert!(drawn.contains("<title>save, 0.70 ms</title>"));
        let barrier = drawn
            .lines()
            .find(|line| line.contains("barrier B"))
            .unwrap();
        assert!(barrier.contains("x=\"150.0\""), "{barrier}");
        assert_eq!(
            drawn.matches("<text").count(),
            drawn.matches("</text>").count()
        );
    }
}
