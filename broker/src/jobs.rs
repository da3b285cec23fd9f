//! Long operations, as objects that can be watched, cancelled, and read afterwards.
//!
//! ```text
//! running ─► done | failed | cancelled ─► forgotten after KEPT
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use api::job::{Facts, RESULT_ERROR, RESULT_MESSAGE, State};
use api::job_migration::{RESULT_DOWNTIME, RESULT_PLACE};
use api::{Dictionary, Error};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use zbus::{DBusError as _, OwnedVariant, Str};

use crate::migration::record::{Progress, Record as Migration};
use crate::name::MachineName;
use crate::publish::{Change, Publisher};

/// How long a job can be read after its end.
pub const KEPT: Duration = Duration::from_secs(300);
/// Most jobs that are kept.
const MAX_JOBS: usize = 4096;
/// Shortest time between two words on the progress of a phase.
const TELL_INTERVAL: Duration = Duration::from_millis(250);

/// What a job does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Start a machine.
    Start,
    /// Wait for a guest to switch itself off.
    PowerOff,
    /// End a machine.
    Terminate,
    /// Replace the process of a device.
    RestartDevice,
    /// Move a machine.
    Migrate,
    /// Take in a machine that comes from another broker.
    Receive,
    /// Write a machine into files.
    Snapshot,
    /// Make a machine of files.
    Restore,
}

impl Kind {
    /// Its word on the bus.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::PowerOff => "power-off",
            Self::Terminate => "terminate",
            Self::RestartDevice => "restart-device",
            Self::Migrate => "migrate",
            Self::Receive => "receive",
            Self::Snapshot => "snapshot",
            Self::Restore => "restore",
        }
    }

    fn is_cancellable(&self) -> bool {
        !matches!(self, Self::Terminate | Self::RestartDevice)
    }
}

/// What of a job outlives the broker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Its number.
    pub id: u32,
    /// What it does.
    pub kind: Kind,
    /// Its machine.
    pub machine: MachineName,
    /// How far it is.
    pub state: State,
    /// What it does now.
    pub phase: String,
    /// How much of it is done, from 0 to 1.
    #[serde(default)]
    pub progress: f64,
    /// D-Bus name of its error.
    pub error: Option<String>,
    /// One sentence for a person.
    pub message: Option<String>,
    /// When it ended, seconds since 1970.
    pub ended: Option<u64>,
    /// How its machine moves.
    #[serde(default)]
    pub(crate) migration: Option<Migration>,
}

/// One job.
#[derive(Debug)]
pub struct Job {
    record: Mutex<Record>,
    publisher: Publisher,
    /// When the bus was told last how far it is.
    told: Mutex<Option<Instant>>,
    cancelled: watch::Sender<bool>,
    finished: watch::Sender<bool>,
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |time| time.as_secs())
}

