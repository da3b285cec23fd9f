//! `org.godwit.Vmm1.Job.Migration`, beside [`crate::job`] at the object of a job that moves a
//! machine to another host or within this one.
//!
//! Changes are signalled at most four times a second, and none while the machine stands still.

use std::future::Future;

use zbus::OwnedVariant;
use zbus::message::Header;

use crate::{Caller, Error};

/// Key of a result: where the machine is, [`Place`], `s`.
pub const RESULT_PLACE: &str = "Place";
/// Key of a result: how long the machine stood still, in microseconds, `t`.
pub const RESULT_DOWNTIME: &str = "DowntimeUSec";

/// Where a machine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// Where it was, as it was.
    #[default]
    Source,
    /// Where it was wanted.
    Destination,
    /// It is paused at the source and may run at the destination: somebody must decide.
    Undecided,
    /// It ended on its way.
    Nowhere,
}

impl Place {
    /// Its word on the bus.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Undecided => "undecided",
            Self::Nowhere => "nowhere",
        }
    }

    /// The place of this word.
    pub fn of_word(word: &str) -> Option<Self> {
        [
            Self::Source,
            Self::Destination,
            Self::Undecided,
            Self::Nowhere,
        ]
        .into_iter()
        .find(|place| place.as_str() == word)
    }
}

impl From<Place> for OwnedVariant {
    fn from(place: Place) -> Self {
        zbus::Str::from_static(place.as_str()).into()
    }
}

/// How far a migration is, and what it took. As JSON without what is long.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Facts {
    /// Where the machine goes to.
    pub uri: String,
    /// Where it is.
    pub place: Place,
    /// Bytes of memory sent.
    pub bytes_sent: u64,
    /// Bytes of memory that are still to be sent.
    pub bytes_remaining: u64,
    /// Bytes a second that guest and devices write.
    pub dirty_rate: u64,
    /// Bytes a second that are sent.
    pub link_rate: u64,
    /// Rounds of copying, the one that runs included.
    pub iteration: u64,
    /// The longest stop that is wanted, in microseconds.
    pub max_downtime_usec: u64,
    /// How long the stop would be if it began now, in microseconds.
    pub predicted_downtime_usec: u64,
    /// How long it was, in microseconds; 0 before.
    pub downtime_usec: u64,
    /// Percent of its time that the guest loses so that copying keeps up.
    pub throttle: u32,
    /// Spans of both sides: side and unit, what, begin and end in microseconds.
    #[serde(skip)]
    pub timeline: Vec<(String, String, u64, u64)>,
    /// All that was measured, as JSON; empty before the end.
    #[serde(skip)]
    pub report: String,
}

/// What a broker does for one migration.
pub trait OneMigration: Send + Sync + 'static {
    /// What the properties are now. Must not block.
    fn facts(&self) -> Facts;
    /// See [`JobMigrationProxy::set_max_downtime_usec`].
    fn set_max_downtime(
        &self,
        caller: Caller,
        usec: u64,
    ) -> impl Future<Output = Result<(), Error>> + Send;
}

/// The interface on [`OneMigration`].
#[derive(Debug)]
pub struct JobMigration<M>(pub M);

/// How a machine moves.
#[zbus::interface(
    name = "org.godwit.Vmm1.Job.Migration",
    proxy(default_service = "org.godwit.Vmm1")
)]
impl<M: OneMigration> JobMigration<M> {
    /// Where the machine goes to.
    #[zbus(property(emits_changed_signal = "const"), name = "URI")]
    async fn uri(&self) -> String {
        self.0.facts().uri
    }

    /// Where the machine is: `source`, `destination`, `undecided` (it is paused at the source and
    /// may run at the destination) or `nowhere` (it ended on its way).
    #[zbus(property)]
    async fn place(&self) -> String {
        self.0.facts().place.as_str().into()
    }

    /// Bytes of memory sent.
    #[zbus(property)]
    async fn bytes_sent(&self) -> u64 {
        self.0.facts().bytes_sent
    }

    /// Bytes of memory that are still to be sent.
    #[zbus(property)]
    async fn bytes_remaining(&self) -> u64 {
        self.0.facts().bytes_remaining
    }

    /// Bytes a second that the guest and its devices write.
    #[zbus(property)]
    async fn dirty_rate(&self) -> u64 {
        self.0.facts().dirty_rate
    }

    /// Bytes a second that are sent.
    #[zbus(property)]
    async fn link_rate(&self) -> u64 {
        self.0.facts().link_rate
    }

    /// Rounds of copying, the one that runs included.
    #[zbus(property)]
    async fn iteration(&self) -> u64 {
        self.0.facts().iteration
    }

    /// The stop begins when it is predicted to be shorter, in microseconds; a day at most. Written
    /// while the machine is copied, it counts from the next round on.
    #[zbus(property, name = "MaxDowntimeUSec")]
    async fn max_downtime_usec(&self) -> u64 {
        self.0.facts().max_downtime_usec
    }

    /// Wants another one.
    #[zbus(property, name = "MaxDowntimeUSec")]
    async fn set_max_downtime_usec(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        usec: u64,
    ) -> Result<(), Error> {
        let caller = Caller::of_property(header.as_ref())?;
        self.0.set_max_downtime(caller, usec).await
    }

    /// How long the stop would be if it began now, in microseconds.
    #[zbus(property, name = "PredictedDowntimeUSec")]
    async fn predicted_downtime_usec(&self) -> u64 {
        self.0.facts().predicted_downtime_usec
    }

    /// How long the machine stood still, in microseconds; 0 before the end.
    #[zbus(property, name = "DowntimeUSec")]
    async fn downtime_usec(&self) -> u64 {
        self.0.facts().downtime_usec
    }

    /// Percent of its time that the guest loses so that copying keeps up.
    #[zbus(property)]
    async fn throttle(&self) -> u32 {
        self.0.facts().throttle
    }

    /// What took how long, on both sides, each by its own clock: `source disk0`, `save`, begin and
    /// end in microseconds. Empty before the end.
    #[zbus(property(emits_changed_signal = "invalidates"))]
    async fn timeline(&self) -> Vec<(String, String, u64, u64)> {
        self.0.facts().timeline
    }

    /// All that was measured, as JSON. Empty before the end.
    #[zbus(property(emits_changed_signal = "invalidates"))]
    async fn report(&self) -> String {
        self.0.facts().report
    }
}
