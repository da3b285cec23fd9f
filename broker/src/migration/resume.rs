//! What a broker does that was started in the middle of a migration: it asks the cores how it
//! ended, as the one before would have.

use std::path::PathBuf;
use std::sync::Arc;

use api::Error;
use api::machine::State;

use super::Uri;
use super::arrival;
use super::arrivals::Fate;
use super::departure::Departure;
use super::mover::Mover;
use super::record::{Outcome, Verdict};
use super::source::{Leaving, undecided};
use crate::broker::Broker;
use crate::folder::{self, remove_file};
use crate::jobs::{Job, Kind};
use crate::machine::adopt::clean;
use crate::machine::{Instance, Machine, MachineState};
use crate::name::MachineName;

/// Processes that wait for a machine, or have it already.
#[derive(Debug)]
pub(crate) struct Pending {
    state: MachineState,
    instance: Instance,
    arrived: bool,
}

impl Broker {
    /// Finds processes that wait for a machine, and ends what is left of others.
    pub(crate) async fn find_pending(self: &Arc<Self>) -> Vec<(MachineName, Pending)> {
        let mut pending = Vec::new();
        for place in folder::list(&self.host.folder.join("incoming")) {
            let name = place.file_name().unwrap_or_default().to_string_lossy();
            let Ok(name) = MachineName::new(&name) else {
                continue;
            };
            let Ok(state) = MachineState::load(&place) else {
                let fate = clean(&self.host, &place, None).await;
                self.host.arrivals.settle(&name, fate);
                continue;
            };
            let instance = Instance::adopt(&self.host, &name, None, place.clone(), &state).await;
            match instance {
                Ok(instance) => {
                    let arrived = folder::has_arrived(&place) || has_arrived(&instance).await;
                    let found = Pending {
                        state,
                        instance,
                        arrived,
                    };
                    pending.push((name, found));
                }
                Err(error) => {
                    tracing::info!(machine = %name, %error, "its core cannot be asked");
                    match Fate::forestall(&place) {
                        // Whether it has ended, or answers yet, is seen when it is taken over.
                        Fate::Came => self.hand_over(&name, place, state).await,
                        never => {
                            clean(&self.host, &place, Some(&state)).await;
                            self.host.arrivals.settle(&name, never);
                        }
                    }
                }
            }
        }
        for place in folder::list(&self.host.folder.join("machines")) {
            let name = place.file_name().unwrap_or_default().to_string_lossy();
            if let Ok(name) = MachineName::new(&name)
                && folder::has_arrived(&place)
            {
                self.host.arrivals.settle(&name, Fate::Came);
            }
        }
        let is_left = |name: &MachineName| pending.iter().any(|(left, _)| left == name);
        self.host.arrivals.forget_lost(is_left);
        pending
    }

    /// Makes processes the machine that they have. What is left of those that had it is ended.
    pub(crate) async fn settle(&self, name: &MachineName, pending: Pending) -> Option<Pending> {
        if !pending.arrived {
            return Some(pending);
        }
        let place = pending.instance.place().to_owned();
        self.hand_over(name, place, pending.state).await;
        None
    }

    /// Makes the folder of processes that have a machine that of the machine, which is taken over
    /// from there next.
    async fn hand_over(&self, name: &MachineName, mut place: PathBuf, mut state: MachineState) {
        self.host.arrivals.settle(name, Fate::Came);
        Departure::forget(&self.host, name);
        let own = self.host.folder.machine(name);
        if let Ok(former) = MachineState::load(&own) {
            clean(&self.host, &own, Some(&former)).await;
        }
        state.complete = true;
        if let Err(error) = self.keep(name, &state.definition, state.transient) {
            tracing::error!(machine = %name, %error, "another broker would not know it when it is off");
        }
        if let Err(error) = state.save(&place) {
            tracing::error!(machine = %name, %error, "a machine that arrived is lost sight of");
        }
        self.host.folder.settle(&mut place, name);
    }

