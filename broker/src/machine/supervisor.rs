//! The task that watches a running machine: it alone ends and restarts processes.
//!
//! - A device's process ends: after a moment a new one takes its place, on a new socket that
//!   the core is handed. Requests in flight are in the core's record, and done by the new one.
//! - The core ends: its devices are ended, the folder goes, and the state says why.

use std::sync::Arc;
use std::time::Duration;

use api::Error;
use api::core::CoreProxy;
use api::device::State as DeviceState;
use api::machine::State;
use nix::sys::signal::Signal;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::device::RunningDevice;
use super::instance::Instance;
use super::state::MachineState;
use super::{DeviceStatus, Machine, foreign};
use crate::definition::{Device, DeviceKind};
use crate::folder::{last_line, last_words};
use crate::host::Host;
use crate::migration::Mover;
use crate::process::{Ended, Process};
use crate::publish::Change;

/// How long a device process may take to end when the core has.
const DEVICE_DEADLINE: Duration = Duration::from_secs(3);

/// How soon it is looked again whether a machine still moves that has lost a device.
const MOVING: Duration = Duration::from_millis(100);

/// A device whose front-end is gone ends by itself: so soon after it the core has ended too,
/// if that is why.
const CORE_DEADLINE: Duration = Duration::from_millis(200);

/// What is wanted of the supervisor.
#[derive(Debug)]
pub(super) enum Command {
    /// End the core's process at once.
    Kill,
    /// The machine is another generation of processes from now on.
    Succeed {
        /// It.
        instance: Box<Instance>,
        /// Who waits until nothing is left of the former.
        answer: oneshot::Sender<()>,
    },
    /// Replace the process of a device.
    Restart {
        /// Which one.
        at: usize,
        /// Who waits for it.
        answer: oneshot::Sender<Result<(), Error>>,
    },
}

#[derive(Debug)]
enum Event {
    CoreEnded(Ended),
    DeviceEnded {
        at: usize,
        generation: u64,
        ended: Ended,
    },
    /// It is time to start a device again.
    Due {
        at: usize,
        generation: u64,
    },
    CoreState(api::core::State),
    /// A back-end that is not ours is lost, or has come back.
    Foreign {
        at: usize,
        connected: bool,
    },
}

pub(super) struct Supervisor {
    host: Arc<Host>,
    machine: Arc<Machine>,
    core: Arc<Process>,
    devices: Vec<RunningDevice>,
    commands: Receiver<Command>,
    events: Receiver<Event>,
    tell: Sender<Event>,
    /// Tasks that wait for something on its behalf.
    waiting: Vec<AbortHandle>,
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        for task in &self.waiting {
            task.abort();
        }
    }
}

impl Supervisor {
    pub(super) fn new(
        host: &Arc<Host>,
        machine: &Arc<Machine>,
        core: Arc<Process>,
        commands: Receiver<Command>,
    ) -> Self {
        let (tell, events) = channel(64);
        Self {
            host: Arc::clone(host),
            machine: Arc::clone(machine),
            core,
            devices: Vec::new(),
            commands,
            events,
            tell,
            waiting: Vec::new(),
        }
    }

    /// Takes the devices, in the order of the definition.
    pub(super) fn adopt_devices(&mut self, devices: Vec<RunningDevice>) {
        self.devices = devices;
    }

    /// Gives them back, when the machine did not start after all.
    pub(super) fn into_devices(mut self) -> Vec<RunningDevice> {
        std::mem::take(&mut self.devices)
    }

    /// Writes down what runs, and lets the guest run.
    pub(super) async fn begin(
        &mut self,
        core: &CoreProxy<'static>,
        paused: bool,
    ) -> Result<(), Error> {
        self.save();
        if !paused {
            core.resume().await?;
        }
        for device in &mut self.devices {
            device.shares_image = false;
        }
        self.machine.update(|inner| {
            inner.state = if paused {
                State::Paused
            } else {
                State::Running
            };
        });
        self.watch(core);
        Ok(())
    }

    /// Watches all processes, and what the core says of itself.
    pub(super) fn watch(&mut self, core: &CoreProxy<'static>) {
        let (process, tell) = (Arc::clone(&self.core), self.tell.clone());
        self.wait(async move {
            let ended = process.ended().await;
            // A supervisor that is gone needs to know nothing.
            let _ = tell.send(Event::CoreEnded(ended)).await;
        });
        for at in 0..self.devices.len() {
            self.watch_device(at);
            self.watch_foreign(at, core);
            self.watch_balloon(at, core);
        }
        let (core, tell) = (core.clone(), self.tell.clone());
        self.wait(async move {
            let _ = follow(core, tell).await;
        });
    }

