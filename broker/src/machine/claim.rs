//! Who works on a machine: one job at a time.
//!
//! ```text
//! free ─ claim ─► a job works on it ─ release ─► free
//! ```
//! A job claims it before anything is done, and lets go of it after its own end is noted.

use std::sync::Arc;

use api::Error;

use super::Machine;
use crate::jobs::Job;

impl Machine {
    /// The job that works on it.
    pub fn job(&self) -> Option<Arc<Job>> {
        self.lock().job.clone()
    }

    /// Makes `job` the one that works on it.
    ///
    /// # Errors
    /// Another does.
    pub(crate) fn claim(&self, job: &Arc<Job>) -> Result<(), Error> {
        self.update(|inner| match &inner.job {
            Some(other) => {
                let record = other.record();
                Err(Error::JobInProgress(format!(
                    "job {} ({}) works on {}: wait for its end, or cancel it",
                    record.id,
                    record.kind.as_str(),
                    self.name
                )))
            }
            None => {
                inner.job = Some(Arc::clone(job));
                self.busy.send_replace(true);
                Ok(())
            }
        })
    }

    /// Takes note that `job` works on it no more.
    pub(crate) fn release(&self, job: &Arc<Job>) {
        self.update(|inner| {
            if inner
                .job
                .as_ref()
                .is_some_and(|mine| Arc::ptr_eq(mine, job))
            {
                inner.job = None;
                self.busy.send_replace(false);
            }
        });
    }

    /// Waits until no job works on it.
    pub(crate) async fn released(&self) {
        let mut busy = self.busy.subscribe();
        // The sender lives as long as this machine.
        let _ = busy.wait_for(|busy| !*busy).await;
    }
}
