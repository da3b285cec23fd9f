//! A core whose machine moves: how far it is, and how it ends.

use std::io;
use std::time::Duration;

use api::Error;
use api::core::CoreProxy;
use api::migration::MigrationProxy;
use tokio::time::{MissedTickBehavior, interval};
use zbus::proxy::CacheProperties;

use super::record::{Outcome, Progress};
use crate::jobs::Job;
use crate::publish::{Change, Publisher};

/// How often a core is asked how far it is.
const LOOK: Duration = Duration::from_millis(250);

/// How long an answer takes that is there already.
const AT_ONCE: Duration = Duration::from_millis(500);

/// A core, as far as its machine moves.
#[derive(Debug)]
pub(crate) struct Mover(pub(crate) MigrationProxy<'static>);

impl Mover {
    /// That of a core.
    ///
    /// # Errors
    /// Its connection is broken.
    pub(crate) async fn of(core: &CoreProxy<'static>) -> Result<Self, Error> {
        let proxy = MigrationProxy::builder(core.inner().connection())
            .cache_properties(CacheProperties::No)
            .build()
            .await?;
        Ok(Self(proxy))
    }

    /// Waits for the end of what is under way, whose steps all have deadlines in the core.
    ///
    /// # Errors
    /// The core is gone, or nothing is under way and nothing was.
    pub(crate) async fn outcome(&self) -> Result<Outcome, Error> {
        loop {
            match self.0.wait().await {
                Ok(text) => {
                    return serde_json::from_str(&text).map_err(|error| {
                        Error::Internal(format!("the core's outcome cannot be read: {error}"))
                    });
                }
                // It takes longer than a call may.
                Err(Error::ZBus(zbus::Error::InputOutput(error)))
                    if error.kind() == io::ErrorKind::TimedOut => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// How the last one ended, if none is under way.
    ///
    /// # Errors
    /// One is, or there was none.
    pub(crate) async fn now(&self) -> Result<Outcome, Error> {
        let outcome = tokio::time::timeout(AT_ONCE, self.outcome()).await;
        outcome.unwrap_or_else(|_| Err(Error::InvalidState("it is under way".into())))
    }

    /// Waits for the end of the migration that `job` is, shows how far it is, tells the core what
    /// stop is wanted now, and cancels it with the job.
    ///
    /// # Errors
    /// As [`Self::outcome`].
    pub(crate) async fn watch(&self, job: &Job, publisher: &Publisher) -> Result<Outcome, Error> {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let outcome = self.outcome();
        tokio::pin!(outcome);
        let mut cancelled = false;
        let mut wanted = None;
        loop {
            tokio::select! {
                biased;
                outcome = &mut outcome => return outcome,
                () = job.cancelled(), if !cancelled => {
                    cancelled = true;
                    // One that is over already cannot be cancelled.
                    let _ = self.0.cancel().await;
                }
                _ = look.tick() => {
                    let now = job.max_downtime();
                    if let Some(usec) = now.filter(|_| now != wanted)
                        && self.0.set_max_downtime(usec).await.is_ok()
                    {
                        wanted = now;
                    }
                    let Ok(text) = self.0.progress().await else { continue };
                    let Ok(progress) = serde_json::from_str::<Progress>(&text) else { continue };
                    // While the machine stands still nobody is told.
                    let tell = progress.phase != "switchover";
                    if job.note_progress(progress) && tell {
                        publisher.send(Change::Job(job.id()));
                    }
                }
            }
        }
    }
}
