//! A machine that leaves its processes: for others of this host, or for another broker.
//!
//! ```text
//! local:    memory's file, socket pairs ─► new processes ─► core moves ─► they are the machine
//! others    peer: offer ─► accepted ─► connections ─► ready ─► core moves ─► forgotten here
//! ```
//! The cores decide who runs the machine ([`migration::commit`]); what is done here is the same
//! after a broker was killed on the way, and another one asks the core how it ended.

use std::sync::Arc;

use api::Error;
use api::job_migration::Place;
use zbus::OwnedFd as BusFd;

use super::Uri;
use super::arrival;
use super::ends::{Ends, From, Incoming};
use super::mover::Mover;
use super::options::Options;
use super::peer::{Dial, Offer};
use super::record::{Outcome, Verdict};
use crate::host::Host;
use crate::jobs::Job;
use crate::machine::{Instance, Machine, start};

/// A machine that moves.
pub(crate) struct Leaving {
    pub(crate) host: Arc<Host>,
    pub(crate) machine: Arc<Machine>,
    pub(crate) job: Arc<Job>,
}

/// While this lives the machine may get other processes, whatever becomes of its present ones.
struct MayBeSucceeded<'a>(&'a Machine);

impl<'a> MayBeSucceeded<'a> {
    fn new(machine: &'a Machine) -> Self {
        machine.set_leaving(true);
        Self(machine)
    }
}

impl Drop for MayBeSucceeded<'_> {
    fn drop(&mut self) {
        self.0.set_leaving(false);
    }
}

impl Leaving {
    /// Moves the machine. When this returns without an error it is where it was wanted.
    ///
    /// # Errors
    /// It is elsewhere, see the job's [`Place`].
    pub(crate) async fn go(&self, uri: &Uri, options: &Options) -> Result<(), Error> {
        match uri {
            Uri::Local => self.go_local(options).await,
            uri => self.go_to(uri, options).await,
        }
    }

    async fn mover(&self) -> Result<Mover, Error> {
        Mover::of(&self.machine.core("moved")?).await
    }

    async fn begin(&self, mover: &Mover, ends: Ends, options: &Options) -> Result<(), Error> {
        let shared = ends.ram.is_empty();
        let ram = ends.ram.into_iter().map(BusFd::from).collect();
        let states = ends.states.into_iter();
        let states = states.map(|(id, fd)| (id, fd.into())).collect();
        let options = options.for_core(shared);
        mover
            .0
            .migrate(ends.control.into(), ram, states, options)
            .await
    }

    async fn go_local(&self, options: &Options) -> Result<(), Error> {
        let mover = self.mover().await?;
        let memory = mover.0.memory().await?;
        let definition = self.machine.definition();
        let ids = definition.devices.iter().map(|device| device.id.as_str());
        let (ours, theirs) = Ends::pairs(ids)
            .map_err(|error| Error::ResourceUnavailable(format!("no sockets: {error}")))?;
        let incoming = Incoming {
            from: From::Core,
            ends: theirs,
            memory: Some(memory.into()),
        };
        let (host, machine, job) = (&self.host, &self.machine, &self.job);
        let instance = start::prepare(host, machine, job, Some(incoming)).await?;
        let _leaving = MayBeSucceeded::new(machine);
        if let Err(error) = self.begin(&mover, ours, options).await {
            instance.discard(host).await;
            return Err(error);
        }
        self.end_local(&mover, instance).await
    }

