//! What a migration took: a timeline of each host, from which the downtime can be read.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Most spans of one side: a hostile peer's report is cut there.
pub const MAX_SPANS: usize = 4096;

/// Something that took time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Who: `core`, a device's id.
    pub track: String,
    /// What: `stop`, `save`, `barrier D`.
    pub name: String,
    /// Start, in microseconds since the side's origin.
    pub start_us: u64,
    /// End, in microseconds since the side's origin.
    pub end_us: u64,
    /// Bytes moved in it.
    #[serde(default)]
    pub bytes: u64,
}

/// What was done in the blackout that belongs before it, each kind counted; and what has to be done
/// in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Costs {
    /// Tables of guest memory that devices were told.
    pub memory_tables: u64,
    /// Memory slots of KVM that were changed.
    pub memory_slots: u64,
    /// Eventfds that were tied to interrupts, or untied.
    pub interrupts: u64,
    /// Eventfds that were tied to doorbells, or untied.
    pub doorbells: u64,
    /// Tables of interrupt routes that KVM was given.
    pub routes: u64,
    /// Rings whose place or eventfds devices were told.
    pub rings: u64,
    /// Files that were opened.
    pub files: u64,
    /// Lines that were logged.
    pub log_lines: u64,
    /// Messages to devices.
    pub messages: u64,
    /// Page faults of the core.
    pub page_faults: u64,
}

impl Costs {
    /// What was added since `before`.
    #[must_use]
    pub fn since(&self, before: &Costs) -> Costs {
        Costs {
            memory_tables: self.memory_tables - before.memory_tables,
            memory_slots: self.memory_slots - before.memory_slots,
            interrupts: self.interrupts - before.interrupts,
            doorbells: self.doorbells - before.doorbells,
            routes: self.routes - before.routes,
            rings: self.rings - before.rings,
            files: self.files - before.files,
            log_lines: self.log_lines - before.log_lines,
            messages: self.messages - before.messages,
            page_faults: self.page_faults - before.page_faults,
        }
    }
}

/// One host's timeline.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// The host's wall clock at the origin, in microseconds since 1970.
    pub origin_us: u64,
    /// In the order in which they ended.
    pub spans: Vec<Span>,
    /// What the blackout cost.
    #[serde(default)]
    pub costs: Costs,
}

impl Side {
    /// The span of this name, on this track.
    pub fn span(&self, track: &str, name: &str) -> Option<&Span> {
        self.spans
            .iter()
            .find(|span| span.track == track && span.name == name)
    }
}

/// One round of copying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Pages that were to be sent.
    pub pages: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Microseconds.
    pub us: u64,
}

/// What a blackout was predicted to consist of, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Prediction {
    /// Memory that is left, at the rate of the rounds.
    pub memory_us: u64,
    /// Devices' states.
    pub states_us: u64,
    /// The core's state, as rehearsed.
    pub core_us: u64,
    /// Threads and processes that are woken one after the other.
    pub wakes_us: u64,
    /// Words of the two sides on their way.
    pub link_us: u64,
    /// Devices of either side that are asked and answer.
    pub devices_us: u64,
    /// The devices' own time to stop and to start.
    pub transitions_us: u64,
}

impl Prediction {
    /// All of it.
    pub fn total_us(&self) -> u64 {
        let parts = [
            self.memory_us,
            self.states_us,
            self.core_us,
            self.wakes_us,
            self.link_us,
            self.devices_us,
            self.transitions_us,
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// The whole of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Bytes of memory sent, in all.
    pub memory_bytes: u64,
    /// The rounds while the guest ran.
    pub rounds: Vec<Round>,
    /// The blackout as it was predicted when it began, in microseconds.
    pub predicted_us: u64,
    /// What that consists of.
    #[serde(default)]
    pub prediction: Prediction,
    /// From the order to stop to the destination's word that the machine runs, in microseconds on
    /// the source's clock.
    pub blackout_us: u64,
    /// The source's timeline.
    pub source: Side,
    /// The destination's timeline.
    pub destination: Side,
}

/// Writes one side's timeline. Room is made before the stop, so that noting costs nothing in it.
#[derive(Debug)]
pub struct Recorder {
    origin: Instant,
    side: Side,
}

impl Recorder {
    /// With its origin now.
    pub fn start() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            origin: Instant::now(),
            side: Side {
                origin_us: micros(wall.unwrap_or_default()),
                spans: Vec::with_capacity(512),
                costs: Costs::default(),
            },
        }
    }

    /// Notes what began at `start` and ends now.
    pub fn note(&mut self, track: &str, name: &str, start: Instant, bytes: u64) {
        self.note_span(track, name, start, Instant::now(), bytes);
    }

    /// Notes what began at `start` and ended at `end`.
    pub fn note_span(&mut self, track: &str, name: &str, start: Instant, end: Instant, bytes: u64) {
        if self.side.spans.len() >= MAX_SPANS {
            return;
        }
        let since = |at: Instant| micros(at.saturating_duration_since(self.origin));
        self.side.spans.push(Span {
            track: track.to_owned(),
            name: name.to_owned(),
            start_us: since(start),
            end_us: since(end),
            bytes,
        });
    }

    /// The blackout has cost this.
    pub fn set_costs(&mut self, costs: Costs) {
        self.side.costs = costs;
    }

    /// The timeline so far.
    pub fn side(&self) -> &Side {
        &self.side
    }
}

/// In microseconds, as far as they go.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_side_has_an_end() {
        let mut recorder = Recorder::start();
        for _ in 0..MAX_SPANS + 10 {
            recorder.note("core", "stop", Instant::now(), 0);
        }
        assert_eq!(recorder.side().spans.len(), MAX_SPANS);
        assert!(recorder.side().span("core", "stop").is_some());
        assert!(recorder.side().span("core", "go").is_none());
    }
}
