//! A machine that leaves its processes: for others of this host, or for another broker.
//!
//! ```text
//! local:    memory's file, socket pairs ─► new processes ─► core moves ─► they are the machine
//! others    peer: offer ─► accepted ─► connections ─► ready ─► core moves ─► forgotten here
//! ```
//! The cores decide who runs the machine ([`migration::commit`]); what is done here is the same
//! after a broker was killed on the way, and another one asks the core how it ended. What the core
//! does not know the other broker is asked.

use std::sync::Arc;
use std::time::Duration;

use api::Error;
use api::job_migration::Place;
use api::machine::State;
use zbus::OwnedFd as BusFd;

use super::Uri;
use super::arrival;
use super::departure::Departure;
use super::ends::{Ends, From, Incoming};
use super::mover::Mover;
use super::options::Options;
use super::peer::{Dial, Offer, nonce};
use super::record::{Outcome, Verdict};
use crate::host::Host;
use crate::jobs::Job;
use crate::machine::{Instance, Machine, start};

/// How long the job asks the other broker what became of the machine when its core does not know;
/// later it is asked without the job.
const ASK_FOR: Duration = Duration::from_secs(15);
/// How soon it is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(500);

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
        let control = ends.control.into();
        match mover.0.migrate(control, ram, states, options).await {
            Err(Error::ZBus(error)) => Err(self.machine.lost("moved", &error).await),
            result => result,
        }
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
    pub(crate) async fn end_local(
        &self,
        mover: &Mover,
        mut instance: Instance,
    ) -> Result<(), Error> {
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
        let arrived = arrival::wait(host, machine.name(), &mut instance).await;
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
        let id = nonce().map_err(|error| Error::Internal(error.to_string()))?;
        let departure = Departure {
            uri: uri.to_string(),
            id: id.clone(),
            moved: false,
        };
        let offer = Offer {
            id,
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
        // From here on it may become the other's, whatever becomes of this broker and its host.
        departure.note(&self.host, self.machine.name());
        if let Err(error) = self.begin(&mover, ends, options).await {
            Departure::forget(&self.host, self.machine.name());
            return Err(error);
        }
        self.end_remote(&mover).await
    }

    /// Waits for the end of a move to another broker, and does what it says.
    ///
    /// # Errors
    /// The machine is elsewhere.
    pub(crate) async fn end_remote(&self, mover: &Mover) -> Result<(), Error> {
        let (host, machine) = (&self.host, &self.machine);
        let name = machine.name();
        let outcome = match mover.watch(&self.job, &host.publisher).await {
            Ok(outcome) => outcome,
            Err(error) => return Err(self.failed(mover, &error).await),
        };
        match outcome.result {
            Verdict::Moved => {
                machine.set_away(true);
                self.note(Place::Destination, &outcome);
                let departure = Departure::moved(host, machine);
                if let Ok(core) = machine.core("moved") {
                    // It ends by itself when it does not hear this.
                    let _ = core.terminate().await;
                }
                self.left(&departure).await;
                // Who looks there from now on finds it; its core has it, whatever is answered.
                let _ = departure.ask(host).await;
                Ok(())
            }
            Verdict::Kept => {
                Departure::forget(host, name);
                self.note(Place::Source, &outcome);
                Err(self.stays(&outcome))
            }
            // How it came here is the last that its core knows: it has not begun to go.
            Verdict::Arrived => {
                Departure::forget(host, name);
                self.job
                    .migration(|migration| migration.place = Place::Source);
                Err(Error::MigrationFailed(format!(
                    "{name} stays where it was: the broker before this one ended before it went"
                )))
            }
            Verdict::Undecided => {
                machine.set_away(true);
                self.note(Place::Undecided, &outcome);
                machine.set_reason(undecided(name.as_str()));
                self.job.set_phase("asking the destination", 0.99);
                match self.ask(ASK_FOR).await {
                    Some(came) => self.decide(mover, came, &outcome).await,
                    None => Err(Error::Undecided(undecided(name.as_str()))),
                }
            }
        }
    }

    /// Asks the other broker whether the machine came, again and again for a while.
    async fn ask(&self, within: Duration) -> Option<bool> {
        let departure = Departure::of(&self.host, self.machine.name())?;
        let asked = async {
            loop {
                if let Some(came) = departure.has_come(&self.host).await {
                    return came;
                }
                tokio::time::sleep(ASK_AGAIN).await;
            }
        };
        tokio::select! {
            asked = tokio::time::timeout(within, asked) => asked.ok(),
            () = self.job.cancelled() => None,
        }
    }

    /// The other broker has said whether the machine came.
    async fn decide(&self, mover: &Mover, came: bool, outcome: &Outcome) -> Result<(), Error> {
        let (host, machine) = (&self.host, &self.machine);
        mover.0.decide(came).await?;
        machine.set_reason(String::new());
        if came {
            self.note(Place::Destination, outcome);
            self.left(&Departure::moved(host, machine)).await;
            return Ok(());
        }
        machine.set_away(false);
        Departure::forget(host, machine.name());
        self.note(Place::Source, outcome);
        Err(self.stays(outcome))
    }

    /// Waits until nothing of a machine is left that is elsewhere.
    async fn left(&self, departure: &Departure) {
        self.machine.gone().await;
        if self.machine.from_file {
            self.machine
                .set_reason(departure.advice(self.machine.name()));
        }
    }

    /// What became of a machine whose core ended while no broker watched.
    ///
    /// # Errors
    /// It did not move, or nobody knows.
    pub(crate) async fn end_unwatched(&self) -> Result<(), Error> {
        let (machine, name) = (&self.machine, self.machine.name());
        match self.ask(ASK_FOR).await {
            Some(true) => {
                self.job
                    .migration(|migration| migration.place = Place::Destination);
                self.left(&Departure::moved(&self.host, machine)).await;
                return Ok(());
            }
            Some(false) => Departure::forget(&self.host, name),
            None if machine.state() == State::Off => return Ok(()),
            None => {}
        }
        Err(Error::MachineFailed(format!(
            "{name} ended while no broker watched"
        )))
    }

    /// The machine's core failed while it moved: it is there, or has ended.
    async fn failed(&self, mover: &Mover, error: &Error) -> Error {
        let (host, machine) = (&self.host, &self.machine);
        let name = machine.name();
        if mover.0.progress().await.is_ok() {
            // It lives, and had not begun when the broker before this one ended.
            Departure::forget(host, name);
            return Error::MigrationFailed(format!("{name} stays where it was: {error}"));
        }
        let (place, what) = match self.ask(ASK_FOR).await {
            Some(true) => {
                Departure::moved(host, machine);
                (Place::Destination, "it runs at its destination")
            }
            Some(false) => {
                Departure::forget(host, name);
                (Place::Nowhere, "it has ended")
            }
            None => (
                Place::Nowhere,
                "unless it arrived at the destination, it has ended",
            ),
        };
        self.job.migration(|migration| migration.place = place);
        Error::MachineFailed(format!(
            "the core of {name} failed while it moved ({error}): {what}"
        ))
    }

    fn note(&self, place: Place, outcome: &Outcome) {
        self.job.migration(|migration| {
            migration.place = place;
            migration.report = Some(outcome.report.clone());
        });
    }

    fn stays(&self, outcome: &Outcome) -> Error {
        let name = self.machine.name();
        let trouble = self.job.record().migration.and_then(|it| it.trouble);
        let why = trouble.or_else(|| outcome.reason.clone());
        let why = why.as_deref().unwrap_or("nobody said why");
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
