//! A device process from its start to its end.
//!
//! ```text
//! options → device, workers, sockets (everything that is opened) → sandbox → threads → READY
//!   main thread     waits for SIGTERM, SIGINT, a failed thread, and feeds the watchdog
//!   control thread  serves one front-end after the other
//!   link thread     with --control-fd: answers the core
//!   queue threads   one for each worker
//! ```
//! SIGTERM ends the connection, gives requests in flight a moment to end, and ends the process
//! whether they did or not: what is left is in the in-flight record, for whoever comes next.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches};
use migration::schema::{Schema, UnitId, UnitIdError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use prometheus_client::registry::Registry;
use thiserror::Error;
use tracing_subscriber::EnvFilter;

use crate::device::{
    Assignment, Capabilities, Device, HostError, Kit, MAX_QUEUE_SIZE, MAX_QUEUES, OptionError,
};
use crate::ending::{Ending, chain};
use crate::health::Health;
use crate::link::Link;
use crate::listen::{self, Front};
use crate::memory::Prefaulter;
use crate::metrics::Metrics;
use crate::metrics_server;
use crate::options::{CommandLine, KitOptions, Switch, one_line};
use crate::queue::QueueIndex;
use crate::queue_thread::{QueueThread, Rings};
use crate::queue_threads::QueueThreads;
use crate::readiness::Readiness;
use crate::sandbox::{self, SandboxError};
use crate::session::{ConfigChange, Connection, Services, serve};

/// Requests in flight at SIGTERM have this long to end.
const LAST_REQUESTS: Duration = Duration::from_secs(1);
/// A predecessor of this process that was killed may still have what only one process may have.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(5);
/// A queue thread needs little; the address space of 64 of them is kept small.
const STACK: usize = 256 << 10;
/// The environment variable with the log level, in `tracing`'s syntax.
const LOG_ENV: &str = "GODWIT_LOG";

/// Why the process could not start.
#[derive(Debug, Error)]
enum StartError {
    #[error(transparent)]
    Option(#[from] OptionError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Unit(#[from] UnitIdError),
    #[error(
        "sandbox: it cannot be entered; run on a kernel with seccomp, or with --sandbox=off where \
         the guest is trusted"
    )]
    Sandbox(#[from] SandboxError),
    #[error("device: {0}")]
    Device(String),
}

/// The whole of a device program's `main`.
pub fn run<D: Device>() -> ExitCode {
    // Before anything else: it needs none of the options that are otherwise required.
    if std::env::args_os().any(|argument| argument == "--print-capabilities") {
        return print_capabilities(&D::CAPABILITIES);
    }
    let name = D::CAPABILITIES.program;
    let options = match parse::<D>() {
        Ok(options) => options,
        Err(error) if !error.use_stderr() => {
            // Help or version was asked for.
            return if error.print().is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
        Err(error) => {
            eprintln!("{name}: {}", one_line(&error));
            return ExitCode::from(2);
        }
    };
    log_to_stderr();
    end_with_panics();
    match start::<D>(options.kit, options.device) {
        Ok(running) => running.wait(),
        Err(error) => {
            eprintln!("{name}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn parse<D: Device>() -> Result<CommandLine<D::Options>, clap::Error> {
    let matches = CommandLine::<D::Options>::command()
        .name(D::CAPABILITIES.program)
        .about(D::CAPABILITIES.about)
        .after_help(
            "Environment:\n  GODWIT_LOG     log level: error, warn, info, debug, trace [default: info]\n  \
             NOTIFY_SOCKET, WATCHDOG_USEC\n                 set by systemd",
        )
        .try_get_matches()?;
    CommandLine::from_arg_matches(&matches)
}

fn print_capabilities(capabilities: &Capabilities) -> ExitCode {
    let json = serde_json::json!({
        "type": capabilities.device_type,
        "features": capabilities.features,
    });
    match writeln!(io::stdout(), "{json:#}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env(LOG_ENV).unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        .init();
}

/// A thread that panics takes the process with it: without one of its threads it would neither
/// serve nor end.
fn end_with_panics() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

/// What the main thread needs once the process runs.
struct Running {
    signals: SignalFd,
    ending: Ending,
    connection: Connection,
    stopping: Arc<AtomicBool>,
    readiness: Readiness,
}

fn start<D: Device>(
    options: KitOptions,
    device_options: D::Options,
) -> Result<Running, StartError> {
    migration::frame::warm_up();
    let host = |what: &str, error: Errno| HostError::new(what, error);
    let signals = block_signals().map_err(|error| host("signals cannot be received", error))?;
    let ending = Ending::new().map_err(|error| host("cannot make an eventfd", error))?;
    let unit = options
        .unit
        .clone()
        .map_or_else(|| UnitId::new(<D::SavedState as Schema>::KIND), Ok)?;
    let config_change = ConfigChange::default();
    let health = Health::default();
    let mut registry = Registry::with_prefix("godwit");
    let metrics = Metrics::register(&mut registry);
    let device = D::open(
        device_options,
        &mut Kit {
            registry: registry.sub_registry_with_prefix(<D::SavedState as Schema>::KIND),
            config_change: config_change.clone(),
            health: health.clone(),
        },
    )?;
    check_queues(&device)?;
    if !options.incoming {
        device.acquire(PREDECESSOR_PATIENCE)?;
    }
    let workers = device.workers()?;
    let thread_of = threads_of_queues(&device, &workers)?;
    let mut threads = Vec::new();
    for Assignment { worker, queues } in workers {
        let thread = QueueThread::new(worker, &queues, ending.clone(), health.clone())?;
        threads.push((thread, queues));
    }
    let front = open_front(&options)?;
    let link = options.control_fd.map(Link::new).transpose()?;
    let metrics_listener = options
        .metrics_socket
        .as_deref()
        .map(|path| listen::bind("--metrics-socket", path))
        .transpose()?;
    let readiness = Readiness::connect()
        .map_err(|error| HostError::new("cannot reach the socket in NOTIFY_SOCKET", error))?;

    match options.sandbox {
        Switch::On => sandbox::enter(D::IOCTLS)?,
        Switch::Off => tracing::warn!("running without sandbox"),
    }

    let mut rings: Vec<Arc<dyn Rings>> = Vec::new();
    for (thread, queues) in threads {
        rings.push(Arc::clone(&thread) as Arc<dyn Rings>);
        let name = format!("queue-{}", queues.first().map_or(0, |queue| queue.get()));
        spawn(name, STACK, move || thread.run())?;
    }
    if let Some(listener) = metrics_listener {
        metrics_server::start(listener, registry)
            .map_err(|error| HostError::new("cannot start the metrics thread", error))?;
    }
    let services = Arc::new(Services {
        device: Arc::new(device),
        held: Mutex::new(!options.incoming),
        queues: QueueThreads::new(rings, thread_of),
        unit,
        prefault: Prefaulter::new(options.prefault, health.clone()),
        metrics,
        config_change,
        health,
    });
    if let Some(link) = link {
        link.start(Arc::clone(&services))?;
    }
    let running = Running {
        signals,
        ending: ending.clone(),
        connection: Connection::default(),
        stopping: Arc::default(),
        readiness,
    };
    let connection = running.connection.clone();
    let stopping = Arc::clone(&running.stopping);
    spawn("control".to_owned(), 4 * STACK, move || {
        match serve_front(front, &services, &connection, &stopping) {
            Ok(()) => ending.finish(),
            Err(error) => ending.fail(&*error),
        }
    })?;
    running.readiness.ready();
    Ok(running)
}

/// Starts a thread whose stack has `stack` bytes of address space.
pub(crate) fn spawn(
    name: String,
    stack: usize,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), HostError> {
    let what = format!("cannot start thread {name}");
    thread::Builder::new()
        .name(name)
        .stack_size(stack)
        .spawn(work)
        .map_err(|error| HostError::new(what, error))?;
    Ok(())
}

fn open_front(options: &KitOptions) -> Result<Front, OptionError> {
    if options.socket.fd.is_some() && options.socket.fd == options.control_fd {
        return Err(OptionError {
            option: "--control-fd",
            value: options.control_fd.unwrap_or(-1).to_string(),
            problem: "is the descriptor of --fd too; hand over two sockets".to_owned(),
        });
    }
    match (&options.socket.socket_path, options.socket.fd) {
        (Some(path), _) => listen::bind("--socket-path", path).map(Front::Listening),
        // The command line has one of the two.
        (None, fd) => listen::inherit("--fd", fd.unwrap_or(-1)),
    }
}

fn block_signals() -> Result<SignalFd, Errno> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

fn check_queues<D: Device>(device: &D) -> Result<(), StartError> {
    let (count, size) = (device.queue_count(), device.max_queue_size());
    if count == 0 || count > MAX_QUEUES {
        return Err(StartError::Device(format!(
            "{count} queues, possible are 1 to {MAX_QUEUES}"
        )));
    }
    if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
        return Err(StartError::Device(format!(
            "queue size {size} is no power of two up to {MAX_QUEUE_SIZE}"
        )));
    }
    Ok(())
}

/// For each queue the number of its worker; each queue has exactly one.
fn threads_of_queues<D: Device>(
    device: &D,
    workers: &[Assignment<D::Worker>],
) -> Result<Vec<usize>, StartError> {
    let assigned: Vec<(QueueIndex, usize)> = workers
        .iter()
        .enumerate()
        .flat_map(|(at, worker)| worker.queues.iter().map(move |queue| (*queue, at)))
        .collect();
    let distinct: BTreeSet<u16> = assigned.iter().map(|(queue, _)| queue.get()).collect();
    let all: BTreeSet<u16> = (0..device.queue_count()).collect();
    if distinct != all || assigned.len() != all.len() {
        return Err(StartError::Device(
            "every queue must have one worker".to_owned(),
        ));
    }
    let mut thread_of = vec![0; all.len()];
    for (queue, worker) in assigned {
        thread_of[usize::from(queue.get())] = worker;
    }
    Ok(thread_of)
}

type ServeResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

fn serve_front<D: Device>(
    front: Front,
    services: &Arc<Services<D>>,
    connection: &Connection,
    stopping: &AtomicBool,
) -> ServeResult {
    let listener = match front {
        Front::Connected(stream) => return serve(stream, services, connection),
        Front::Listening(listener) => listener,
    };
    while !stopping.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((stream, _)) => serve(stream, services, connection)?,
            Err(error) if is_passing(&error) => {
                tracing::warn!(%error, "a front-end could not connect");
                thread::sleep(Duration::from_millis(100));
            }
            Err(error) => return Err(HostError::new("cannot accept front-ends", error).into()),
        }
    }
    Ok(())
}

/// Whether another `accept` may succeed.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EINTR | Errno::ECONNABORTED | Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
    )
}

impl Running {
    /// Waits for the end of the process.
    fn wait(self) -> ExitCode {
        loop {
            let interval = self.readiness.interval();
            let (signal, ended) = self.wait_once(interval);
            if ended {
                return self.status();
            }
            if signal {
                self.readiness.stopping();
                self.stop();
                return self.status();
            }
            self.readiness.alive();
        }
    }

    fn status(&self) -> ExitCode {
        if self.ending.failed() {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }

    /// Waits for a signal or the end of a thread, no longer than `timeout`.
    fn wait_once(&self, timeout: Option<Duration>) -> (bool, bool) {
        let mut fds = [
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.ending.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
            PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) => fds.map(|fd| fd.any().unwrap_or(false)).into(),
            Err(_) => (false, false),
        }
    }

    /// Ends the session, if there is one, and waits a moment for its requests.
    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        if !self.connection.shut_down() {
            return;
        }
        let mut fds = [PollFd::new(self.ending.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(LAST_REQUESTS).unwrap_or(PollTimeout::MAX);
        if poll(&mut fds, timeout) == Ok(0) {
            tracing::warn!("requests are still in flight; they are left to the next process");
        }
    }
}
