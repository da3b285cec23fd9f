//! One generation of a machine's processes: made whole, or not at all.
//!
//! A machine that runs has one. While it moves within this host, or comes from another, there
//! is one more, in a folder of its own, which takes the place of the first when it has the
//! machine.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use api::Error;
use api::core::CoreProxy;
use nix::sys::signal::Signal;

use super::core::{self, Boot};
use super::device::{RunningDevice, chain};
use super::state::MachineState;
use super::{DeviceStatus, Machine, foreign};
use crate::console::{Console, Switch};
use crate::definition::Definition;
use crate::folder::{last_line, last_words};
use crate::host::Host;
use crate::jobs::Job;
use crate::migration::Fate;
use crate::migration::ends::Incoming;
use crate::name::MachineName;
use crate::process::{Ended, Process};
use crate::resources::ResourceError;

/// How long a core may take until it answers. All of its memory may be made present before.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// How long a core that runs may take to answer.
const ADOPT_DEADLINE: Duration = Duration::from_secs(10);
/// A core that has hung up may take so long to end.
const PARTING: Duration = Duration::from_secs(5);
/// How long a process that was killed may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

fn unavailable(error: ResourceError) -> Error {
    Error::ResourceUnavailable(error.to_string())
}

fn internal(what: &str) -> impl Fn(std::io::Error) -> Error + '_ {
    move |error| Error::Internal(format!("{what}: {error}"))
}

/// What processes are started for.
pub(crate) struct Plan<'a> {
    /// What every machine needs.
    pub(crate) host: &'a Arc<Host>,
    /// The machine that they are, or shall be.
    pub(crate) machine: &'a Arc<Machine>,
    /// The job that starts them.
    pub(crate) job: &'a Arc<Job>,
    /// Their folder, which is not there yet.
    pub(crate) place: PathBuf,
    /// Where the machine comes from; nothing for one that boots.
    pub(crate) incoming: Option<Incoming>,
    /// The console of the generation before.
    pub(crate) console: Option<Console>,
}

/// Processes that run, with the guest stopped.
#[derive(Debug)]
pub(crate) struct Instance {
    pub(super) place: PathBuf,
    pub(super) core: Arc<Process>,
    pub(super) devices: Vec<RunningDevice>,
    pub(super) proxy: CoreProxy<'static>,
    pub(super) outside: Outside,
    /// Microseconds since 1970.
    pub(super) started_usec: u64,
}

/// What is outside of its first serial port.
#[derive(Debug)]
pub(super) struct Outside {
    pub(super) console: Console,
    /// The console is that of the generation before, until this takes its place.
    pub(super) switch: Option<Switch>,
}

impl Outside {
    fn open(
        host: &Host,
        name: &MachineName,
        before: Option<&Console>,
        core: UnixStream,
    ) -> io::Result<Self> {
        Ok(match before {
            Some(console) => Self {
                switch: Some(console.also_from(core)?),
                console: console.clone(),
            },
            None => Self {
                switch: None,
                console: Console::new(core, &host.folder.logs(name).join("console.log"))?,
            },
        })
    }
}

/// What has been made so far.
#[derive(Default)]
struct Made {
    devices: Vec<RunningDevice>,
    core: Option<Arc<Process>>,
}

impl Made {
    /// A later broker ends what this one may not get to the end of.
    fn save(&self, plan: &Plan<'_>) -> Result<(), Error> {
        MachineState::new(plan.machine, self.core.as_deref(), &self.devices, false)
            .save(&plan.place)
            .map_err(internal("no state"))
    }
}

