//! Machines that are, or may be, at another host: what the other broker says of them, what a person
//! decides, and that they are not started here as well.

use std::sync::Arc;
use std::time::Duration;

use api::Error;

use super::departure::Departure;
use super::mover::Mover;
use crate::broker::Broker;
use crate::machine::Machine;

/// How long a machine may take to be gone when it is known to be elsewhere.
const GONE_DEADLINE: Duration = Duration::from_secs(30);
/// How soon the other broker is asked again what became of a machine, and how rarely at last.
const FIRST_AGAIN: Duration = Duration::from_secs(1);
const LAST_AGAIN: Duration = Duration::from_secs(30);

impl Broker {
    /// Says where a machine is after a migration whose end nobody heard of.
    ///
    /// # Errors
    /// It is where everybody knows.
    pub(crate) async fn decide(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        runs_there: bool,
    ) -> Result<(), Error> {
        let mover = Mover::of(&machine.core("decided about")?).await?;
        mover.0.decide(runs_there).await?;
        machine.set_reason(String::new());
        if !runs_there {
            machine.set_away(false);
            Departure::forget(&self.host, machine.name());
            return Ok(());
        }
        let departure = Departure::moved(&self.host, machine);
        tokio::time::timeout(GONE_DEADLINE, machine.gone())
            .await
            .map_err(|_| Error::TimedOut(format!("{} does not end", machine.name())))?;
        match machine.from_file {
            true => machine.set_reason(departure.advice(machine.name())),
            false if machine.transient => {}
            false => self.remove(machine).await?,
        }
        Ok(())
    }

    /// Asks the other broker what became of a machine that is paused here and may run there, until
    /// it says so or somebody decides.
    pub(crate) fn resolve(self: &Arc<Self>, machine: &Arc<Machine>) {
        let (broker, machine) = (Arc::clone(self), Arc::clone(machine));
        tokio::spawn(async move {
            machine.released().await;
            let mut again = FIRST_AGAIN;
            while machine.is_away() && machine.core("asked").is_ok() {
                let Some(departure) = Departure::of(&broker.host, machine.name()) else {
                    return;
                };
                if let Some(came) = departure.has_come(&broker.host).await {
                    tracing::info!(machine = %machine.name(), came, "its destination has said where it is");
                    if let Err(error) = broker.decide(&machine, came).await {
                        tracing::warn!(machine = %machine.name(), %error, "it stays undecided");
                    }
                    return;
                }
                tokio::time::sleep(again).await;
                again = (again * 2).min(LAST_AGAIN);
            }
        });
    }

    /// Refuses to start a machine that is, or may be, at another host.
    ///
    /// # Errors
    /// It is or may be, and it is not to be done by `force`.
    pub(crate) async fn must_not_be_elsewhere(
        &self,
        machine: &Machine,
        force: bool,
    ) -> Result<(), Error> {
        let (host, name) = (&self.host, machine.name());
        let Some(mut departure) = Departure::of(host, name) else {
            return Ok(());
        };
        let came = match departure.moved || force {
            true => None,
            // Its processes here ended before its end was heard.
            false => departure.has_come(host).await,
        };
        if force || came == Some(false) {
            Departure::forget(host, name);
            return Ok(());
        }
        if came == Some(true) {
            departure = Departure::moved(host, machine);
        }
        let advice = departure.advice(name);
        machine.set_reason(advice.clone());
        Err(Error::InvalidState(advice))
    }
}
