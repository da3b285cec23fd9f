//! Jobs of machines, from their begin until they are forgotten.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use api::machine::State;
use api::{Error, path};
use zbus::OwnedObjectPath;

use super::Broker;
use crate::folder;
use crate::jobs::{Job, Kind, Record};
use crate::machine::Machine;
use crate::publish::Change;

impl Broker {
    fn job_path(&self, id: u32) -> PathBuf {
        self.host.folder.join("jobs").join(format!("{id}.json"))
    }

    pub(crate) fn save_job(&self, job: &Job) {
        if let Err(error) = folder::save(&self.job_path(job.id()), &job.record()) {
            tracing::warn!(job = job.id(), %error, "another broker would not know this job");
        }
    }

    /// Begins a job on a machine.
    pub(crate) async fn begin<W>(
        self: &Arc<Self>,
        kind: Kind,
        machine: &Arc<Machine>,
        work: impl FnOnce(Arc<Self>, Arc<Machine>, Arc<Job>) -> W,
    ) -> Result<OwnedObjectPath, Error>
    where
        W: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let job = self.jobs.begin(kind, machine.name())?;
        if let Err(error) = machine.claim(&job) {
            self.jobs.forget(job.id());
            return Err(error);
        }
        let id = job.id();
        let work = work(Arc::clone(self), Arc::clone(machine), Arc::clone(&job));
        self.publish_job(&job).await;
        self.carry_out(machine, job, work);
        Ok(path::job(id))
    }

    /// Writes down and tells that there is a job.
    pub(crate) async fn publish_job(&self, job: &Job) {
        let id = job.id();
        self.save_job(job);
        self.host
            .publisher
            .tell(|done| Change::JobNew(id, done))
            .await;
    }

    pub(super) fn carry_out(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        job: Arc<Job>,
        work: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) {
        let (broker, machine) = (Arc::clone(self), Arc::clone(machine));
        tokio::spawn(async move {
            let result = work.await;
            broker.end_job(job, Some(machine), result).await;
        });
    }

    /// Notes how a job ended, and forgets the machine with it if that is how it is meant.
    pub(crate) async fn end_job(
        self: Arc<Self>,
        job: Arc<Job>,
        machine: Option<Arc<Machine>>,
        result: Result<(), Error>,
    ) {
        job.finish(&result);
        if let Some(machine) = &machine {
            machine.release(&job);
        }
        let record = job.record();
        self.host
            .metrics
            .job_ended(record.kind.as_str(), record.state.as_str());
        self.save_job(&job);
        self.host.publisher.send(Change::JobEnded(record.id));
        if let (Some(machine), Err(Error::Undecided(_))) = (&machine, &result) {
            self.resolve(machine);
        }
        if let Some(machine) = machine
            && is_over(&machine, &record, result.is_ok())
            && let Err(error) = self.remove(&machine).await
        {
            tracing::warn!(machine = %machine.name(), %error, "it is not forgotten");
        }
        self.forget_later(job).await;
    }

    pub(super) async fn forget_later(self: Arc<Self>, job: Arc<Job>) {
        tokio::time::sleep(job.kept_for().unwrap_or_default()).await;
        let id = job.id();
        self.jobs.forget(id);
        folder::remove_file(&self.job_path(id));
        self.host.publisher.send(Change::JobForgotten(id));
    }
}

/// Whether a machine is not here any more, or never was, now that a job has ended.
fn is_over(machine: &Machine, job: &Record, is_ok: bool) -> bool {
    match job.kind {
        Kind::Start => !is_ok && machine.transient,
        Kind::Receive | Kind::Restore => !is_ok && machine.is_new(),
        // One that a file declares stays, and is off.
        Kind::Migrate => {
            is_ok && !machine.transient && !machine.from_file && machine.state() == State::Off
        }
        _ => false,
    }
}
