//! From a definition to a running machine, or to nothing.
//!
//! Order: everything that is opened, then the device processes, then the core with its
//! guest stopped, then the state on disk, then the guest runs. Of a broker that is killed on
//! the way no guest runs: a device ends with its socket, and a core whose start was not
//! complete is ended by the next broker.

use std::fs::OpenOptions;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use api::Error;
use api::core::CoreProxy;
use api::device::State as DeviceState;
use api::machine::State;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use super::core::{self, Boot};
use super::device::{RunningDevice, chain};
use super::foreign;
use super::state::MachineState;
use super::supervisor::Supervisor;
use super::{DeviceStatus, Live, Machine};
use crate::console::Console;
use crate::definition::DeviceKind;
use crate::folder::{last_line, last_words};
use crate::host::Host;
use crate::jobs::Job;
use crate::process::Process;
use crate::resources::ResourceError;

/// How long a core may take until it answers. All of its memory may be made present before.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// How long a process that was killed may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

fn unavailable(error: ResourceError) -> Error {
    Error::ResourceUnavailable(error.to_string())
}

fn internal(what: &str) -> impl Fn(std::io::Error) -> Error + '_ {
    move |error| Error::Internal(format!("{what}: {error}"))
}

/// What a start has made so far.
#[derive(Default)]
struct Made {
    devices: Vec<RunningDevice>,
    core: Option<Arc<Process>>,
}

/// Starts `machine`, and its supervisor. With `paused`, its guest does not run yet.
///
/// # Errors
/// It did not start; nothing of it is left.
pub(crate) async fn start(
    host: &Arc<Host>,
    machine: &Arc<Machine>,
    job: &Arc<Job>,
    paused: bool,
) -> Result<(), Error> {
    machine.must_be(&[State::Off, State::Failed], "started")?;
    machine.update(|inner| {
        inner.state = State::Starting;
        inner.reason = String::new();
    });
    machine.gone.send_replace(false);
    let mut made = Made::default();
    let result = make(host, machine, job, paused, &mut made).await;
    let result = match result {
        Ok(supervisor) => {
            tokio::spawn(supervisor.run());
            return Ok(());
        }
        Err(error) => Err(error),
    };
    unmake(host, machine, made).await;
    machine.update(|inner| {
        inner.devices.fill(DeviceStatus::OFF);
        inner.process = None;
        inner.started_usec = 0;
        (inner.state, inner.reason) = match &result {
            Err(Error::Cancelled(_)) | Ok(()) => (State::Off, String::new()),
            Err(error) => (State::Failed, error.to_string()),
        };
    });
    machine.gone.send_replace(true);
    result
}

/// Ends everything that was made.
async fn unmake(host: &Host, machine: &Machine, made: Made) {
    let devices = made
        .devices
        .iter()
        .filter_map(|device| device.process.as_ref());
    let processes: Vec<_> = devices.chain(&made.core).collect();
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
    host.folder.remove_machine(&machine.name);
}

