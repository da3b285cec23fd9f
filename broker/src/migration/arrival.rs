//! A machine that comes to processes which wait for it.

use std::sync::Arc;

use api::Error;

use super::mover::Mover;
use super::record::Verdict;
use crate::host::Host;
use crate::jobs::Job;
use crate::machine::{Instance, Machine, start};
use crate::name::MachineName;

/// Waits until the machine has come to `instance`. The core has a deadline for each step of it.
///
/// # Errors
/// It has not and never will; why, in one sentence.
pub(crate) async fn wait(
    host: &Host,
    name: &MachineName,
    instance: &Instance,
) -> Result<(), String> {
    let arrived = async {
        let mover = Mover::of(instance.core()).await?;
        mover.outcome().await
    };
    let lost = tokio::select! {
        outcome = arrived => match outcome {
            Ok(outcome) if outcome.result == Verdict::Arrived => return Ok(()),
            Ok(outcome) => format!("its core says {:?}", outcome.result),
            Err(error) => error.to_string(),
        },
        _ = instance.ended() => String::new(),
    };
    // A core that says nothing more ends, or is ended.
    match tokio::time::timeout(super::END_DEADLINE, instance.ended()).await {
        Ok(_) => Err(instance.why_not(host, name).await),
        Err(_) => Err(lost),
    }
}

/// Waits for a machine that another broker sends or that is in files, and makes it one that runs
/// here. With `resumed` it is let run whatever it did before.
///
/// # Errors
/// It did not come; nothing of it is left.
pub(crate) async fn take_in(
    host: &Arc<Host>,
    machine: &Arc<Machine>,
    job: &Arc<Job>,
    instance: Instance,
    resumed: bool,
) -> Result<(), Error> {
    job.set_phase("receiving", 0.0);
    let cancelled = async {
        job.cancelled().await;
        if let Ok(mover) = Mover::of(instance.core()).await {
            // Too late for a machine that is here already.
            let _ = mover.0.cancel().await;
        }
        std::future::pending().await
    };
    let arrived = tokio::select! {
        arrived = wait(host, machine.name(), &instance) => arrived,
        never = cancelled => never,
    };
    if let Err(why) = arrived {
        instance.discard(host).await;
        return Err(match job.is_cancelled() {
            true => Error::Cancelled(why),
            false => Error::MigrationFailed(why),
        });
    }
    let core = instance.core().clone();
    start::run(host, machine, instance, !resumed).await?;
    // Whether it ran where it came from is its core's to say.
    machine.set_running_state(core.state().await?);
    Ok(())
}
