//! A machine that comes to processes which wait for it.

use std::sync::Arc;
use std::time::Duration;

use api::Error;

use super::arrivals::Fate;
use super::departure::Departure;
use super::mover::Mover;
use super::record::Verdict;
use crate::host::Host;
use crate::jobs::Job;
use crate::machine::{Instance, Machine, start};
use crate::name::MachineName;

/// How long a core whose connection is lost is left alone before the next attempt.
const AGAIN: Duration = Duration::from_secs(1);

/// Waits until the machine has come to `instance`. The core has a deadline for each step of it. One
/// that lives and cannot be asked may have the machine, and is waited for.
///
/// # Errors
/// It has not and never will; why, in one sentence.
pub(crate) async fn wait(
    host: &Host,
    name: &MachineName,
    instance: &mut Instance,
) -> Result<(), String> {
    let ended = loop {
        let outcome = async {
            let mover = Mover::of(instance.core()).await?;
            mover.outcome().await
        };
        let outcome = tokio::select! {
            outcome = outcome => outcome,
            _ = instance.ended() => break String::new(),
        };
        match outcome {
            Ok(outcome) if outcome.result == Verdict::Arrived => return Ok(()),
            Ok(outcome) => break format!("its core says {:?}", outcome.result),
            Err(Error::ZBus(error)) => {
                let again = async {
                    tokio::time::sleep(AGAIN).await;
                    instance.reach_again().await
                };
                let again = tokio::select! {
                    again = again => again,
                    _ = instance.ended() => break error.to_string(),
                };
                match again {
                    Ok(core) => instance.set_core(core),
                    Err(error) => {
                        tracing::warn!(machine = %name, %error, "its core does not answer")
                    }
                }
            }
            Err(error) => break error.to_string(),
        }
    };
    // A core that has failed ends.
    match tokio::time::timeout(super::END_DEADLINE, instance.ended()).await {
        Ok(_) => Err(instance.why_not(host, name).await),
        Err(_) => Err(ended),
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
    mut instance: Instance,
    resumed: bool,
) -> Result<(), Error> {
    job.set_phase("receiving", 0.0);
    let (core, place) = (instance.core().clone(), instance.place().to_owned());
    let cancelled = async {
        job.cancelled().await;
        let cancelled = match Mover::of(&core).await {
            Ok(mover) => mover.0.cancel().await,
            Err(error) => Err(error),
        };
        match cancelled {
            Err(Error::ZBus(error)) if Fate::forestall(&place) == Fate::Never => {
                format!("its core does not answer: {error}")
            }
            // It says what comes of it; too late for a machine that is here already.
            _ => std::future::pending().await,
        }
    };
    let arrived = tokio::select! {
        arrived = wait(host, machine.name(), &mut instance) => arrived,
        why = cancelled => Err(why),
    };
    let arrivals = &host.arrivals;
    if let Err(why) = arrived {
        arrivals.settle(machine.name(), instance.discard(host).await);
        return Err(match job.is_cancelled() {
            true => Error::Cancelled(why),
            false => Error::MigrationFailed(why),
        });
    }
    Departure::forget(host, machine.name());
    let core = instance.core().clone();
    let begun = start::run(host, machine, instance, !resumed).await;
    // Whether it ran where it came from is its core's to say.
    if begun.is_ok()
        && let Ok(state) = core.state().await
    {
        machine.set_running_state(state);
    }
    // Who sent it hears it now, and finds it running.
    arrivals.settle(machine.name(), Fate::Came);
    begun
}
