//! `org.godwit.Vmm1.Job`.

use std::sync::Arc;

use api::job::{Facts, OneJob};
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
