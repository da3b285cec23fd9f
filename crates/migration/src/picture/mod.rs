//! A migration's report as a picture: pure functions of [`Report`].
//!
//! - [`Timeline`]: both hosts on one clock, a track for each process;
//! - [`trace()`]: for Perfetto's viewer and other readers of Chrome's trace format;
//! - [`svg()`]: the blackout, for a document;
//! - [`text()`]: the blackout, for a terminal.
//!
//! The hosts' wall clocks differ. They are moved against each other as little as causes and effects
//! demand: nothing starts at the destination after the commit that was not sent yet, and nothing
//! ends there later than the source has heard of it.

mod svg;
mod text;
mod trace;

pub use svg::svg;
pub use text::text;
pub use trace::{Trace, trace};

use std::fmt;

use crate::report::{Report, Side, Span};

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Host {
    /// Where the machine was.
    Source,
    /// Where it is.
    Destination,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// Something that took time, in microseconds since the order to stop; before it negative.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// What.
    pub name: String,
    /// Start.
    pub start: i64,
    /// End, not before the start.
    pub end: i64,
    /// Bytes moved in it.
    pub bytes: u64,
    /// How many of its track's spans it lies in or beside: those of one lane lie in each other or
    /// after each other.
    pub lane: usize,
}

/// What one process did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Track {
    /// On which host.
    pub host: Host,
    /// `core`, or a device's id.
    pub name: String,
    /// By their start.
    pub spans: Vec<Placed>,
}

/// Both hosts on the source's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// The source's, then the destination's; of each the core first, then devices by their id.
    pub tracks: Vec<Track>,
    /// When the blackout ended: 0 is its begin.
    pub blackout: i64,
}

impl Timeline {
    /// Of a report. One of a migration that never stopped has no blackout; its begin is the source's.
    pub fn of(report: &Report) -> Self {
        let stop = report.source.span("core", "barrier B");
        let origin = stop.map_or(0, |span| signed(span.start_us));
        let mut tracks = Vec::new();
        collect(&mut tracks, Host::Source, &report.source, -origin);
        let shift = offset(report) - origin;
        collect(&mut tracks, Host::Destination, &report.destination, shift);
        tracks.sort_by(|a, b| {
            let key = |t: &Track| (t.host, t.name != "core");
            key(a).cmp(&key(b)).then_with(|| natural(&a.name, &b.name))
        });
        Self {
            tracks,
            blackout: signed(report.blackout_us),
        }
    }

    /// What overlaps the blackout, of each track that has any.
    pub(crate) fn in_blackout(&self) -> impl Iterator<Item = (&Track, Vec<&Placed>)> {
        self.tracks.iter().filter_map(|track| {
            let spans = track.spans.iter();
            let spans: Vec<_> = spans
                .filter(|span| span.end >= 0 && span.start >= 0 && span.start <= self.blackout)
                .collect();
            (!spans.is_empty()).then_some((track, spans))
        })
    }
}

/// What is added to the destination's times to have them in the source's.
fn offset(report: &Report) -> i64 {
    let (source, destination) = (&report.source, &report.destination);
    let said = signed(destination.origin_us) - signed(source.origin_us);
    let Some(commit) = source.span("core", "commit") else {
        return said;
    };
    let least = destination
        .span("core", "barrier F")
        .map_or(said, |span| signed(commit.start_us) - signed(span.start_us));
    let most = destination
        .span("core", "run")
        .map_or(said, |span| signed(commit.end_us) - signed(span.end_us));
    if least <= most {
        said.clamp(least, most)
    } else {
        i64::midpoint(least, most)
    }
}

fn collect(tracks: &mut Vec<Track>, host: Host, side: &Side, shift: i64) {
    let mut spans: Vec<&Span> = side.spans.iter().collect();
    // Of those that start together the longer one is around the other.
    spans.sort_by_key(|span| (span.start_us, std::cmp::Reverse(span.end_us)));
    for span in spans {
        let at = tracks
            .iter()
            .position(|track| track.host == host && track.name == span.track);
        let at = at.unwrap_or_else(|| {
            tracks.push(Track {
                host,
                name: span.track.clone(),
                spans: Vec::new(),
            });
            tracks.len() - 1
        });
        let (start, end) = (signed(span.start_us), signed(span.end_us));
        let placed = Placed {
            name: span.name.clone(),
            start: start.saturating_add(shift),
            end: end.max(start).saturating_add(shift),
            bytes: span.bytes,
            lane: 0,
        };
        let lane = lane(&tracks[at].spans, &placed);
        tracks[at].spans.push(Placed { lane, ..placed });
    }
}

/// The first lane in which nothing crosses the span.
fn lane(spans: &[Placed], new: &Placed) -> usize {
    let crosses = |lane: usize| {
        let mut others = spans.iter().filter(|span| span.lane == lane);
        others.any(|span| span.end > new.start && span.end < new.end)
    };
    (0..).find(|lane| !crosses(*lane)).unwrap_or(0)
}

/// `disk2` before `disk10`.
fn natural(a: &str, b: &str) -> std::cmp::Ordering {
    let key = |name: &str| {
        let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let (word, number) = name.split_at(name.len() - digits);
        (word.to_owned(), number.parse::<u64>().unwrap_or(0))
    };
    key(a).cmp(&key(b)).then_with(|| a.cmp(b))
}

