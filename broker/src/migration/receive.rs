//! A machine that another broker offers.
//!
//! ```text
//! offer ─► fits? ─► job, machine `starting` ─► connections ─► processes ─► Ready ─► it arrives
//!            │ reasons                              └──────── forgotten, reason ──────┘
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::machine::State;
use api::{Dictionary, Error, path};
use tokio::sync::oneshot;
use zbus::OwnedObjectPath;

use super::Uri;
use super::arrival;
use super::arrivals::Fate;
use super::ends::{Ends, From, Incoming};
use super::options::number;
use super::peer::{Listener, Offer, serve};
use crate::broker::Broker;
use crate::definition::{Definition, DeviceKind};
use crate::jobs::{Job, Kind};
use crate::machine::{Machine, start};
use crate::name::MachineName;
use crate::resources;

/// How long a machine is awaited, in seconds, and how long at most.
const DEFAULT_TIMEOUT_S: u64 = 600;
const MAX_TIMEOUT_S: u64 = 86_400;
/// How long it is still listened when the machine has come, or has not.
const LISTEN_ON: Duration = Duration::from_secs(60);
/// How long an earlier attempt may take to be over; who offers waits longer for an answer.
const FORMER_DEADLINE: Duration = Duration::from_secs(7);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Longest id of an offer, in bytes.
const MAX_ID: usize = 128;
/// Most paths that are called otherwise here.
const MAX_PATHS: usize = 256;

/// Machines that somebody awaits, by name.
#[derive(Debug, Default)]
pub(crate) struct Awaited(Mutex<HashMap<MachineName, Expectation>>);

#[derive(Debug)]
struct Expectation {
    job: Arc<Job>,
    /// What is called otherwise here.
    paths: HashMap<String, String>,
    /// Told when it begins to come.
    comes: oneshot::Sender<Coming>,
}

/// A machine that begins to come, and how its job goes on.
type Coming = (Arc<Machine>, Guest);

impl Awaited {
    fn lock(&self) -> MutexGuard<'_, HashMap<MachineName, Expectation>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What passes between who talks with the other broker and the job.
#[derive(Debug)]
struct Guest {
    ends: oneshot::Receiver<Result<Ends, String>>,
    ready: oneshot::Sender<Result<(), String>>,
}

/// A machine that was accepted.
pub(crate) struct Arriving {
    devices: Vec<String>,
    ends: oneshot::Sender<Result<Ends, String>>,
    ready: oneshot::Receiver<Result<(), String>>,
}

impl Arriving {
    /// Accepts a machine that came to `uri`, if it fits.
    ///
    /// # Errors
    /// Every reason why it does not.
    pub(super) async fn accept(
        broker: &Arc<Broker>,
        uri: &Uri,
        offer: Offer,
    ) -> Result<Self, Vec<String>> {
        let name = MachineName::new(&offer.name).map_err(|error| vec![error.to_string()])?;
        if offer.id.is_empty() || offer.id.len() > MAX_ID {
            return Err(vec![format!("an id of {} bytes", offer.id.len())]);
        }
        let mut definition = Definition::from_toml(&name, &offer.definition)
            .map_err(|error| vec![format!("its definition: {error}")])?;
        former_is_over(broker, &name).await;
        let expectation = broker.awaited.lock().remove(&name);
        if let Some(expectation) = &expectation {
            rename(&mut definition, &expectation.paths);
        }
        let mut reasons = resources::missing(&definition);
        let machine = match broker.place_for(&name, &definition, offer.transient) {
            Ok(machine) if reasons.is_empty() => machine,
            Ok(machine) => {
                broker.withdraw(&machine);
                return Err(again(broker, name, expectation, reasons));
            }
            Err(error) => {
                reasons.push(error.to_string());
                return Err(again(broker, name, expectation, reasons));
            }
        };
        broker.publish_added(&machine).await;
        let (ends, ends_come) = oneshot::channel();
        let (is_ready, ready) = oneshot::channel();
        let guest = Guest {
            ends: ends_come,
            ready: is_ready,
        };
        tracing::info!(machine = %name, %uri, "a machine comes");
        broker.host.arrivals.begin(&offer.id, &name);
        let devices = definition.devices.iter();
        let devices = devices.map(|device| device.id.to_string()).collect();
        let begun = match expectation {
            Some(expectation) => {
                let begun = machine.claim(&expectation.job);
                begun.map(|()| drop(expectation.comes.send((Arc::clone(&machine), guest))))
            }
            None => {
                let begun =
                    broker.begin(Kind::Receive, &machine, |broker, machine, job| async move {
                        take(&broker, &machine, &job, guest).await
                    });
                begun.await.map(drop)
            }
        };
        if let Err(error) = begun {
            broker.host.arrivals.settle(machine.name(), Fate::Never);
            broker.withdraw(&machine);
            return Err(vec![error.to_string()]);
        }
        Ok(Self {
            devices,
            ends,
            ready,
        })
    }