impl Job {
    fn new(record: Record, publisher: Publisher) -> Arc<Self> {
        let finished = record.state != State::Running;
        Arc::new(Self {
            record: Mutex::new(record),
            publisher,
            told: Mutex::default(),
            cancelled: watch::Sender::new(false),
            finished: watch::Sender::new(finished),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is now.
    pub fn record(&self) -> Record {
        self.lock().clone()
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.lock().id
    }

    /// What the bus shows.
    pub fn facts(&self) -> Facts {
        let record = self.record();
        let running = record.state == State::Running;
        let text = |text: String| OwnedVariant::from(Str::from(text));
        let result = [
            (RESULT_ERROR, record.error),
            (RESULT_MESSAGE, record.message),
        ];
        let mut result: Dictionary = result
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), text(value?))))
            .collect();
        let migration = record.migration;
        if let Some(migration) = migration.as_ref().filter(|_| !running) {
            result.insert(RESULT_PLACE.into(), migration.place.into());
            let downtime = migration.facts().downtime_usec;
            result.insert(RESULT_DOWNTIME.into(), downtime.into());
        }
        Facts {
            id: record.id,
            cancellable: running && record.kind.is_cancellable() && !*self.cancelled.borrow(),
            kind: record.kind.as_str().into(),
            machine: record.machine.to_string(),
            state: record.state,
            phase: record.phase,
            progress: match (running, migration) {
                (false, _) => 1.0,
                (true, Some(migration)) => migration.progress.share(),
                (true, None) => record.progress,
            },
            result,
        }
    }

    /// Says what it does now, and how much of it is done, from 0 to 1. The bus is told of
    /// another phase at once, and of progress within one four times a second.
    pub fn set_phase(&self, phase: &str, progress: f64) {
        let id = {
            let record = &mut *self.lock();
            let same = record.phase == phase;
            record.phase = phase.into();
            record.progress = progress.clamp(0.0, 1.0);
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            if same && told.is_some_and(|at| at.elapsed() < TELL_INTERVAL) {
                return;
            }
            *told = Some(Instant::now());
            record.id
        };
        self.publisher.send(Change::Job(id));
    }

    /// Changes what it knows of its migration, which it then has.
    pub(crate) fn migration(&self, change: impl FnOnce(&mut Migration)) {
        change(self.lock().migration.get_or_insert_default());
    }

    /// Notes how far its migration is; whether that is news.
    pub(crate) fn note_progress(&self, progress: Progress) -> bool {
        let record = &mut *self.lock();
        record.phase = progress.phase.clone();
        if record.kind != Kind::Migrate {
            let before = std::mem::replace(&mut record.progress, progress.share());
            return before < record.progress;
        }
        let migration = record.migration.get_or_insert_default();
        let news = migration.progress != progress;
        migration.progress = progress;
        news
    }

    /// Changes the longest stop that is wanted of the machine that it moves, which tells the core by
    /// and by.
    ///
    /// # Errors
    /// It moves none away, or does not any more; or that is too long.
    pub(crate) fn set_max_downtime(&self, usec: u64) -> Result<(), Error> {
        let record = &mut *self.lock();
        let id = record.id;
        if record.state != State::Running {
            return Err(Error::InvalidState(format!("job {id} has ended")));
        }
        match &mut record.migration {
            Some(migration) if record.kind == Kind::Migrate => {
                migration.options.set_max_downtime(usec)
            }
            _ => Err(Error::InvalidState(format!(
                "job {id} moves no machine away: its stop is up to who does"
            ))),
        }
    }

    /// The longest stop that is wanted of the machine that it moves, in microseconds.
    pub(crate) fn max_downtime(&self) -> Option<u64> {
        let record = self.lock();
        Some(record.migration.as_ref()?.options.max_downtime_usec)
    }

    /// Asks it to end early.
    ///
    /// # Errors
    /// It has ended, or cannot be cancelled.
    pub fn cancel(&self) -> Result<(), Error> {
        let record = self.record();
        if record.state != State::Running {
            return Err(Error::InvalidState(format!("job {} has ended", record.id)));
        }
        if !record.kind.is_cancellable() {
            let kind = record.kind.as_str();
            return Err(Error::InvalidState(format!(
                "job {} cannot be cancelled: {kind} goes to its end",
                record.id
            )));
        }
        self.cancelled.send_replace(true);
        Ok(())
    }

    /// Whether it is to end early.
    pub(crate) fn is_cancelled(&self) -> bool {
        *self.cancelled.borrow()
    }

    /// Waits until it is to end early; for ever if nobody wants that.
    pub async fn cancelled(&self) {
        let mut cancelled = self.cancelled.subscribe();
        // The sender lives as long as this job.
        let _ = cancelled.wait_for(|cancelled| *cancelled).await;
    }

    /// Waits for its end.
    pub async fn finished(&self) {
        let mut finished = self.finished.subscribe();
        // The sender lives as long as this job.
        let _ = finished.wait_for(|finished| *finished).await;
    }

    /// Notes its end.
    pub(crate) fn finish(&self, result: &Result<(), Error>) {
        {
            let record = &mut *self.lock();
            record.ended = Some(now());
            record.phase = String::new();
            match result {
                Ok(()) => record.state = State::Done,
                Err(error) => {
                    record.state = match error {
                        Error::Cancelled(_) => State::Cancelled,
                        _ => State::Failed,
                    };
                    record.error = Some(error.name().to_string());
                    record.message = Some(error.to_string());
                }
            }
        }
        self.finished.send_replace(true);
    }

    /// How long it is still kept; `None` while it works.
    pub(crate) fn kept_for(&self) -> Option<Duration> {
        let ended = self.lock().ended?;
        let age = Duration::from_secs(now().saturating_sub(ended));
        Some(KEPT.saturating_sub(age))
    }
}