fn signed(us: u64) -> i64 {
    // A peer's number: what is beyond is cut there, with room to add two of them.
    i64::try_from(us).unwrap_or(i64::MAX).min(i64::MAX / 4)
}

/// Milliseconds with two digits, of microseconds.
#[derive(Clone, Copy)]
struct Ms(i64);

impl fmt::Display for Ms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let us = self.0.unsigned_abs();
        let text = format!("{sign}{}.{:02} ms", us / 1000, us % 1000 / 10);
        f.pad(&text)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::report::{Prediction, Round};

    pub(crate) fn span(track: &str, name: &str, start_us: u64, end_us: u64) -> Span {
        Span {
            track: track.into(),
            name: name.into(),
            start_us,
            end_us,
            bytes: 0,
        }
    }

    /// Stops at 1000 of the source and runs at 5000; the destination's wall clock is `late`
    /// microseconds ahead.
    pub(crate) fn report(late: u64) -> Report {
        let mut saved = span("disk2", "save", 1800, 2500);
        saved.bytes = 5000;
        Report {
            memory_bytes: 3 << 20,
            rounds: vec![Round {
                pages: 700,
                bytes: 3 << 20,
                us: 600,
            }],
            predicted_us: 3900,
            prediction: Prediction {
                memory_us: 3000,
                wakes_us: 900,
                ..Prediction::default()
            },
            blackout_us: 4100,
            source: Side {
                origin_us: 1_000_000,
                spans: vec![
                    span("core", "barrier A", 0, 500),
                    span("core", "round", 300, 900),
                    span("core", "barrier B", 1000, 1200),
                    span("disk10", "stop", 1250, 1500),
                    span("disk2", "stop", 1250, 1800),
                    saved,
                    span("core", "barrier D", 1250, 1850),
                    span("core", "barrier E", 1900, 3000),
                    span("core", "commit", 3000, 5000),
                ],
                ..Side::default()
            },
            destination: Side {
                origin_us: 1_000_000 + late,
                spans: vec![
                    span("core", "load", 2100, 2700),
                    span("disk2", "resume", 3300, 4000),
                    span("core", "barrier F", 3200, 4100),
                    span("core", "run", 4100, 4600),
                ],
                ..Side::default()
            },
        }
    }

    fn start(timeline: &Timeline, host: Host, track: &str, name: &str) -> i64 {
        let mut tracks = timeline.tracks.iter();
        let track = tracks.find(|t| t.host == host && t.name == track).unwrap();
        track.spans.iter().find(|s| s.name == name).unwrap().start
    }

    #[test]
    fn clocks_that_agree_are_left_alone() {
        let timeline = Timeline::of(&report(0));
        assert_eq!(start(&timeline, Host::Source, "core", "barrier B"), 0);
        assert_eq!(start(&timeline, Host::Source, "core", "round"), -700);
        assert_eq!(start(&timeline, Host::Destination, "core", "load"), 1100);
    }

    #[test]
    fn clocks_that_do_not_are_moved_until_effects_follow_causes() {
        let ahead = Timeline::of(&report(60_000_000));
        let run = ahead.tracks.iter().flat_map(|t| &t.spans);
        let run = run.clone().find(|s| s.name == "run").unwrap();
        assert_eq!(run.end, 4000, "heard as soon as it was said");
        let mut report = report(0);
        report.destination.origin_us = 0;
        let behind = Timeline::of(&report);
        let f = start(&behind, Host::Destination, "core", "barrier F");
        assert_eq!(f, 2000, "not before the commit was sent");
    }

    #[test]
    fn cores_come_first_and_devices_by_number() {
        let timeline = Timeline::of(&report(0));
        let names: Vec<_> = timeline
            .tracks
            .iter()
            .map(|t| format!("{} {}", t.host, t.name))
            .collect();
        assert_eq!(
            names,
            [
                "source core",
                "source disk2",
                "source disk10",
                "destination core",
                "destination disk2"
            ]
        );
    }

    #[test]
    fn spans_that_cross_are_in_different_lanes() {
        let timeline = Timeline::of(&report(0));
        let lanes: Vec<_> = timeline.tracks[0]
            .spans
            .iter()
            .map(|s| (s.name.as_str(), s.lane))
            .collect();
        assert_eq!(
            lanes[..3],
            [("barrier A", 0), ("round", 1), ("barrier B", 0)]
        );
    }

    #[test]
    fn a_hostile_side_is_drawn_and_nothing_overflows() {
        let mut report = report(0);
        report.destination.origin_us = u64::MAX;
        report
            .destination
            .spans
            .push(span("core", "x", u64::MAX, 0));
        report
            .destination
            .spans
            .push(span("", "<&\">", 3500, u64::MAX));
        report.blackout_us = u64::MAX;
        let timeline = Timeline::of(&report);
        assert_eq!(timeline.tracks.len(), 6);
        assert!(svg(&report).contains("&lt;&amp;&quot;&gt;"));
        assert!(!text(&report, 40).is_empty());
        assert!(!trace(&report).events().is_empty());
    }
}
