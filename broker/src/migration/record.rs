//! What a job knows of its migration, and what cores say of it.

use api::job_migration::{Facts, Place};
use migration::report::{Report, Side};
use serde::{Deserialize, Serialize};

use super::options::Options;

/// What a job knows of its migration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Record {
    /// Where the machine goes to.
    pub(crate) uri: String,
    /// Where it is.
    pub(crate) place: Place,
    /// How it is to move.
    pub(crate) options: Options,
    /// What went wrong here meanwhile.
    pub(crate) trouble: Option<String>,
    /// How far it is.
    pub(crate) progress: Progress,
    /// What it took.
    pub(crate) report: Option<Report>,
}

/// How far a migration is, as its core says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct Progress {
    /// `idle`, `negotiating`, `copying`, `switchover`, `writing` (into files), `over`.
    pub(crate) phase: String,
    /// Rounds of copying, the one that runs included.
    pub(crate) round: u64,
    /// Bytes of memory sent.
    pub(crate) sent_bytes: u64,
    /// Bytes of memory that are still to be sent.
    pub(crate) remaining_bytes: u64,
    /// Bytes a second, sent.
    pub(crate) rate: u64,
    /// Bytes a second, dirtied.
    pub(crate) dirty_rate: u64,
    /// The stop as it is predicted, in microseconds.
    pub(crate) predicted_us: u64,
    /// Percent of its time that the guest loses.
    pub(crate) throttle: u32,
}

/// How a migration ended, as a core says it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// What became of the machine.
    pub(crate) result: Verdict,
    /// Why, if it is not where it was wanted.
    pub(crate) reason: Option<String>,
    /// What it took.
    #[serde(default)]
    pub(crate) report: Report,
}

/// What became of the machine of a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// It runs at the destination.
    Moved,
    /// It is here, as it was.
    Kept,
    /// It is paused here, and may run at the destination.
    Undecided,
    /// It came here.
    Arrived,
}

impl Record {
    /// What the bus shows.
    pub(crate) fn facts(&self) -> Facts {
        let report = self.report.as_ref();
        let spans = |name: &'static str, side: &Side| {
            let span = move |span: &migration::report::Span| {
                let who = format!("{name} {}", span.track);
                (who, span.name.clone(), span.start_us, span.end_us)
            };
            side.spans.iter().map(span).collect::<Vec<_>>()
        };
        let timeline = report.map(|report| {
            let mut all = spans("source", &report.source);
            all.extend(spans("destination", &report.destination));
            all
        });
        Facts {
            uri: self.uri.clone(),
            place: self.place,
            bytes_sent: report.map_or(self.progress.sent_bytes, |report| report.memory_bytes),
            bytes_remaining: self.progress.remaining_bytes,
            dirty_rate: self.progress.dirty_rate,
            link_rate: self.progress.rate,
            iteration: self.progress.round,
            max_downtime_usec: self.options.max_downtime_usec,
            predicted_downtime_usec: report
                .map_or(self.progress.predicted_us, |report| report.predicted_us),
            downtime_usec: report.map_or(0, |report| report.blackout_us),
            throttle: self.progress.throttle,
            timeline: timeline.unwrap_or_default(),
            report: report
                .and_then(|report| serde_json::to_string(report).ok())
                .unwrap_or_default(),
        }
    }
}

impl Progress {
    /// How much is done, from 0 to 1: of the memory that is known to be left.
    pub(crate) fn share(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a share for a progress bar")]
        let (sent, left) = (self.sent_bytes as f64, self.remaining_bytes as f64);
        match self.phase.as_str() {
            "switchover" | "over" => 0.99,
            _ if sent + left == 0.0 => 0.0,
            _ => 0.99 * sent / (sent + left),
        }
    }
}