    fn watch_balloon(&mut self, at: usize, core: &CoreProxy<'static>) {
        if let DeviceKind::Balloon(_) = self.devices[at].device.kind {
            let (core, machine) = (core.clone(), Arc::clone(&self.machine));
            self.wait(async move {
                // It ends with the core, whose end somebody else sees.
                let _ = machine.follow_balloon(at, core).await;
            });
        }
    }

    fn watch_foreign(&mut self, at: usize, core: &CoreProxy<'static>) {
        let Device { id, kind } = self.devices[at].device.clone();
        let DeviceKind::VhostUser(other) = kind else {
            return;
        };
        let (core, tell) = (core.clone(), self.tell.clone());
        self.wait(async move {
            let tell = |connected| {
                let tell = tell.clone();
                async move {
                    let _ = tell.send(Event::Foreign { at, connected }).await;
                }
            };
            // It ends with the core, whose end somebody else sees.
            let _ = foreign::keep(&core, &id, &other.socket, tell).await;
        });
    }

    /// A back-end that is not ours is lost, or another has taken over.
    fn foreign(&mut self, at: usize, connected: bool) {
        let device = &mut self.devices[at];
        device.reconnects += u32::from(connected);
        let reconnects = device.reconnects;
        self.update_device(at, |status| {
            status.reconnects = reconnects;
            (status.state, status.reason) = match connected {
                true => (DeviceState::Running, String::new()),
                false => (DeviceState::Restarting, "its back-end is gone".into()),
            };
        });
        self.save();
    }

    fn wait(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.waiting.retain(|task| !task.is_finished());
        self.waiting.push(tokio::spawn(work).abort_handle());
    }

    fn watch_device(&mut self, at: usize) {
        let device = &self.devices[at];
        let Some(process) = device.process.clone() else {
            if device.is_ours() {
                // It ended while nobody watched.
                self.due(at, Duration::ZERO);
            }
            return;
        };
        let (generation, tell) = (device.generation, self.tell.clone());
        self.wait(async move {
            let ended = process.ended().await;
            let event = Event::DeviceEnded {
                at,
                generation,
                ended,
            };
            let _ = tell.send(event).await;
        });
    }

    fn due(&mut self, at: usize, after: Duration) {
        let (generation, tell) = (self.devices[at].generation, self.tell.clone());
        self.wait(async move {
            tokio::time::sleep(after).await;
            let _ = tell.send(Event::Due { at, generation }).await;
        });
    }

    /// Watches until the machine has ended.
    pub(super) async fn run(mut self) {
        loop {
            let event = tokio::select! {
                Some(event) = self.events.recv() => event,
                Some(command) = self.commands.recv() => {
                    match command {
                        Command::Kill => self.core.signal(Signal::SIGKILL),
                        Command::Succeed { instance, answer } => {
                            self.succeed(*instance).await;
                            // A caller that does not wait is not told.
                            let _ = answer.send(());
                        }
                        Command::Restart { at, answer } => {
                            // A caller that does not wait is not told.
                            let _ = answer.send(self.replace(at).await);
                        }
                    }
                    continue;
                }
            };
            match event {
                Event::CoreEnded(ended) => match self.successor().await {
                    Some((instance, answer)) => {
                        self.succeed(*instance).await;
                        let _ = answer.send(());
                    }
                    None => {
                        self.end(ended).await;
                        return;
                    }
                },
                Event::CoreState(state) => self.machine.set_running_state(state),
                Event::Foreign { at, connected } => self.foreign(at, connected),
                Event::DeviceEnded {
                    at,
                    generation,
                    ended,
                } => {
                    if self.devices[at].generation == generation {
                        self.lost(at, ended).await;
                    }
                }
                Event::Due { at, generation } => {
                    if self.devices[at].generation == generation
                        && self.devices[at].process.is_none()
                    {
                        if self.machine.is_moving() {
                            // Its image may be another host's by now.
                            self.due(at, MOVING);
                        } else {
                            self.try_restart(at).await;
                        }
                    }
                }
            }
        }
    }

    /// The generation to which a machine goes whose core has ended, if it goes within this host.
    async fn successor(&mut self) -> Option<(Box<Instance>, oneshot::Sender<()>)> {
        let mut leaving = self.machine.leaving.subscribe();
        loop {
            tokio::select! {
                biased;
                Some(command) = self.commands.recv() => {
                    // Nothing else can be done with it now.
                    if let Command::Succeed { instance, answer } = command {
                        return Some((instance, answer));
                    }
                }
                // The sender lives as long as the machine.
                _ = leaving.wait_for(|leaving| !*leaving) => return None,
            }
        }
    }

