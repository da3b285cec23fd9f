//! The commit: who may run a machine that moves, whatever is lost, delayed or dies.
//!
//! ```text
//! source        Copying ──stop──▶ Stopped ──Loaded──▶ Committed ──Running──▶ Gone
//!                  │                 │                 │      │
//!                  │ any failure     │ any failure     │      │ link lost, deadline
//!                  ▼                 ▼      Discarded  │      ▼
//!                 Kept ◀───────────────────────────────┘   Unresolved ──▶ Kept | Gone
//!                                                           (somebody decides)
//! destination   Receiving ──loaded──▶ Loaded ──Commit──▶ Running
//!                  │                    │
//!                  └── any failure ─────┴──▶ Discarded: says so, and will never run
//! ```
//!
//! Rules, from which everything else follows:
//! - *Commit* is sent once, after *Loaded* has come. With its sending the source gives up the
//!   right to run; only the destination's word *Discarded*, or a person, gives it back.
//! - The destination runs only after *Commit* has come, and never once it has said *Discarded*.
//! - A destination that hears nothing in time, or whose link ends, discards itself. So a source
//!   that is `Unresolved` is the only open end, it is paused, and it says so; what has to be found out to
//!   decide it is whether the destination runs.
//! - A destination writes down that it runs before it does, so that its broker can answer that also
//!   when its core has ended. The broker answers nothing while the machine may still come, and
//!   *never* only when its core is no more and has not written that. Only when the host is lost, or
//!   what it wrote, a person has to find out.
//!
//! The types here are the ones that a core goes by, and the ones that a model checker runs through
//! every interleaving of (`tests` below).

/// What the source's side of a migration is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The machine runs (or was paused before) and is copied.
    Copying,
    /// The machine stands still for the switchover.
    Stopped,
    /// The right to run was given away.
    Committed,
    /// The machine is at the destination; what is left here may go.
    Gone,
    /// Nobody here knows whether the destination runs. Paused, until somebody decides.
    Unresolved,
    /// The migration is over and the machine is here, as it was.
    Kept,
}

/// What happens to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceInput {
    /// It is time to stop.
    Stop,
    /// The destination says that it has everything.
    Loaded,
    /// The destination says that the machine runs there.
    Running,
    /// The destination says that the machine does not run there and never will.
    Discarded,
    /// Something failed here, or somebody cancelled.
    Failed,
    /// The link ended, or said nothing sensible.
    LinkLost,
    /// A wait ended without an answer.
    Deadline,
    /// The destination's broker, or somebody, has made sure that the destination does not run.
    TakenBack,
    /// The same, that the destination runs.
    LetGo,
}

/// What the source has to tell the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceWord {
    /// From here on the machine is the destination's.
    Commit,
    /// The migration is over, the machine stays where it was.
    Abort,
}

impl Source {
    /// The next state, and what to say. What does not fit the state changes nothing.
    #[must_use]
    pub fn on(self, input: SourceInput) -> (Self, Option<SourceWord>) {
        use SourceInput as On;
        match (self, input) {
            (Self::Copying, On::Stop) => (Self::Stopped, None),
            (Self::Stopped, On::Loaded) => (Self::Committed, Some(SourceWord::Commit)),
            // Before the commit everything else ends it, an answer to no question too.
            (
                Self::Copying | Self::Stopped,
                On::Failed | On::LinkLost | On::Deadline | On::Discarded | On::Running | On::Loaded,
            ) => (Self::Kept, Some(SourceWord::Abort)),
            (Self::Committed, On::Running) => (Self::Gone, None),
            (Self::Committed | Self::Unresolved, On::Discarded) => (Self::Kept, None),
            (Self::Committed, On::LinkLost | On::Deadline) => (Self::Unresolved, None),
            (Self::Unresolved, On::TakenBack) => (Self::Kept, None),
            (Self::Unresolved, On::LetGo | On::Running) => (Self::Gone, None),
            (state, _) => (state, None),
        }
    }

    /// Whether the machine may run here.
    pub fn may_run(self) -> bool {
        matches!(self, Self::Copying | Self::Kept)
    }

    /// Whether nothing will change any more by itself.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Gone | Self::Unresolved | Self::Kept)
    }
}

/// What the destination's side of a migration is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// It takes memory and state.
    Receiving,
    /// It has everything, and waits for the word.
    Loaded,
    /// The machine is here.
    Running,
    /// It gave up; the machine will never run here.
    Discarded,
}

/// What happens to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationInput {
    /// Everything is loaded and verified.
    Loaded,
    /// The source says *commit*.
    Commit,
    /// The source says that the machine stays there.
    Abort,
    /// Something failed here, or somebody cancelled.
    Failed,
    /// The link ended, or said nothing sensible.
    LinkLost,
    /// A wait ended without a word.
    Deadline,
}

/// What the destination has to tell the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationWord {
    /// Everything is loaded and verified.
    Loaded,
    /// The machine runs here. Said after it is true.
    Running,
    /// The machine does not run here and never will.
    Discarded,
}

impl Destination {
    /// The next state, and what to say. What does not fit the state changes nothing.
    #[must_use]
    pub fn on(self, input: DestinationInput) -> (Self, Option<DestinationWord>) {
        use DestinationInput as On;
        match (self, input) {
            (Self::Receiving, On::Loaded) => (Self::Loaded, Some(DestinationWord::Loaded)),
            (Self::Loaded, On::Commit) => (Self::Running, Some(DestinationWord::Running)),
            (Self::Receiving | Self::Loaded, _) => {
                (Self::Discarded, Some(DestinationWord::Discarded))
            }
            (state, _) => (state, None),
        }
    }

    /// Whether the machine may run here.
    pub fn may_run(self) -> bool {
        self == Self::Running
    }
}

#[cfg(test)]
mod tests;
