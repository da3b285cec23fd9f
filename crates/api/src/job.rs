//! `org.godwit.Vmm1.Job` at `/org/godwit/Vmm1/job/N`: something that takes its time.
//!
//! ```text
//! running ─► done | failed | cancelled      kept for at least five minutes, then gone
//! ```

use std::future::Future;

use serde::{Deserialize, Serialize};
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{OwnedVariant, Type, Variant};

use crate::{Caller, Dictionary, Error};

/// Key of a result: the D-Bus name of the error by which the job failed, `s`.
pub const RESULT_ERROR: &str = "Error";
/// Key of a result: one sentence for a person, `s`.
pub const RESULT_MESSAGE: &str = "Message";

/// How far a job is.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Type, Variant, OwnedVariant,
)]
#[zbus(signature = "s", rename_all = "lowercase")]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It works.
    Running,
    /// It did what it was for.
    Done,
    /// It did not; its result says why.
    Failed,
    /// It was cancelled.
    Cancelled,
}

impl State {
    /// Its word on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What a job is and how far it is now.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its number.
    pub id: u32,
    /// `start`, `power-off`, `terminate`, `restart-device`, `migrate`, `receive`, `snapshot`,
    /// `restore`.
    pub kind: String,
    /// Name of its machine.
    pub machine: String,
    /// How far it is.
    pub state: State,
    /// What it does now, in a word or two.
    pub phase: String,
    /// From 0 to 1.
    pub progress: f64,
    /// Whether it can be cancelled now.
    pub cancellable: bool,
    /// What came of it; empty while it works.
    pub result: Dictionary,
}

/// What a broker does for one job.
pub trait OneJob: Send + Sync + 'static {
    /// See [`JobProxy::cancel`].
    fn cancel(&self, caller: Caller) -> impl Future<Output = Result<(), Error>> + Send;
    /// What the properties are now. Must not block.
    fn facts(&self) -> Facts;
}

/// The interface on [`OneJob`].
#[derive(Debug)]
pub struct Job<J>(pub J);

/// Something that takes its time.
#[zbus::interface(
    name = "org.godwit.Vmm1.Job",
    proxy(default_service = "org.godwit.Vmm1")
)]
impl<J: OneJob> Job<J> {
    /// Ends it as soon as it can be ended; it is then `cancelled`.
    #[zbus(proxy(allow_interactive_auth))]
    async fn cancel(&self, #[zbus(header)] header: Header<'_>) -> Result<(), Error> {
        self.0.cancel(Caller::from(&header)).await
    }

    /// Its number.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn id(&self) -> u32 {
        self.0.facts().id
    }

    /// What it is: `start`, `power-off`, `terminate`, `restart-device`, `migrate`, `receive`,
    /// `snapshot` or `restore`. A `migrate` has `org.godwit.Vmm1.Job.Migration` too.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn kind(&self) -> String {
        self.0.facts().kind
    }

    /// Name of its machine.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn machine(&self) -> String {
        self.0.facts().machine
    }

    /// How far it is: `running`, `done`, `failed` or `cancelled`.
    #[zbus(property)]
    async fn state(&self) -> State {
        self.0.facts().state
    }

    /// What it does now.
    #[zbus(property)]
    async fn phase(&self) -> String {
        self.0.facts().phase
    }

    /// How much of it is done, from 0 to 1.
    #[zbus(property)]
    async fn progress(&self) -> f64 {
        self.0.facts().progress
    }

    /// Whether it can be cancelled now.
    #[zbus(property)]
    async fn cancellable(&self) -> bool {
        self.0.facts().cancellable
    }

    /// What came of it: `Error`, the D-Bus name of an error, and `Message`, a sentence; more
    /// by kind. Empty while it works.
    #[zbus(property)]
    async fn result(&self) -> Dictionary {
        self.0.facts().result
    }

    /// It ended, with `done`, `failed` or `cancelled` and its result.
    #[zbus(signal)]
    pub async fn finished(
        emitter: &SignalEmitter<'_>,
        state: &str,
        result: Dictionary,
    ) -> zbus::Result<()>;
}
