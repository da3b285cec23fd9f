//! The owner's side: `org.godwit.Core1` on a socket, peer to peer or as a private bus.
//!
//! Calls become [`Event`]s of the main thread, which answers each; a call that is not
//! answered in time fails and the main thread is not held up by it.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use api::Error;
use api::core::{Control, Core, DeviceStatus, PATH, SERVICE, State};
use api::migration::Migration;
use api::private_bus::PrivateBus;
use nix::unistd::geteuid;
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use zbus::OwnedFd;

use super::devices::Devices;
use super::event::{Attachment, Command, Event, Events};
use super::migrate::Watcher;
use super::mover::Service as MoverService;

/// How long a command may take before its caller hears that it took too long.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// How long a caller that does not read its answer may keep the process from ending.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);

/// Where the owner comes from.
#[derive(Debug)]
pub enum Owner {
    /// Whoever connects.
    Listener(UnixListener),
    /// One connection that is there already.
    Stream(UnixStream),
}

/// What is told to the owner unasked.
#[derive(Debug)]
pub struct News {
    /// Where the machine is in its life.
    pub state: watch::Receiver<State>,
    /// Names of devices of which something changed.
    pub devices: mpsc::Receiver<String>,
}

#[derive(Clone)]
struct Service {
    events: Events,
    mover: Watcher,
    state: watch::Receiver<State>,
    devices: Arc<Devices>,
}

impl Service {
    async fn command(&self, command: Command) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        self.events.send(Event::Command(command, answer));
        match wait(&format!("{command:?}"), answered).await {
            // The machine ended before, or by, this.
            Err(Error::InvalidState(_)) if command == Command::Terminate => Ok(()),
            result => result,
        }
    }

    async fn attach(&self, what: &str, attachment: Attachment) -> Result<(), Error> {
        let (answer, answered) = oneshot::channel();
        self.events.send(Event::Attach(attachment, answer));
        wait(what, answered).await
    }
}

/// Waits for the main thread's answer.
async fn wait(what: &str, answered: oneshot::Receiver<Result<(), Error>>) -> Result<(), Error> {
    match tokio::time::timeout(COMMAND_DEADLINE, answered).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Error::InvalidState("the machine has ended".into())),
        Err(_) => Err(Error::TimedOut(format!(
            "the machine did not answer {what} within {} s",
            COMMAND_DEADLINE.as_secs()
        ))),
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
    async fn attach_backend(&self, device: &str, socket: OwnedFd) -> Result<(), Error> {
        let backend = Attachment::Backend {
            device: device.to_owned(),
            socket: socket.into(),
        };
        self.attach("AttachBackend", backend).await
    }
    async fn attach_console(&self, socket: OwnedFd) -> Result<(), Error> {
        let console = Attachment::Console(socket.into());
        self.attach("AttachConsole", console).await
    }
    async fn attach_link(&self, device: &str, socket: OwnedFd) -> Result<(), Error> {
        self.devices.attach_link(device, socket.into())
    }
    async fn device_status(&self, device: &str) -> Result<DeviceStatus, Error> {
        self.devices.status(device).await
    }
    async fn balloon(&self, device: &str) -> Result<(u64, u64, BTreeMap<String, u64>), Error> {
        let size = self.devices.balloon_size(device).await?;
        Ok((size.target, size.actual, size.statistics))
    }
    async fn set_balloon_target(&self, device: &str, bytes: u64) -> Result<(), Error> {
        self.devices.set_balloon_target(device, bytes).await
    }
    async fn balloon_statistics_interval(&self, device: &str) -> Result<u32, Error> {
        self.devices.balloon_statistics_interval(device).await
    }
    async fn set_balloon_statistics_interval(
        &self,
        device: &str,
        seconds: u32,
    ) -> Result<(), Error> {
        self.devices
            .set_balloon_statistics_interval(device, seconds)
            .await
    }
    fn devices(&self) -> Vec<String> {
        self.devices.names()
    }
    fn state(&self) -> State {
        *self.state.borrow()
    }
}

/// Serves `owner`, and the process's signals, on a thread of its own until the machine has
/// ended, which is when the state has no sender any more, and the last caller has its answer.
pub fn serve(
    owner: Option<Owner>,
    events: Events,
    news: News,
    devices: Devices,
    mover: Watcher,
) -> io::Result<JoinHandle<()>> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let signals = {
        let _context = runtime.enter();
        Signals::listen()?
    };
    let service = Service {
        events: events.clone(),
        mover,
        state: news.state.clone(),
        devices: Arc::new(devices),
    };
    let mut state = news.state.clone();
    let serve = async move {
        if let Some(owner) = owner
            && let Err(error) = listen(owner, service, news).await
        {
            tracing::error!(%error, "the machine cannot be controlled any more");
        }
        // Signals are still heard.
        while state.changed().await.is_ok() {}
    };
    thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            runtime.spawn(signals.pass_on(events));
            runtime.block_on(serve);
        })
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

/// Serves whoever `owner` is, and tells them the news, until the machine's end.
async fn listen(owner: Owner, service: Service, mut news: News) -> zbus::Result<()> {
    let (bus, connection) = PrivateBus::new(SERVICE, geteuid().as_raw())?;
    let mover = MoverService::new(service.events.clone(), service.mover.clone());
    let connection = connection
        .serve_at(PATH, Migration(mover))
        .serve_at(PATH, Core(service))
        .build()
        .await?;
    match owner {
        Owner::Listener(listener) => {
            listener.set_nonblocking(true)?;
            tokio::spawn(
                bus.clone()
                    .listen(tokio::net::UnixListener::from_std(listener)?),
            );
        }
        Owner::Stream(stream) => {
            stream.set_nonblocking(true)?;
            let stream = tokio::net::UnixStream::from_std(stream)?;
            let bus = bus.clone();
            tokio::spawn(async move { bus.serve(stream).await });
        }
    }
    let core = connection
        .object_server()
        .interface::<_, Core<Service>>(PATH)
        .await?;
    let emitter = core.signal_emitter();
    loop {
        tokio::select! {
            changed = news.state.changed() => match changed {
                Ok(()) => core.get().await.state_changed(emitter).await?,
                Err(_) => break,
            },
            Some(device) = news.devices.recv() => {
                Core::<Service>::device_changed(emitter, &device).await?;
            }
        }
    }
    bus.drain(DRAIN_DEADLINE).await;
    Ok(())
}