    /// Goes on with the job of a machine that moves, or comes.
    pub(crate) async fn go_on(
        self: Arc<Self>,
        job: Arc<Job>,
        machine: Arc<Machine>,
        pending: Option<Pending>,
    ) -> Result<(), Error> {
        let record = job.record();
        let migration = record.migration.unwrap_or_default();
        match (record.kind, pending) {
            (Kind::Migrate, pending) => {
                let local = migration.uri.parse() == Ok(Uri::Local);
                let leaving = Leaving {
                    host: Arc::clone(&self.host),
                    machine: Arc::clone(&machine),
                    job: Arc::clone(&job),
                };
                machine.answers().await;
                let Ok(core) = machine.core("moved") else {
                    return leaving.end_unwatched().await;
                };
                let mover = Mover::of(&core).await?;
                match pending {
                    Some(pending) => leaving.end_local(&mover, pending.instance).await,
                    None if local && has_arrived_at(&mover).await => {
                        job.migration(|migration| {
                            migration.place = api::job_migration::Place::Destination;
                        });
                        Ok(())
                    }
                    None => leaving.end_remote(&mover).await,
                }
            }
            (_, Some(pending)) => {
                let result =
                    arrival::take_in(&self.host, &machine, &job, pending.instance, false).await;
                self.received(&machine, &result);
                result
            }
            (_, None) if matches!(machine.state(), State::Running | State::Paused) => Ok(()),
            (_, None) => Err(Error::MigrationFailed(format!(
                "{} did not arrive before the broker ended",
                machine.name()
            ))),
        }
    }

    /// Makes the machines that are still on their way here known, each with its job.
    pub(crate) async fn await_pending(self: &Arc<Self>, pending: Vec<(MachineName, Pending)>) {
        for (name, found) in pending {
            if self.machine(name.as_str()).is_err() {
                let definition = found.state.definition.clone();
                match self.insert(name.clone(), definition, found.state.transient, false) {
                    Ok(machine) => {
                        machine.set_new(true);
                        machine.starts();
                    }
                    Err(error) => {
                        tracing::error!(machine = %name, %error, "it cannot be awaited");
                        let fate = found.instance.discard(&self.host).await;
                        self.host.arrivals.settle(&name, fate);
                        continue;
                    }
                }
            }
            self.pending().insert(name, found);
        }
    }

    /// Ends what waits for machines of which no job is left, and says what became of those whose
    /// migration nobody heard the end of.
    pub(crate) async fn end_pending(self: &Arc<Self>) {
        let left = std::mem::take(&mut *self.pending());
        for (name, found) in left {
            if found.instance.forestall() == Fate::Came {
                let place = found.instance.place().to_owned();
                self.hand_over(&name, place, found.state).await;
                self.take_over(name).await;
                continue;
            }
            tracing::warn!(machine = %name, "no job is left that awaits it");
            let fate = found.instance.discard(&self.host).await;
            self.host.arrivals.settle(&name, fate);
            if let Ok(machine) = self.machine(name.as_str())
                && machine.is_new()
            {
                machine.did_not_start(&Error::Cancelled("nobody awaits it".into()));
                self.drop_machine(&name);
                remove_file(&self.defined_path(&name));
            }
        }
        for machine in self.machines() {
            if machine.job().is_some() {
                continue;
            }
            if machine.is_silent() {
                let broker = Arc::clone(self);
                tokio::spawn(async move {
                    machine.answers().await;
                    broker.look_for(&machine).await;
                });
            } else {
                self.look_for(&machine).await;
            }
        }
    }

    /// Finds out whether a machine that no job works on is here.
    async fn look_for(self: &Arc<Self>, machine: &Arc<Machine>) {
        if machine.state() != State::Paused {
            return self.forget_moved(machine).await;
        }
        let Ok(core) = machine.core("asked") else {
            return;
        };
        let Ok(mover) = Mover::of(&core).await else {
            return;
        };
        if let Ok(Outcome {
            result: Verdict::Undecided,
            ..
        }) = mover.now().await
        {
            machine.set_away(true);
            machine.set_reason(undecided(machine.name().as_str()));
            self.resolve(machine);
        }
    }
}

impl Broker {
    /// Forgets a machine that is elsewhere, which the broker before had no time for.
    async fn forget_moved(&self, machine: &Arc<Machine>) {
        let departure = Departure::of(&self.host, machine.name());
        if !machine.from_file
            && matches!(machine.state(), State::Off | State::Failed)
            && departure.is_some_and(|departure| departure.moved)
            && let Err(error) = self.remove(machine).await
        {
            tracing::warn!(machine = %machine.name(), %error, "it is not forgotten");
        }
    }
}

async fn has_arrived(instance: &Instance) -> bool {
    match Mover::of(instance.core()).await {
        Ok(mover) => has_arrived_at(&mover).await,
        Err(_) => false,
    }
}

async fn has_arrived_at(mover: &Mover) -> bool {
    matches!(mover.now().await, Ok(outcome) if outcome.result == Verdict::Arrived)
}