impl Plan<'_> {
    /// Starts them.
    ///
    /// # Errors
    /// They did not start; nothing of them is left.
    pub(crate) async fn build(mut self) -> Result<Instance, Error> {
        let mut made = Made::default();
        match self.make(&mut made).await {
            Ok((proxy, outside)) => {
                let started = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
                let core = made.core.ok_or_else(|| Error::Internal("no core".into()))?;
                Ok(Instance {
                    place: self.place,
                    core,
                    devices: made.devices,
                    proxy,
                    outside,
                    started_usec: u64::try_from(started.as_micros()).unwrap_or(u64::MAX),
                })
            }
            Err(error) => {
                end(&made.devices, made.core.as_ref()).await;
                self.host.folder.remove_place(&self.place);
                Err(error)
            }
        }
    }

    async fn make(&mut self, made: &mut Made) -> Result<(CoreProxy<'static>, Outside), Error> {
        let (host, name) = (self.host, self.machine.name());
        let definition: Arc<Definition> = self.machine.definition();
        self.job.set_phase("opening", 0.0);
        let boot = Boot::open(&definition).map_err(unavailable)?;
        for device in &definition.devices {
            let mut device = RunningDevice::open(device.clone())?;
            device.shares_image = self.incoming.is_some();
            made.devices.push(device);
        }
        // What an earlier life left, if anything did.
        host.folder.remove_place(&self.place);
        host.folder
            .make_place(&self.place, name)
            .map_err(internal("no folder"))?;

        // Each device is a step, and so are the core's process and its first answer.
        let (steps, mut step) = (made.devices.len() + 2, 0);
        let job = self.job;
        let mut advance = |phase: &str| {
            job.set_phase(phase, step as f64 / steps as f64);
            step += 1;
        };
        let mut program =
            core::program(host, self.machine, &definition, boot).map_err(internal("no log"))?;
        program.beside = self.incoming.is_some();
        for at in 0..made.devices.len() {
            advance("starting devices");
            let device = &mut made.devices[at];
            let endpoint = match device.device.foreign_socket() {
                Some(socket) => {
                    let backend = foreign::connect(&device.device.id, socket).await?;
                    format!("fd={}", program.pass(backend))
                }
                None => {
                    let ends = device.start(host, self.machine).await?;
                    let (backend, link) = (program.pass(ends.backend), program.pass(ends.link));
                    format!("fd={backend},control-fd={link}")
                }
            };
            core::add_device(&mut program, &device.device, &endpoint);
            made.save(self)?;
        }
        let control = self.place.join("control");
        let listener = UnixListener::bind(&control).map_err(internal("no control socket"))?;
        let (ours, theirs) = UnixStream::pair().map_err(internal("no console"))?;
        let end = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(self.place.join("end"))
            .map_err(internal("no file for its end"))?;
        program.hand("--control-fd", listener);
        program.hand("--end-fd", end);
        let serial = program.pass(theirs.into());
        program.args(["--serial", &format!("fd={serial}")]);
        match self.incoming.take() {
            None => program.args(["--paused"]),
            Some(incoming) => core::expect(&mut program, incoming),
        }
        advance("starting the core");
        let core = host.launcher.start(program).await;
        let core = Arc::new(core.map_err(|error| Error::MachineFailed(chain(&error)))?);
        made.core = Some(Arc::clone(&core));
        made.save(self)?;
        let outside = Outside::open(host, name, self.console.as_ref(), ours);
        let outside = outside.map_err(internal("no console"))?;
        advance("waiting for the core");
        Ok((self.reach(made, &core).await?, outside))
    }

    /// Waits for the core's first answer, as long as it lives and the job is wanted.
    async fn reach(&self, made: &Made, core: &Process) -> Result<CoreProxy<'static>, Error> {
        let name = self.machine.name();
        let control = self.place.join("control");
        let otherwise = tokio::select! {
            connected = tokio::time::timeout(START_DEADLINE, core::connect(&control)) => match connected {
                Ok(Ok(proxy)) => return Ok(proxy),
                Ok(Err(error)) => {
                    // Who hangs up is about to end, and says why before it does.
                    let _ = tokio::time::timeout(PARTING, core.ended()).await;
                    error.to_string()
                }
                Err(_) => {
                    let seconds = START_DEADLINE.as_secs();
                    return Err(Error::TimedOut(format!(
                        "the core of {name} did not answer within {seconds} s"
                    )));
                }
            },
            ended = core.ended() => ended.to_string(),
            () = self.job.cancelled() => {
                return Err(Error::Cancelled(format!("the start of {name} was cancelled")));
            }
        };
        Err(Error::MachineFailed(
            why_not(self.host, name, &made.devices, &self.place, &otherwise).await,
        ))
    }
}

