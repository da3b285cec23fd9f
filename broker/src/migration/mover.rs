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

/// How often a core is asked how far it is, and the bus told at most.
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
        watch(self, job, publisher).await
    }
}

/// What is under way in a core.
trait UnderWay {
    /// Waits for its end.
    fn outcome(&self) -> impl Future<Output = Result<Outcome, Error>> + Send;
    /// How far it is, if that is known.
    fn progress(&self) -> impl Future<Output = Option<Progress>> + Send;
    /// Wants another limit of its downtime, in microseconds; whether that is so now.
    fn limit(&self, usec: u64) -> impl Future<Output = bool> + Send;
    /// Ends it.
    fn cancel(&self) -> impl Future<Output = ()> + Send;
}

impl UnderWay for Mover {
    async fn outcome(&self) -> Result<Outcome, Error> {
        Mover::outcome(self).await
    }

    async fn progress(&self) -> Option<Progress> {
        serde_json::from_str(&self.0.progress().await.ok()?).ok()
    }

    async fn limit(&self, usec: u64) -> bool {
        self.0.set_max_downtime(usec).await.is_ok()
    }

    async fn cancel(&self) {
        // One that is over already cannot be cancelled.
        let _ = self.0.cancel().await;
    }
}

async fn watch(core: &impl UnderWay, job: &Job, publisher: &Publisher) -> Result<Outcome, Error> {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let outcome = core.outcome();
    tokio::pin!(outcome);
    let mut cancelled = false;
    let mut wanted = None;
    loop {
        tokio::select! {
            biased;
            outcome = &mut outcome => return outcome,
            () = job.cancelled(), if !cancelled => {
                cancelled = true;
                core.cancel().await;
            }
            _ = look.tick() => {
                let now = job.max_downtime();
                if let Some(usec) = now.filter(|_| now != wanted) && core.limit(usec).await {
                    wanted = now;
                }
                let Some(progress) = core.progress().await else { continue };
                // While the machine stands still nobody is told.
                let tell = progress.phase != "switchover";
                if job.note_progress(progress) && tell {
                    publisher.send(Change::Job(job.id()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::sync::Notify;
    use tokio::time::{Instant, sleep, timeout};

    use super::*;
    use crate::jobs::{Jobs, Kind};
    use crate::migration::record::Verdict;
    use crate::name::MachineName;
    use crate::publish;

    const COPYING: Duration = Duration::from_secs(10);
    const STANDING: Duration = Duration::from_secs(5);

    /// A core that copies, stands still and is done; each look finds it further.
    struct Core {
        begin: Instant,
        looks: AtomicU64,
        cancelled: Notify,
    }

    impl Core {
        /// One that begins now.
        fn new() -> Self {
            Self {
                begin: Instant::now(),
                looks: AtomicU64::new(0),
                cancelled: Notify::new(),
            }
        }
    }

    fn job(publisher: &Publisher) -> Arc<Job> {
        let name = MachineName::new("vm").unwrap();
        let jobs = Jobs::new(publisher.clone());
        jobs.begin(Kind::Migrate, &name).unwrap()
    }

    impl UnderWay for Core {
        async fn outcome(&self) -> Result<Outcome, Error> {
            let result = tokio::select! {
                () = self.cancelled.notified() => Verdict::Kept,
                () = sleep(COPYING + STANDING) => Verdict::Moved,
            };
            Ok(Outcome {
                result,
                reason: None,
                report: Default::default(),
            })
        }

        async fn progress(&self) -> Option<Progress> {
            let copies = self.begin.elapsed() < COPYING;
            Some(Progress {
                phase: if copies { "copying" } else { "switchover" }.into(),
                sent_bytes: self.looks.fetch_add(1, Ordering::Relaxed),
                ..Progress::default()
            })
        }

        async fn limit(&self, _: u64) -> bool {
            true
        }

        async fn cancel(&self) {
            self.cancelled.notify_one();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn progress_is_told_four_times_a_second_and_nothing_in_the_blackout() {
        let (publisher, mut changes) = publish::channel();
        let (job, core) = (job(&publisher), Core::new());
        let watched = watch(&core, &job, &publisher);
        tokio::pin!(watched);
        let mut told = || std::iter::from_fn(|| changes.try_recv().ok()).count();
        for _ in 0..COPYING.as_secs() {
            timeout(Duration::from_millis(999), &mut watched)
                .await
                .unwrap_err();
            assert_eq!(told(), 4);
            sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(watched.await.unwrap().result, Verdict::Moved);
        assert_eq!(told(), 0);
        assert_eq!(core.begin.elapsed(), COPYING + STANDING);
        assert_eq!(core.looks.load(Ordering::Relaxed), 4 * 15);
        assert_eq!(job.record().phase, "switchover");
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_that_is_cancelled_cancels_it_once() {
        let (publisher, _changes) = publish::channel();
        let (job, core) = (job(&publisher), Core::new());
        job.cancel().unwrap();
        let outcome = watch(&core, &job, &publisher).await.unwrap();
        assert_eq!(outcome.result, Verdict::Kept);
        assert_eq!(core.begin.elapsed(), Duration::ZERO);
    }
}
