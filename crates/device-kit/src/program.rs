//! A device process from its start to its end.
//!
//! ```text
//! options → sockets handed over → server, own sockets (all is open) → sandbox → threads → READY
//!   main thread     waits for SIGTERM, SIGINT, a failed thread, and feeds the watchdog
//!   control thread  serves one front-end after the other
//!   link thread     with --control-fd: answers the core
//!   threads of the server's own, as one for each worker of queues
//! ```
//! SIGTERM ends the connection, gives requests in flight a moment to end, and ends the process
//! whether they did or not: what is left is in the in-flight record, for whoever comes next.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches};
use migration::schema::{UnitId, UnitIdError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use prometheus_client::registry::Registry;
use thiserror::Error;
use tracing_subscriber::EnvFilter;

use crate::device::{Capabilities, HostError, OptionError};
use crate::ending::{Ending, chain};
use crate::front::{self, Connection};
use crate::health::Health;
use crate::link::Link;
use crate::listen;
use crate::metrics_server;
use crate::options::{CommandLine, ProcessOptions, Switch, one_line};
use crate::readiness::Readiness;
use crate::sandbox::{self, SandboxError};
use crate::server::{Lent, OpenError, Server};

/// Requests in flight at SIGTERM have this long to end.
const LAST_REQUESTS: Duration = Duration::from_secs(1);
/// Address space of the control thread's stack.
const STACK: usize = 1 << 20;
/// The environment variable with the log level, in `tracing`'s syntax.
const LOG_ENV: &str = "GODWIT_LOG";

/// Why the process could not start.
#[derive(Debug, Error)]
enum StartError {
    #[error(transparent)]
    Open(#[from] OpenError),
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
}

/// The whole of the `main` of a program that serves in its own way.
pub fn run_server<S: Server>() -> ExitCode {
    // Before anything else: it needs none of the options that are otherwise required.
    if std::env::args_os().any(|argument| argument == "--print-capabilities") {
        return print_capabilities(&S::CAPABILITIES);
    }
    let name = S::CAPABILITIES.program;
    let options = match parse::<S>() {
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
    match start::<S>(options.process, options.device) {
        Ok(running) => running.wait(),
        Err(error) => {
            eprintln!("{name}: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn parse<S: Server>() -> Result<CommandLine<S::Options>, clap::Error> {
    let matches = CommandLine::<S::Options>::command()
        .name(S::CAPABILITIES.program)
        .about(S::CAPABILITIES.about)
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

fn start<S: Server>(
    options: ProcessOptions,
    device_options: S::Options,
) -> Result<Running, StartError> {
    migration::frame::warm_up();
    let inherited = front::inherit(&options)?;
    let link = options.control_fd.map(Link::new).transpose()?;
    let host = |what: &str, error: Errno| HostError::new(what, error);
    let signals = block_signals().map_err(|error| host("signals cannot be received", error))?;
    let ending = Ending::new().map_err(|error| host("cannot make an eventfd", error))?;
    let unit = options
        .unit
        .clone()
        .map_or_else(|| UnitId::new(S::KIND), Ok)?;
    let health = Health::default();
    let mut registry = Registry::with_prefix("godwit");
    let server = S::open(
        device_options,
        Lent {
            registry: &mut registry,
            health: health.clone(),
            unit,
            ending: ending.clone(),
        },
    )?;
    let front = match inherited {
        Some(front) => front,
        None => front::bind(&options)?,
    };
    let metrics_listener = options
        .metrics_socket
        .as_deref()
        .map(|path| listen::bind("--metrics-socket", path))
        .transpose()?;
    let readiness = Readiness::connect()
        .map_err(|error| HostError::new("cannot reach the socket in NOTIFY_SOCKET", error))?;

    match options.sandbox {
        Switch::On => sandbox::enter(S::IOCTLS)?,
        Switch::Off => tracing::warn!("running without sandbox"),
    }

    let server = Arc::new(server);
    server.start()?;
    if let Some(listener) = metrics_listener {
        metrics_server::start(listener, registry)
            .map_err(|error| HostError::new("cannot start the metrics thread", error))?;
    }
    if let Some(link) = link {
        link.start(Arc::clone(&server), health)?;
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
    spawn("control".to_owned(), STACK, move || {
        match front::serve(front, &server, &connection, &stopping) {
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

fn block_signals() -> Result<SignalFd, Errno> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
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
