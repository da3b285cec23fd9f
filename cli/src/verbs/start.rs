//! `godwit start`: machines that are off.

use api::machine::{FORCE, PAUSED};

use super::each;
use crate::connection::{Broker, Machine};
use crate::error::{Result, What as _};
use crate::job::Job;
use crate::options::{Start, Wait};
use crate::render::Output;
use crate::view;

pub async fn run(broker: &Broker, output: Output, start: Start) -> Result<()> {
    let jobs = each(&start.names.names, async |name| {
        let machine = broker.machine(name).await?;
        let state = machine.state().await?;
        // So that it can be said again.
        if matches!(state.as_str(), "running" | "paused") {
            return Ok(None);
        }
        let flags = if start.force { FORCE } else { 0 };
        let flags = if start.paused { flags | PAUSED } else { flags };
        start_one(broker, &machine, flags, start.wait)
            .await
            .map(Some)
    })
    .await;
    print(output, &jobs.done)?;
    jobs.result()
}

/// Starts a machine; its job as it is at the end, or now if nobody waits.
pub async fn start_one(
    broker: &Broker,
    machine: &Machine,
    flags: u64,
    wait: Wait,
) -> Result<view::Job> {
    let path = machine.proxy.start(flags).await.what(&machine.name)?;
    let what = format!("start of {}", machine.name);
    wait_for(&Job::at(broker, &what, path).await?, wait).await
}

/// Waits for a job, or not.
pub async fn wait_for(job: &Job, wait: Wait) -> Result<view::Job> {
    if wait.no_wait {
        job.look().await
    } else {
        job.wait(wait).await
    }
}

/// Prints the jobs of those with which something had to be done.
pub fn print(output: Output, jobs: &[Option<view::Job>]) -> Result<()> {
    output.print_json(&jobs.iter().flatten().collect::<Vec<_>>())
}