/// All jobs that are known.
#[derive(Debug)]
pub struct Jobs {
    table: Mutex<Table>,
    publisher: Publisher,
}

#[derive(Debug, Default)]
struct Table {
    last: u32,
    jobs: BTreeMap<u32, Arc<Job>>,
}

impl Jobs {
    /// None yet.
    pub fn new(publisher: Publisher) -> Self {
        Self {
            table: Mutex::default(),
            publisher,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins one.
    ///
    /// # Errors
    /// There are too many.
    pub(crate) fn begin(&self, kind: Kind, machine: &MachineName) -> Result<Arc<Job>, Error> {
        let table = &mut *self.lock();
        if table.jobs.len() >= MAX_JOBS {
            return Err(Error::LimitsExceeded(format!(
                "{MAX_JOBS} jobs are kept already: try again in {} minutes",
                KEPT.as_secs() / 60
            )));
        }
        table.last = table.last.wrapping_add(1).max(1);
        let record = Record {
            id: table.last,
            kind,
            machine: machine.clone(),
            state: State::Running,
            phase: String::new(),
            progress: 0.0,
            error: None,
            message: None,
            ended: None,
            migration: None,
        };
        let job = Job::new(record, self.publisher.clone());
        table.jobs.insert(table.last, Arc::clone(&job));
        Ok(job)
    }

    /// Takes over one of a broker before this one.
    pub(crate) fn restore(&self, record: Record) -> Arc<Job> {
        let table = &mut *self.lock();
        table.last = table.last.max(record.id);
        let id = record.id;
        let job = Job::new(record, self.publisher.clone());
        table.jobs.insert(id, Arc::clone(&job));
        job
    }

    /// The one of this number.
    ///
    /// # Errors
    /// There is none, or not any more.
    pub fn get(&self, id: u32) -> Result<Arc<Job>, Error> {
        let known = self.lock().jobs.get(&id).cloned();
        known.ok_or_else(|| {
            Error::NoSuchJob(format!("there is no job {id}: jobs are kept for 5 minutes"))
        })
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Job>> {
        self.lock().jobs.values().cloned().collect()
    }

    pub(crate) fn forget(&self, id: u32) {
        self.lock().jobs.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish;

    #[tokio::test]
    async fn a_job_ends_once_and_says_how() {
        let (publisher, mut changes) = publish::channel();
        let jobs = Jobs::new(publisher);
        let name = MachineName::new("vm").unwrap();
        let job = jobs.begin(Kind::Start, &name).unwrap();
        assert!(job.facts().cancellable);
        assert_eq!(job.kept_for(), None);
        for step in 0..100 {
            job.set_phase("working", f64::from(step) / 100.0);
        }
        assert!(job.facts().progress > 0.9);
        job.set_phase("ending", 7.0);
        assert!((job.facts().progress - 1.0).abs() < f64::EPSILON);
        // A hundred steps are told as few, and the new phase in any case.
        let told = std::iter::from_fn(|| changes.try_recv().ok()).count();
        assert!((2..50).contains(&told), "told {told} times");
        job.cancel().unwrap();
        job.cancelled().await;
        job.finish(&Err(Error::Cancelled("enough".into())));
        job.finished().await;
        let facts = job.facts();
        assert_eq!(facts.state, State::Cancelled);
        assert_eq!(
            facts.result[RESULT_ERROR].downcast_ref::<&str>().unwrap(),
            "org.godwit.Vmm1.Error.Cancelled"
        );
        assert!(job.kept_for().unwrap() > KEPT / 2);
        assert!(matches!(job.cancel(), Err(Error::InvalidState(_))));
        let again = jobs.restore(job.record());
        assert_eq!(again.facts().state, State::Cancelled);
        let next = jobs.begin(Kind::Terminate, &name).unwrap();
        assert!(next.id() > job.id());
        assert!(next.cancel().is_err());
    }

    #[test]
    fn there_is_an_end_to_jobs() {
        let jobs = Jobs::new(publish::channel().0);
        let name = MachineName::new("vm").unwrap();
        for _ in 0..MAX_JOBS {
            jobs.begin(Kind::Start, &name).unwrap();
        }
        assert!(matches!(
            jobs.begin(Kind::Start, &name),
            Err(Error::LimitsExceeded(_))
        ));
    }
}
