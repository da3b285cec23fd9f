//! `org.godwit.Vmm1.Job` and `org.godwit.Vmm1.Job.Migration`.

use std::sync::Arc;

use api::job::{Facts, OneJob};
use api::job_migration::{self, OneMigration};
use api::{Caller, Error};

use crate::broker::Broker;
use crate::jobs::Job;
use crate::policy::Action;
use crate::publish::Change;

/// A job.
#[derive(Debug)]
pub struct JobObject {
    broker: Arc<Broker>,
    job: Arc<Job>,
}

impl JobObject {
    pub(super) fn new(broker: &Arc<Broker>, job: &Arc<Job>) -> Self {
        Self {
            broker: Arc::clone(broker),
            job: Arc::clone(job),
        }
    }
}

impl OneJob for JobObject {
    async fn cancel(&self, caller: Caller) -> Result<(), Error> {
        let record = self.job.record();
        let machine = record.machine.as_str();
        self.broker
            .permit(&caller, Action::Manage, machine, "cancel")
            .await?;
        self.job.cancel()?;
        self.broker.host.publisher.send(Change::Job(record.id));
        Ok(())
    }

    fn facts(&self) -> Facts {
        self.job.facts()
    }
}

/// A migration, beside its job.
#[derive(Debug)]
pub struct MigrationObject(JobObject);

impl MigrationObject {
    pub(super) fn new(broker: &Arc<Broker>, job: &Arc<Job>) -> Self {
        Self(JobObject::new(broker, job))
    }
}

impl OneMigration for MigrationObject {
    fn facts(&self) -> job_migration::Facts {
        let record = self.0.job.record();
        record.migration.unwrap_or_default().facts()
    }

    async fn set_max_downtime(&self, caller: Caller, usec: u64) -> Result<(), Error> {
        let JobObject { broker, job } = &self.0;
        let record = job.record();
        let machine = record.machine.as_str();
        broker
            .permit(&caller, Action::Migrate, machine, "set-max-downtime")
            .await?;
        job.set_max_downtime(usec)?;
        broker.host.publisher.send(Change::Job(record.id));
        Ok(())
    }
}