    /// Another generation of processes has the machine.
    async fn succeed(&mut self, mut instance: Instance) {
        for task in self.waiting.drain(..) {
            task.abort();
        }
        // What the former generation has still said is of no interest.
        (self.tell, self.events) = channel(64);
        let former = self
            .devices
            .iter()
            .filter_map(|device| device.process.as_ref());
        for process in former.chain([&self.core]) {
            process.signal(Signal::SIGTERM);
        }
        for at in 0..self.devices.len() {
            self.drop_process(at).await;
        }
        if tokio::time::timeout(DEVICE_DEADLINE, self.core.ended())
            .await
            .is_err()
        {
            self.core.signal(Signal::SIGKILL);
        }
        let name = self.machine.name.clone();
        self.host.folder.settle(&mut instance.place, &name);
        for (device, former) in instance.devices.iter_mut().zip(&self.devices) {
            device.reconnects = former.reconnects;
            device.shares_image = false;
        }
        if let Ok(live) = self.machine.live("moved") {
            self.machine.install(&mut instance, live.commands);
        }
        self.core = Arc::clone(&instance.core);
        self.devices = instance.devices;
        self.watch(&instance.proxy);
        // Changes are told; what it is now is not.
        if let Ok(state) = instance.proxy.state().await {
            self.machine.set_running_state(state);
        }
        self.save();
    }

    fn update_device(&self, at: usize, change: impl FnOnce(&mut DeviceStatus)) {
        let id = self.devices[at].device.id.clone();
        {
            let inner = &mut *self.machine.lock();
            if let Some(status) = inner.devices.get_mut(at) {
                change(status);
            }
        }
        let machine = self.machine.name.clone();
        self.machine.publisher.send(Change::Device(machine, id));
    }

    /// A device's process has ended by itself.
    async fn lost(&mut self, at: usize, ended: Ended) {
        let name = self.machine.name.clone();
        if !matches!(ended, Ended::Signal(_))
            && tokio::time::timeout(CORE_DEADLINE, self.core.ended())
                .await
                .is_ok()
        {
            // It ended because the core did, whose end is the next event.
            self.devices[at].process = None;
            return;
        }
        let device = &mut self.devices[at];
        device.process = None;
        let why = device.obituary(&self.host, &name, ended);
        tracing::warn!(machine = %name, device = %device.device.id, why, "a device process ended");
        self.host.metrics.device_ended(device.device.kind_name());
        let id = device.device.id.clone();
        self.end_move(&format!("device {id} ended: {why}"));
        self.retry(at, &why);
    }

    /// A machine that has lost a device does not move; it goes on here with a new one.
    fn end_move(&mut self, why: &str) {
        let Some(job) = self.machine.job().filter(|_| self.machine.is_moving()) else {
            return;
        };
        job.migration(|migration| migration.trouble = Some(why.to_owned()));
        if let Ok(core) = self.machine.core("asked") {
            self.wait(async move {
                if let Ok(mover) = Mover::of(&core).await {
                    // After the commit it is too late, and the destination has its own device.
                    let _ = mover.0.cancel().await;
                }
            });
        }
    }

    /// Starts a device again later, or gives up.
    fn retry(&mut self, at: usize, why: &str) {
        match self.devices[at].next_restart() {
            Some(after) => {
                self.update_device(at, |status| {
                    status.state = DeviceState::Restarting;
                    status.process = None;
                    status.reason = why.to_owned();
                });
                self.due(at, after);
            }
            None => self.update_device(at, |status| {
                status.state = DeviceState::Failed;
                status.process = None;
                status.reason = format!("it ended too often; the last time: {why}");
            }),
        }
        self.save();
    }

    async fn try_restart(&mut self, at: usize) {
        match self.start_device(at).await {
            Ok(()) => {}
            Err(error) => {
                let name = &self.machine.name;
                tracing::warn!(machine = %name, %error, "a device process was not started");
                self.drop_process(at).await;
                self.retry(at, &error.to_string());
            }
        }
    }

    /// Starts a device's process and hands its socket to the core.
    async fn start_device(&mut self, at: usize) -> Result<(), Error> {
        let core = self.machine.core("given a new device process")?;
        let name = self.machine.name.clone();
        let ends = self.devices[at].start(&self.host, &self.machine).await?;
        let device = &self.devices[at];
        let id = device.device.id.clone();
        let attached = core.attach_backend(id.as_str(), ends.backend.into()).await;
        attached.map_err(|error| match error {
            Error::ZBus(error) => Error::MachineFailed(format!(
                "the core of {name} does not answer, so it did not get the new process of {id}: \
                 {error}"
            )),
            refused => refused,
        })?;
        if let Err(error) = core.attach_link(id.as_str(), ends.link.into()).await {
            // The device works without.
            tracing::warn!(machine = %name, device = %id, %error, "its core cannot ask it anything");
        }
        let process = device.process.as_ref().map(|process| process.id().clone());
        let device = &mut self.devices[at];
        device.reconnects += 1;
        let reconnects = device.reconnects;
        self.update_device(at, |status| {
            status.state = DeviceState::Running;
            status.process = process;
            status.reconnects = reconnects;
        });
        self.host
            .metrics
            .device_restarted(self.devices[at].device.kind_name());
        self.watch_device(at);
        self.save();
        Ok(())
    }