impl Instance {
    /// One that a killed broker left, as `state` says.
    ///
    /// # Errors
    /// It does not run any more, or cannot be reached; nothing was done to it.
    pub(crate) async fn adopt(
        host: &Host,
        name: &MachineName,
        console: Option<&Console>,
        place: PathBuf,
        state: &MachineState,
    ) -> io::Result<Self> {
        let gone = |what: &str| io::Error::new(io::ErrorKind::NotFound, what.to_owned());
        let id = state.core.as_ref().ok_or_else(|| gone("it has no core"))?;
        let core = Arc::new(host.launcher.adopt(id).await?);
        let control = place.join("control");
        let proxy = tokio::time::timeout(ADOPT_DEADLINE, core::connect(&control))
            .await
            .map_err(|_| gone("its core does not answer"))?
            .map_err(io::Error::other)?;
        let (ours, theirs) = UnixStream::pair()?;
        let outside = Outside::open(host, name, console, ours)?;
        let attach = {
            let proxy = proxy.clone();
            async move { proxy.attach_console(OwnedFd::from(theirs).into()).await }
        };
        if state.complete {
            attach.await.map_err(io::Error::other)?;
        } else {
            // A core that waits for its machine does it when that has come.
            tokio::spawn(attach);
        }
        Ok(Self {
            place,
            core,
            devices: RunningDevice::adopt_all(host, state).await,
            proxy,
            outside,
            started_usec: state.started_usec,
        })
    }

    /// From now on no machine comes to it; whether one has.
    pub(crate) fn forestall(&self) -> Fate {
        Fate::forestall(&self.place)
    }

    /// Ends it, and leaves nothing of it; whether a machine had come to it.
    pub(crate) async fn discard(self, host: &Host) -> Fate {
        let fate = self.forestall();
        end(&self.devices, Some(&self.core)).await;
        host.folder.remove_place(&self.place);
        fate
    }

    /// Another connection to its core, whose first was lost.
    ///
    /// # Errors
    /// It does not answer.
    pub(crate) async fn reach_again(&self) -> zbus::Result<CoreProxy<'static>> {
        core::connect(&self.place.join("control")).await
    }

    /// Talks to its core by another connection from now on.
    pub(crate) fn set_core(&mut self, core: CoreProxy<'static>) {
        self.proxy = core;
    }

    /// Its folder.
    pub(crate) fn place(&self) -> &Path {
        &self.place
    }

    /// The connection to its core.
    pub(crate) fn core(&self) -> &CoreProxy<'static> {
        &self.proxy
    }

    /// Waits for the end of its core.
    pub(crate) async fn ended(&self) -> Ended {
        self.core.ended().await
    }

    /// Why its core ended, as far as anybody said.
    pub(crate) async fn why_not(&self, host: &Host, name: &MachineName) -> String {
        let ended = self.core.ended().await.to_string();
        why_not(host, name, &self.devices, &self.place, &ended).await
    }

    /// What the bus shows of its devices.
    pub(super) fn statuses(&self) -> Vec<DeviceStatus> {
        self.devices.iter().map(RunningDevice::status).collect()
    }
}

/// Ends processes.
async fn end(devices: &[RunningDevice], core: Option<&Arc<Process>>) {
    let devices = devices.iter().filter_map(|device| device.process.as_ref());
    let processes: Vec<_> = devices.chain(core).collect();
    for process in &processes {
        process.signal(Signal::SIGKILL);
    }
    for process in processes {
        if tokio::time::timeout(KILL_DEADLINE, process.ended())
            .await
            .is_err()
        {
            tracing::error!(pid = process.id().pid, "a killed process does not end");
        }
    }
}

/// Why a core did not start, as far as anybody said.
async fn why_not(
    host: &Host,
    name: &MachineName,
    devices: &[RunningDevice],
    place: &Path,
    otherwise: &str,
) -> String {
    // A device that ended is the cause of what the core says.
    for device in devices {
        let Some(process) = &device.process else {
            continue;
        };
        if let Ok(ended) = tokio::time::timeout(Duration::from_millis(50), process.ended()).await
            && ended != Ended::Status(0)
        {
            let why = device.obituary(host, name, ended);
            return format!("device {} of {name} did not start: {why}", device.device.id);
        }
    }
    let said = last_line(&place.join("end"));
    match said.as_deref().and_then(|line| line.split_once(' ')) {
        Some((_, why)) => format!("{name} did not start: {why}"),
        None => match last_words(&host.folder.logs(name).join("core.log")) {
            Some(line) => format!("{name} did not start: {otherwise}; its last words: {line}"),
            None => format!("{name} did not start: {otherwise}"),
        },
    }
}