    /// Names of the connections that it needs.
    pub(super) fn names(&self, channels: usize) -> Vec<String> {
        Ends::names(channels, self.devices.iter().map(String::as_str))
    }

    /// Starts its processes on the connections that came.
    ///
    /// # Errors
    /// Why there are none.
    pub(super) async fn start(self, ends: Result<Ends, String>) -> Result<(), String> {
        let over = || "it was given up at the destination".to_owned();
        self.ends.send(ends).map_err(|_| over())?;
        self.ready.await.map_err(|_| over())?
    }
}

/// Waits until nothing is left of an earlier attempt, of which who offers has heard the end already.
async fn former_is_over(broker: &Broker, name: &MachineName) {
    let is_over = || match broker.machine(name.as_str()) {
        Ok(known) => {
            let receives = known.job().map(|job| job.record().kind == Kind::Receive);
            !receives.unwrap_or(known.is_new())
        }
        Err(_) => true,
    };
    let end = Instant::now() + FORMER_DEADLINE;
    while !is_over() && Instant::now() < end {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Puts an expectation back whose machine did not fit: it may come again.
fn again(
    broker: &Broker,
    name: MachineName,
    expectation: Option<Expectation>,
    reasons: Vec<String>,
) -> Vec<String> {
    if let Some(expectation) = expectation {
        broker.awaited.lock().insert(name, expectation);
    }
    reasons
}

/// The job of a machine that comes.
async fn take(
    broker: &Arc<Broker>,
    machine: &Arc<Machine>,
    job: &Arc<Job>,
    guest: Guest,
) -> Result<(), Error> {
    machine.starts();
    let host = &broker.host;
    let result = async {
        job.set_phase("connecting", 0.0);
        let ends = match guest.ends.await {
            Ok(Ok(ends)) => ends,
            Ok(Err(why)) => return Err(Error::MigrationFailed(why)),
            Err(_) => return Err(Error::MigrationFailed("the other broker is gone".into())),
        };
        let incoming = Incoming {
            from: From::Core,
            ends,
            memory: None,
        };
        let instance = match start::prepare(host, machine, job, Some(incoming)).await {
            Ok(instance) => instance,
            Err(error) => {
                // It may be gone.
                let _ = guest.ready.send(Err(error.to_string()));
                return Err(error);
            }
        };
        let _ = guest.ready.send(Ok(()));
        arrival::take_in(host, machine, job, instance, false).await
    };
    let result = result.await;
    broker.received(machine, &result);
    result
}

/// Calls what a machine needs as it is called here.
fn rename(definition: &mut Definition, paths: &HashMap<String, String>) {
    let change = |path: &mut String| {
        if let Some(here) = paths.get(path) {
            path.clone_from(here);
        }
    };
    definition.boot.paths_mut().for_each(change);
    for device in &mut definition.devices {
        match &mut device.kind {
            DeviceKind::Disk(disk) => change(&mut disk.path),
            DeviceKind::Net(net) => change(&mut net.tap),
            DeviceKind::Balloon(_) => {}
            DeviceKind::VhostUser(other) => change(&mut other.socket),
            // They do not move.
            DeviceKind::Vfio(_) => {}
        }
    }
}

impl Broker {
    /// The machine that one of this name and definition shall be: one that is off and the same,
    /// or a new one.
    pub(crate) fn place_for(
        &self,
        name: &MachineName,
        definition: &Definition,
        transient: bool,
    ) -> Result<Arc<Machine>, Error> {
        definition.must_be_movable(name)?;
        if let Ok(known) = self.machine(name.as_str()) {
            if known.definition().uuid != definition.uuid {
                return Err(Error::MachineExists(format!(
                    "there is another machine {name} already"
                )));
            }
            known.must_be(&[State::Off, State::Failed], "received")?;
            if known.job().is_some() {
                return Err(Error::JobInProgress(format!("a job works on {name}")));
            }
            known.redefine(definition.clone())?;
            return Ok(known);
        }
        let machine = self.insert(name.clone(), definition.clone(), transient, false)?;
        machine.set_new(true);
        Ok(machine)
    }

    /// Takes back what [`Self::place_for`] did for a machine that does not come after all.
    pub(crate) fn withdraw(&self, machine: &Machine) {
        if machine.is_new() {
            self.drop_machine(machine.name());
        }
    }

    /// Notes whether a machine has come.
    pub(crate) fn received(&self, machine: &Machine, result: &Result<(), Error>) {
        match result {
            Ok(()) => {
                machine.set_new(false);
                let kept = self.keep(machine.name(), &machine.definition(), machine.transient);
                if let Err(error) = kept {
                    tracing::error!(machine = %machine.name(), %error, "another broker would not know it when it is off");
                }
            }
            Err(error) => {
                // Unless it is known better.
                self.host.arrivals.settle(machine.name(), Fate::Never);
                machine.did_not_start(error);
            }
        }
    }

    /// Awaits a machine from another broker.
    ///
    /// # Errors
    /// An option is impossible, or it cannot be listened there.
    pub(crate) async fn receive(
        self: &Arc<Self>,
        name: &str,
        options: Dictionary,
    ) -> Result<OwnedObjectPath, Error> {
        let name = MachineName::new(name).map_err(|error| Error::InvalidArgs(error.to_string()))?;
        let options = ReceiveOptions::parse(options)?;
        let listener = match &options.listen {
            Some(uri) => {
                let listener = Listener::bind(uri, self.host.migration_key.as_ref()).await;
                Some(listener.map_err(|error| {
                    Error::ResourceUnavailable(format!("{uri} cannot be listened at: {error}"))
                })?)
            }
            None => None,
        };
        let job = self.jobs.begin(Kind::Receive, &name)?;
        let (comes, coming) = oneshot::channel();
        let expectation = Expectation {
            job: Arc::clone(&job),
            paths: options.paths,
            comes,
        };
        {
            let awaited = &mut *self.awaited.lock();
            if awaited.contains_key(&name) {
                self.jobs.forget(job.id());
                return Err(Error::JobInProgress(format!("{name} is awaited already")));
            }
            awaited.insert(name.clone(), expectation);
        }
        job.set_phase("waiting for the machine", 0.0);
        self.publish_job(&job).await;
        let broker = Arc::clone(self);
        let (timeout, id) = (options.timeout, job.id());
        tokio::spawn(async move {
            let listening = listener.map(|it| tokio::spawn(serve(Arc::clone(&broker), it)));
            let result = tokio::select! {
                coming = coming => coming.map_err(|_| Error::Internal("it is not awaited".into())),
                () = job.cancelled() => Err(Error::Cancelled(format!("{name} is not awaited any more"))),
                () = tokio::time::sleep(timeout) => Err(Error::TimedOut(format!(
                    "{name} did not come within {} s",
                    timeout.as_secs()
                ))),
            };
            let (machine, result) = match result {
                Ok((machine, guest)) => {
                    let result = take(&broker, &machine, &job, guest).await;
                    (Some(machine), result)
                }
                Err(error) => {
                    broker.awaited.lock().remove(&name);
                    (None, Err(error))
                }
            };
            if let Some(listening) = listening {
                // Who sent it may have to ask what became of it.
                tokio::spawn(async move {
                    tokio::time::sleep(LISTEN_ON).await;
                    listening.abort();
                });
            }
            broker.end_job(job, machine, result).await;
        });
        Ok(path::job(id))
    }
}

/// How a machine is awaited.
struct ReceiveOptions {
    listen: Option<Uri>,
    paths: HashMap<String, String>,
    timeout: Duration,
}

impl ReceiveOptions {
    fn parse(dictionary: Dictionary) -> Result<Self, Error> {
        let mut options = Self {
            listen: None,
            paths: HashMap::new(),
            timeout: Duration::from_secs(DEFAULT_TIMEOUT_S),
        };
        let wrong = |text: String| Err(Error::InvalidArgs(text));
        for (key, value) in dictionary {
            match key.as_str() {
                "listen" => {
                    let uri = value.downcast_ref::<&str>().ok().map(str::parse::<Uri>);
                    options.listen = match uri {
                        Some(Ok(uri)) if uri != Uri::Local => Some(uri),
                        Some(Err(error)) => return wrong(format!("option listen: {error}")),
                        _ => {
                            return wrong(
                                "option listen: give tcp://HOST:PORT or unix:/PATH".into(),
                            );
                        }
                    };
                }
                "paths" => match HashMap::try_from(value) {
                    Ok(paths) if paths.len() <= MAX_PATHS => options.paths = paths,
                    _ => {
                        return wrong(format!(
                            "option paths: give a dictionary a{{ss}} of at most {MAX_PATHS}"
                        ));
                    }
                },
                "timeout-s" => {
                    options.timeout = Duration::from_secs(number(&key, &value, 1..=MAX_TIMEOUT_S)?);
                }
                _ => {
                    return wrong(format!(
                        "{key} is no option here: there are listen, paths, timeout-s"
                    ));
                }
            }
        }
        Ok(options)
    }
}