    /// Ends the process of a device, whatever it does.
    async fn drop_process(&mut self, at: usize) {
        let device = &mut self.devices[at];
        // Its end is expected.
        device.generation += 1;
        if let Some(process) = device.process.take() {
            process.signal(Signal::SIGTERM);
            if tokio::time::timeout(DEVICE_DEADLINE, process.ended())
                .await
                .is_err()
            {
                process.signal(Signal::SIGKILL);
                // A killed process ends, or the kernel is broken.
                let _ = tokio::time::timeout(DEVICE_DEADLINE, process.ended()).await;
            }
        }
    }

    /// Replaces the process of a device, as somebody wants it.
    async fn replace(&mut self, at: usize) -> Result<(), Error> {
        let Some(device) = self.devices.get_mut(at) else {
            return Err(Error::NoSuchDevice(format!(
                "{} has no device {at}",
                self.machine.name
            )));
        };
        if !device.is_ours() {
            return Err(Error::InvalidState(format!(
                "the process of {} is not the broker's: restart it where it was started",
                device.device.id
            )));
        }
        device.forgive();
        self.update_device(at, |status| status.state = DeviceState::Restarting);
        self.drop_process(at).await;
        let result = self.start_device(at).await;
        if let Err(error) = &result {
            self.drop_process(at).await;
            self.retry(at, &error.to_string());
        }
        result
    }

    /// The core has ended: so does everything else.
    pub(super) async fn end(&mut self, ended: Ended) {
        let name = self.machine.name.clone();
        self.machine.update(|inner| {
            inner.state = State::Stopping;
            inner.live = None;
        });
        for device in self
            .devices
            .iter()
            .filter_map(|device| device.process.as_ref())
        {
            device.signal(Signal::SIGTERM);
        }
        for at in 0..self.devices.len() {
            self.drop_process(at).await;
        }
        let (state, reason) = self.verdict(ended);
        if state == State::Failed {
            tracing::error!(machine = %name, reason, "a machine failed");
        }
        self.host.metrics.machine_ended(state == State::Failed);
        self.host.folder.remove_machine(&name);
        self.machine.update(|inner| {
            inner.state = state;
            inner.reason = reason;
            inner.process = None;
            inner.started_usec = 0;
            inner.devices.fill(DeviceStatus::OFF);
        });
        for device in &self.devices {
            let id = device.device.id.clone();
            self.machine
                .publisher
                .send(Change::Device(name.clone(), id));
        }
        self.machine.gone.send_replace(true);
        if self.machine.goes_with_its_end() {
            self.machine.publisher.send(Change::Ended(name));
        }
    }

    /// What became of the machine: what the core said last, or else how it ended.
    fn verdict(&self, ended: Ended) -> (State, String) {
        let name = &self.machine.name;
        let said = last_line(&self.host.folder.machine(name).join("end"));
        match said.as_deref().and_then(|line| line.split_once(' ')) {
            Some(("0", why)) => (State::Off, why.to_owned()),
            Some((_, why)) => (State::Failed, why.to_owned()),
            None => {
                let log = self.host.folder.logs(name).join("core.log");
                let line = last_words(&log).filter(|_| !matches!(ended, Ended::Signal(_)));
                let words =
                    line.map_or_else(String::new, |line| format!("; its last words: {line}"));
                (State::Failed, format!("the core failed: {ended}{words}"))
            }
        }
    }

    /// Writes down what a later broker needs.
    fn save(&self) {
        let state = MachineState::new(&self.machine, Some(&self.core), &self.devices, true);
        let name = &self.machine.name;
        if let Err(error) = state.save(&self.host.folder.machine(name)) {
            tracing::error!(machine = %name, %error, "another broker could not adopt it");
        }
    }
}

/// Tells each change of the core's state.
async fn follow(core: CoreProxy<'static>, tell: Sender<Event>) -> zbus::Result<()> {
    let cached = CoreProxy::new(core.inner().connection()).await?;
    let mut changes = cached.receive_state_changed().await;
    while let Some(change) = api::next(&mut changes).await {
        if tell
            .send(Event::CoreState(change.get().await?))
            .await
            .is_err()
        {
            break;
        }
    }
    Ok(())
}
