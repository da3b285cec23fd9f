//! The owner's side: `org.godwit.Core1` on a socket, peer to peer.
//!
//! Calls become [`Event`]s of the main thread, which answers each; a call that is not
//! answered in time fails and the main thread is not held up by it.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use api::Error;
use api::core::{Control, Core, PATH, State};
use api::migration::Migration;
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use zbus::{Guid, connection};

use super::event::{Command, Event, Events};
use super::migrate::Watcher;
use super::mover::Service as MoverService;

/// How long a command may take before its caller hears that it took too long.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// Where the owner comes from.
#[derive(Debug)]
pub enum Owner {
    /// Whoever connects.
    Listener(UnixListener),
    /// One connection that is there already.
    Stream(UnixStream),
}

#[derive(Clone)]
struct Service {
    events: Events,
    mover: Watcher,
    state: watch::Receiver<State>,
}

impl Service {
    async fn command(&self, command: Command) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        self.events.send(Event::Command(command, answer));
        match tokio::time::timeout(COMMAND_DEADLINE, answered).await {
            Ok(Ok(result)) => result,
            // The machine ended before, or by, this.
            Ok(Err(_)) if command == Command::Terminate => Ok(()),
            Ok(Err(_)) => Err(Error::InvalidState("the machine has ended".into())),
            Err(_) => Err(Error::TimedOut(format!(
                "the machine did not answer {command:?} within {} s",
                COMMAND_DEADLINE.as_secs()
            ))),
        }
    }
}

impl Control for Service {
    async fn pause(&self) -> Result<(), Error> {
        self.command(Command::Pause).await
    }
    async fn resume(&self) -> Result<(), Error> {
        self.command(Command::Resume).await
    }
    async fn reset(&self) -> Result<(), Error> {
        self.command(Command::Reset).await
    }
    async fn power_button(&self) -> Result<(), Error> {
        self.command(Command::PowerButton).await
    }
    async fn terminate(&self) -> Result<(), Error> {
        self.command(Command::Terminate).await
    }
    fn state(&self) -> State {
        *self.state.borrow()
    }
}

/// Serves `owner`, and the process's signals, on a thread of its own as long as the
/// process lives.
pub fn serve(
    owner: Option<Owner>,
    events: Events,
    state: watch::Receiver<State>,
    mover: Watcher,
) -> io::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let signals = {
        let _context = runtime.enter();
        Signals::listen()?
    };
    let service = Service {
        events: events.clone(),
        mover,
        state,
    };
    let serve = move || {
        runtime.spawn(signals.pass_on(events));
        runtime.block_on(async move {
            let result = match owner {
                Some(Owner::Listener(listener)) => accept(listener, service).await,
                Some(Owner::Stream(stream)) => connection(stream, service).await,
                None => Ok(()),
            };
            if let Err(error) = result {
                tracing::error!(%error, "the machine cannot be controlled any more");
            }
            // Signals are still heard.
            std::future::pending::<()>().await;
        });
    };
    thread::Builder::new()
        .name("control".into())
        .spawn(serve)
        .map(drop)
}

/// What the host's administrator wants.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    power: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            // What `machinectl poweroff` sends.
            power: signal(SignalKind::from_raw(nix::libc::SIGRTMIN() + 4))?,
        })
    }

    async fn pass_on(mut self, events: Events) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => events.send(Event::Terminated),
                _ = self.interrupt.recv() => events.send(Event::Terminated),
                _ = self.power.recv() => events.send(Event::PowerButton),
            }
        }
    }
}

async fn accept(listener: UnixListener, service: Service) -> zbus::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let (stream, service) = (stream.into_std()?, service.clone());
        tokio::spawn(async move {
            if let Err(error) = connection(stream, service).await {
                tracing::warn!(%error, "a control connection failed");
            }
        });
    }
}

/// Serves one connection and tells it each change of the state.
async fn connection(stream: UnixStream, service: Service) -> zbus::Result<()> {
    stream.set_nonblocking(true)?;
    let mut state = service.state.clone();
    let mover = MoverService::new(service.events.clone(), service.mover.clone());
    let guid = Guid::generate();
    let connection = connection::Builder::unix_stream(stream)
        .server(guid)
        .p2p()
        .serve_at(PATH, Migration(mover))
        .serve_at(PATH, Core(service))
        .build()
        .await?;
    let core = connection
        .object_server()
        .interface::<_, Core<Service>>(PATH)
        .await?;
    while state.changed().await.is_ok() {
        core.get()
            .await
            .state_changed(core.signal_emitter())
            .await?;
    }
    Ok(())
}