    /// Waits for the end of a move to `instance`, and does what it says.
    ///
    /// # Errors
    /// The machine is elsewhere.
    pub(crate) async fn end_local(&self, mover: &Mover, instance: Instance) -> Result<(), Error> {
        let (host, machine) = (&self.host, &self.machine);
        let _leaving = MayBeSucceeded::new(machine);
        let outcome = mover.watch(&self.job, &host.publisher).await;
        if let Ok(outcome) = &outcome
            && outcome.result == Verdict::Kept
        {
            self.note(Place::Source, outcome);
            instance.discard(host).await;
            return Err(self.stays(outcome));
        }
        // Both sides are here: the other core knows whether it has the machine.
        let arrived = arrival::wait(host, machine.name(), &instance).await;
        match (outcome, arrived) {
            (outcome, Ok(())) => {
                if let Ok(outcome) = &outcome {
                    self.note(Place::Destination, outcome);
                    if outcome.result == Verdict::Undecided {
                        // It ends when it does not hear this, too.
                        let _ = mover.0.decide(true).await;
                    }
                }
                self.job
                    .migration(|migration| migration.place = Place::Destination);
                machine.succeed(host, instance).await
            }
            (Ok(outcome), Err(why)) => {
                instance.discard(host).await;
                self.note(Place::Source, &outcome);
                mover.0.decide(false).await?;
                Err(Error::MigrationFailed(format!(
                    "{} stays where it was: {why}",
                    machine.name()
                )))
            }
            (Err(error), Err(why)) => {
                instance.discard(host).await;
                self.job
                    .migration(|migration| migration.place = Place::Nowhere);
                Err(Error::MachineFailed(format!(
                    "{} ended while it moved: {error}; {why}",
                    machine.name()
                )))
            }
        }
    }

    async fn go_to(&self, uri: &Uri, options: &Options) -> Result<(), Error> {
        let mover = self.mover().await?;
        let definition = self.machine.definition();
        let offer = Offer {
            name: self.machine.name().to_string(),
            definition: definition.to_toml(),
            transient: self.machine.transient,
            channels: options.channels,
        };
        let dial = Dial {
            uri,
            key: self.host.migration_key.as_ref(),
        };
        self.job.set_phase("connecting", 0.0);
        let ids = definition.devices.iter().map(|device| device.id.as_str());
        let ends = tokio::select! {
            ends = dial.offer(offer, ids) => ends?,
            () = self.job.cancelled() => {
                return Err(Error::Cancelled(format!("{} stays where it was", self.machine.name())));
            }
        };
        self.begin(&mover, ends, options).await?;
        self.end_remote(&mover).await
    }

    /// Waits for the end of a move to another broker, and does what it says.
    ///
    /// # Errors
    /// The machine is elsewhere.
    pub(crate) async fn end_remote(&self, mover: &Mover) -> Result<(), Error> {
        let (machine, job) = (&self.machine, &self.job);
        let name = machine.name();
        let outcome = match mover.watch(job, &self.host.publisher).await {
            Ok(outcome) => outcome,
            Err(error) => {
                job.migration(|migration| migration.place = Place::Nowhere);
                return Err(Error::MachineFailed(format!(
                    "the core of {name} failed while it moved ({error}): unless it arrived at the \
                     destination, it has ended"
                )));
            }
        };
        match outcome.result {
            Verdict::Moved | Verdict::Arrived => {
                self.note(Place::Destination, &outcome);
                if let Ok(core) = machine.core("moved") {
                    // It ends by itself when it does not hear this.
                    let _ = core.terminate().await;
                }
                machine.gone().await;
                Ok(())
            }
            Verdict::Kept => {
                self.note(Place::Source, &outcome);
                Err(self.stays(&outcome))
            }
            Verdict::Undecided => {
                self.note(Place::Undecided, &outcome);
                let text = undecided(name.as_str());
                machine.set_reason(text.clone());
                Err(Error::Undecided(text))
            }
        }
    }

    fn note(&self, place: Place, outcome: &Outcome) {
        self.job.migration(|migration| {
            migration.place = place;
            migration.report = Some(outcome.report.clone());
        });
    }

    fn stays(&self, outcome: &Outcome) -> Error {
        let name = self.machine.name();
        let why = outcome.reason.as_deref().unwrap_or("nobody said why");
        let text = format!("{name} stays where it was: {why}");
        match self.job.is_cancelled() {
            true => Error::Cancelled(text),
            false => Error::MigrationFailed(text),
        }
    }
}

/// What there is to do about a machine that may be elsewhere.
pub(crate) fn undecided(name: &str) -> String {
    format!(
        "{name} is paused here and may run at its destination: look there, then godwit decide {name} \
         --there or --here"
    )
}
