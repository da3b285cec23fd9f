//! Chrome's trace format, which Perfetto's viewer opens: a process for each of ours.
//!
//! Format: "Trace Event Format", complete events (`X`), metadata (`M`); times in microseconds.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Host, Timeline};
use crate::report::Report;

/// A trace, to be serialised as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trace {
    #[serde(rename = "displayTimeUnit")]
    unit: &'static str,
    #[serde(rename = "traceEvents")]
    events: Vec<Event>,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    name: String,
    #[serde(rename = "cat")]
    category: String,
    #[serde(rename = "ph")]
    kind: &'static str,
    #[serde(rename = "ts")]
    start: i64,
    #[serde(rename = "dur", skip_serializing_if = "Option::is_none")]
    duration: Option<i64>,
    #[serde(rename = "pid")]
    process: usize,
    #[serde(rename = "tid")]
    thread: usize,
    #[serde(rename = "args", skip_serializing_if = "BTreeMap::is_empty")]
    arguments: BTreeMap<&'static str, Argument>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
enum Argument {
    Number(u64),
    Text(String),
}

impl Trace {
    /// All events.
    pub fn events(&self) -> &[Event] {
        &self.events
    }
}

/// The whole migration. Time begins with its first span.
pub fn trace(report: &Report) -> Trace {
    let timeline = Timeline::of(report);
    let spans = timeline.tracks.iter().flat_map(|track| &track.spans);
    let origin = spans.map(|span| span.start).min().unwrap_or(0).min(0);
    let mut events = Vec::new();
    process(&mut events, 0, "machine".into());
    let predicted = Argument::Number(report.predicted_us);
    events.push(Event {
        name: "blackout".into(),
        category: "machine".into(),
        kind: "X",
        start: -origin,
        duration: Some(timeline.blackout),
        process: 0,
        thread: 0,
        arguments: BTreeMap::from([("predicted_us", predicted)]),
    });
    for (number, track) in (1..).zip(&timeline.tracks) {
        process(
            &mut events,
            number,
            format!("{}: {}", track.host, track.name),
        );
        for span in &track.spans {
            let bytes = (span.bytes > 0).then_some(("bytes", Argument::Number(span.bytes)));
            events.push(Event {
                name: span.name.clone(),
                category: category(track.host).into(),
                kind: "X",
                start: span.start.saturating_sub(origin),
                duration: Some(span.end.saturating_sub(span.start)),
                process: number,
                thread: span.lane,
                arguments: bytes.into_iter().collect(),
            });
        }
    }
    Trace { unit: "ms", events }
}

fn category(host: Host) -> &'static str {
    match host {
        Host::Source => "source",
        Host::Destination => "destination",
    }
}

/// Names a process and puts it in its place.
fn process(events: &mut Vec<Event>, number: usize, name: String) {
    let place = Argument::Number(number as u64);
    for (kind, argument) in [
        ("process_name", ("name", Argument::Text(name))),
        ("process_sort_index", ("sort_index", place)),
    ] {
        events.push(Event {
            name: kind.into(),
            category: "__metadata".into(),
            kind: "M",
            start: 0,
            duration: None,
            process: number,
            thread: 0,
            arguments: BTreeMap::from([argument]),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn every_process_is_named_and_every_span_is_there() {
        let trace = trace(&report(0));
        let names: Vec<_> = trace
            .events
            .iter()
            .filter(|event| event.name == "process_name")
            .map(|event| &event.arguments["name"])
            .collect();
        assert_eq!(names.len(), 6);
        assert_eq!(names[1], &Argument::Text("source: core".into()));
        let spans: Vec<_> = trace.events.iter().filter(|e| e.kind == "X").collect();
        assert_eq!(spans.len(), 1 + 9 + 4);
        assert!(spans.iter().all(|event| event.start >= 0));
        let save = spans.iter().find(|event| event.name == "save").unwrap();
        assert_eq!((save.start, save.duration), (1800, Some(700)));
        assert_eq!(save.arguments["bytes"], Argument::Number(5000));
    }

    #[test]
    fn the_blackout_is_where_the_stop_is() {
        let trace = trace(&report(0));
        let blackout = trace.events.iter().find(|e| e.name == "blackout").unwrap();
        assert_eq!((blackout.start, blackout.duration), (1000, Some(4100)));
    }
}
