//! What the owner sees of a migration.

use migration::report::Report;
use serde::Serialize;

/// How far it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// `idle`, `negotiating`, `copying`, `switchover`, `writing` (into files), `over`.
    pub phase: &'static str,
    /// Rounds of copying, the one that runs included.
    pub round: u64,
    /// Bytes of memory sent.
    pub sent_bytes: u64,
    /// Bytes of memory that are still to be sent.
    pub remaining_bytes: u64,
    /// Bytes a second, sent.
    pub rate: u64,
    /// Bytes a second, dirtied by guest and devices.
    pub dirty_rate: u64,
    /// How long the stop would be if it began now, in microseconds.
    pub predicted_us: u64,
    /// Whether the prediction gets shorter.
    pub converging: bool,
    /// Percent of its time that the guest loses.
    pub throttle: u32,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Outcome {
    /// What became of the machine.
    pub result: Verdict,
    /// Why, if it is not where it was wanted.
    pub reason: Option<String>,
    /// What it took.
    pub report: Report,
}

impl Outcome {
    /// The machine is here, as it was, and why it is not where it was wanted.
    pub fn kept(reason: Option<String>) -> Self {
        Self {
            result: Verdict::Kept,
            reason,
            report: Report::default(),
        }
    }
}

/// Where the machine is after a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It runs at the destination.
    Moved,
    /// It came here.
    Arrived,
    /// It is here, as it was.
    Kept,
    /// It is paused here, and maybe runs at the destination: somebody must decide.
    Undecided,
}

/// What there is to see.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// A migration is under way.
    pub active: bool,
    /// How far it is.
    pub progress: Progress,
    /// How the last one ended.
    pub outcome: Option<Outcome>,
}