async fn make(
    host: &Arc<Host>,
    machine: &Arc<Machine>,
    job: &Arc<Job>,
    paused: bool,
    made: &mut Made,
) -> Result<Supervisor, Error> {
    let name = &machine.name;
    let definition = machine.definition();
    job.set_phase("opening");
    let boot = Boot::open(&definition).map_err(unavailable)?;
    for device in &definition.devices {
        made.devices.push(RunningDevice::open(device.clone())?);
    }
    // What an earlier life left, if anything did.
    host.folder.remove_machine(name);
    let place = host
        .folder
        .make_machine(name)
        .map_err(internal("no folder"))?;

    job.set_phase("starting");
    let mut program =
        core::program(host, machine, &definition, boot).map_err(internal("no log"))?;
    for device in &mut made.devices {
        let endpoint = match &device.device.kind {
            DeviceKind::VhostUser(other) => {
                let backend = foreign::connect(&device.device.id, &other.socket).await?;
                format!("fd={}", program.pass(backend))
            }
            _ => {
                let ends = device.start(host, machine).await?;
                let (backend, link) = (program.pass(ends.backend), program.pass(ends.link));
                format!("fd={backend},control-fd={link}")
            }
        };
        core::add_device(&mut program, &device.device, &endpoint);
    }
    let control = place.join("control");
    let listener = UnixListener::bind(&control).map_err(internal("no control socket"))?;
    let (ours, theirs) = UnixStream::pair().map_err(internal("no console"))?;
    let end = OpenOptions::new()
        .append(true)
        .create(true)
        .open(place.join("end"))
        .map_err(internal("no file for its end"))?;
    program.hand("--control-fd", listener);
    program.hand("--end-fd", end);
    let serial = program.pass(theirs.into());
    program.args(["--serial", &format!("fd={serial}"), "--paused"]);
    let core = host.launcher.start(program).await;
    let core = Arc::new(core.map_err(|error| Error::MachineFailed(chain(&error)))?);
    made.core = Some(Arc::clone(&core));
    // A later broker ends what this one may not get to the end of.
    let state = MachineState::new(machine, &core, &made.devices, false);
    state.save(host, name).map_err(internal("no state"))?;
    let console = host.folder.logs(name).join("console.log");
    let console = Console::new(ours, &console).map_err(internal("no console"))?;

    let proxy = reach(host, machine, job, made, &core).await?;
    let started = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let started = u64::try_from(started.as_micros()).unwrap_or(u64::MAX);
    let (commands, inbox) = mpsc::channel(16);
    machine.update(|inner| {
        inner.process = Some(core.id().clone());
        inner.started_usec = started;
        for (status, device) in inner.devices.iter_mut().zip(&made.devices) {
            *status = DeviceStatus {
                state: DeviceState::Running,
                process: device.process.as_ref().map(|process| process.id().clone()),
                ..DeviceStatus::OFF
            };
        }
        inner.live = Some(Live {
            core: proxy.clone(),
            console,
            commands,
        });
    });
    let mut supervisor = Supervisor::new(host, machine, core, inbox);
    supervisor.adopt_devices(std::mem::take(&mut made.devices));
    // From here on it ends by its supervisor.
    if let Err(error) = supervisor.begin(&proxy, paused).await {
        machine.update(|inner| inner.live = None);
        made.devices = supervisor.into_devices();
        return Err(error);
    }
    Ok(supervisor)
}

/// Waits for the core's first answer, as long as it lives and the job is wanted.
async fn reach(
    host: &Host,
    machine: &Machine,
    job: &Job,
    made: &Made,
    core: &Process,
) -> Result<CoreProxy<'static>, Error> {
    let name = &machine.name;
    let control = host.folder.machine(name).join("control");
    let otherwise = tokio::select! {
        connected = tokio::time::timeout(START_DEADLINE, core::connect(&control)) => match connected {
            Ok(Ok(proxy)) => return Ok(proxy),
            Ok(Err(error)) => error.to_string(),
            Err(_) => {
                let seconds = START_DEADLINE.as_secs();
                return Err(Error::TimedOut(format!(
                    "the core of {name} did not answer within {seconds} s"
                )));
            }
        },
        ended = core.ended() => ended.to_string(),
        () = job.cancelled() => {
            return Err(Error::Cancelled(format!("the start of {name} was cancelled")));
        }
    };
    Err(Error::MachineFailed(
        why_not(host, machine, made, &otherwise).await,
    ))
}

/// Why a core did not start, as far as anybody said.
async fn why_not(host: &Host, machine: &Machine, made: &Made, otherwise: &str) -> String {
    let name = &machine.name;
    // A device that ended is the cause of what the core says.
    for device in &made.devices {
        let Some(process) = &device.process else {
            continue;
        };
        if let Ok(ended) = tokio::time::timeout(Duration::from_millis(50), process.ended()).await
            && ended != crate::process::Ended::Status(0)
        {
            let why = device.obituary(host, name, ended);
            return format!("device {} of {name} did not start: {why}", device.device.id);
        }
    }
    let said = last_line(&host.folder.machine(name).join("end"));
    match said.as_deref().and_then(|line| line.split_once(' ')) {
        Some((_, why)) => format!("{name} did not start: {why}"),
        None => match last_words(&host.folder.logs(name).join("core.log")) {
            Some(line) => format!("{name} did not start: {otherwise}; its last words: {line}"),
            None => format!("{name} did not start: {otherwise}"),
        },
    }
}
