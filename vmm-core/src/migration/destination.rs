//! The destination, on the main thread of a machine that was made and has not run.
//!
//! ```text
//! Hello ─▶ obstacles? ─▶ Welcome
//! Wiring ─▶ PCI, interrupts, doorbells, rings in place ─▶ Ready (▮A)    (any number of times)
//! Copied ─▶ every device maps what is there, and waits for its twin's state ─▶ Prepared (▮A)
//! Stopping ─▶ every device loads from its socket
//! Core ─▶ vCPUs, chips, PCI ─▶ wait for devices and memory ─▶ Loaded (▮E)
//! Commit ─▶ devices take their locks and start ▮F ─▶ vCPUs run ─▶ Running
//! ```
//! Whatever fails before *Commit* makes the destination discard itself: it says so, and never runs.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use migration::channel::Cancel;
use migration::commit::{Destination, DestinationInput};
use migration::link::{Link, LinkError};
use migration::report::{Costs, Recorder, micros};
use migration::wire::{Blob, Definition, ToDestination, ToSource};

use super::barrier::{self, Arrival, Barrier};
use super::definition::{available, used};
use super::error::system;
use super::obstacles::{lack_of_memory, obstacles};
use super::ram::RamReceiver;
use super::saved_state::{CoreState, DeviceWiring, WiringState, from_blob};
use super::setup::Sockets;
use super::states::StateSockets;
use super::switchover::STOPPED;
use super::unit::{Crew, Unit};
use super::without::{Mechanism, Without};
use super::{ANSWER_DEADLINE, BLACKOUT_DEADLINE, LAST_WORD_DEADLINE, MigrationError};
use crate::costs;
use crate::memory::Memory;

/// The first one finds nothing in the caches, and another may be interrupted: the shortest counts.
const REHEARSALS: u32 = 8;
/// How long devices may take to map memory.
const PREFAULT_DEADLINE: Duration = Duration::from_secs(60);
/// Messages that are kept meanwhile.
const MOST_HEARD: usize = 64;
/// How long a destination waits for its source to come at all.
const HELLO_DEADLINE: Duration = Duration::from_secs(600);

/// What the destination needs of its machine.
pub trait NewHost {
    /// Takes the core's state over, without the devices'.
    fn load_core(&mut self, core: CoreState) -> Result<(), MigrationError>;
    /// Saves a core's state and loads it again, of a machine that is yet to come.
    fn rehearse(&mut self) -> Result<(), MigrationError>;
    /// Takes note, for who asks when this process is no more, that the machine is here. Fails if
    /// it may not be any more.
    fn arrived(&mut self) -> Result<(), MigrationError>;
    /// Lets vCPUs run, if the machine ran.
    fn run(&mut self, running: bool);
}

/// What a destination is made of.
pub struct Arriving {
    /// Its sockets.
    pub sockets: Sockets,
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// Both sides map the same memory.
    pub shared_memory: bool,
    /// Devices, in order.
    pub units: Vec<Arc<Unit>>,
    /// What the machine is.
    pub definition: Definition,
    /// What is left out.
    pub without: Without,
    /// Ends it.
    pub cancel: Cancel,
}

/// Takes a machine over. When this returns without an error the machine is here.
pub fn receive(arriving: Arriving, host: &mut impl NewHost) -> Result<(), MigrationError> {
    let Arriving {
        mut sockets,
        memory,
        shared_memory,
        units,
        definition,
        without,
        cancel,
    } = arriving;
    let states = sockets.take_states(&units, shared_memory)?;
    let states = StateSockets::new(states, &units, &without)
        .map_err(system("a copy of a device's socket"))?;
    let mut incoming = Incoming {
        link: Link::new(sockets.control, cancel),
        heard: VecDeque::new(),
        state: Destination::Receiving,
        recorder: Recorder::start(),
        crew: Crew::start(&units, &without).map_err(system("a thread for a device"))?,
        units,
        without,
        states,
        loading: None,
        stopping: Instant::now(),
        memory: None,
        layout: None,
        reconnects: Vec::new(),
        running: false,
        before: Costs::default(),
    };
    let result = incoming
        .negotiate(&definition, &memory, shared_memory, sockets.ram.len())
        .and_then(|()| {
            if !shared_memory {
                incoming.memory = Some(RamReceiver::start(sockets.ram, &memory.guest())?);
            }
            incoming.layout = incoming.without.has(Mechanism::Layout).then_some(memory);
            incoming.serve(host)
        });
    if let Err(error) = &result {
        incoming.discard(error);
    }
    result
}

struct Incoming {
    link: Link,
    /// What came while devices were waited for.
    heard: VecDeque<ToDestination>,
    state: Destination,
    recorder: Recorder,
    units: Vec<Arc<Unit>>,
    without: Without,
    crew: Crew,
    states: StateSockets,
    /// Devices that load.
    loading: Option<Receiver<Arrival<()>>>,
    /// When it was said that the machine stops.
    stopping: Instant,
    memory: Option<RamReceiver>,
    /// What is laid out again in the stop, without [`Mechanism::Layout`].
    layout: Option<Arc<Memory>>,
    /// By device: how often its back-end had been replaced when it began to load.
    reconnects: Vec<u32>,
    /// Whether the machine ran at the source.
    running: bool,
    /// What had been done when the blackout began.
    before: Costs,
}

impl Incoming {
    fn negotiate(
        &mut self,
        definition: &Definition,
        memory: &Memory,
        shared: bool,
        channels: usize,
    ) -> Result<(), MigrationError> {
        let hello = match self.link.receive(HELLO_DEADLINE)? {
            ToDestination::Hello(hello) => hello,
            other => return Err(unexpected(&other, "hello")),
        };
        let mut reasons = obstacles(definition, shared, channels, &hello);
        let room = available().map(|bytes| bytes.saturating_add(used(memory)));
        reasons.extend(lack_of_memory(&hello, room));
        if !reasons.is_empty() {
            let refused = ToSource::Refused {
                reasons: reasons.clone(),
            };
            self.say(&refused)?;
            return Err(MigrationError::Refused { reasons });
        }
        self.say(&ToSource::Welcome)
    }

    fn serve(&mut self, host: &mut impl NewHost) -> Result<(), MigrationError> {
        loop {
            if let Some(memory) = &mut self.memory {
                memory.check()?;
            }
            let message = match self.heard.pop_front() {
                Some(message) => message,
                None => self.link.receive(ANSWER_DEADLINE)?,
            };
            match (self.state, message) {
                (Destination::Receiving, ToDestination::Wiring(blob)) => self.wire(&blob)?,
                (Destination::Receiving, ToDestination::Copied) if self.loading.is_none() => {
                    self.prepare(host)?;
                }
                (Destination::Receiving, ToDestination::Alive) => {}
                (Destination::Receiving, ToDestination::Stopping) if self.loading.is_none() => {
                    self.before = costs::now();
                    let remotes = self.units.iter().map(|unit| unit.remote.reconnects());
                    self.reconnects = remotes.collect();
                    let states = self.states.clone();
                    let load = move |number, unit: &Unit| states.load(number, unit);
                    self.stopping = Instant::now();
                    self.loading = Some(self.crew.each(load));
                }
                (Destination::Receiving, ToDestination::Core(blob)) => self.load(&blob, host)?,
                (Destination::Loaded, ToDestination::Commit) => {
                    self.check_devices()?;
                    host.arrived()?;
                    return self.start(host);
                }
                (_, ToDestination::Abort { reason }) => {
                    return Err(MigrationError::GivenUp { reason });
                }
                (_, other) => return Err(unexpected(&other, "what comes next")),
            }
        }
    }

    /// Puts PCI, interrupts, doorbells and rings in place while the source still runs.
    fn wire(&mut self, blob: &Blob) -> Result<(), MigrationError> {
        let begin = Instant::now();
        let wiring: WiringState = from_blob(blob)?;
        restore_devices(&self.units, &wiring.devices)?;
        self.recorder.note("core", "wire", begin, 0);
        if !self.without.has(Mechanism::EarlyMap) {
            let wired = self.crew.each(|_, unit| Ok(unit.pci.wire_ahead()?));
            self.meet(Barrier::A, "wire", &wired)?;
        }
        self.say(&ToSource::Ready)
    }

    /// Lets devices map what memory holds, and wait for their twins' states; and finds out what it
    /// takes to load a machine here.
    fn prepare(&mut self, host: &mut impl NewHost) -> Result<(), MigrationError> {
        let (_, devices) = self.crew.ask(&mut self.recorder)?;
        if !self.without.has(Mechanism::EarlyMap) {
            let states = self.states.clone();
            let prepared = self.crew.each(move |number, unit| {
                unit.remote.prefault(PREFAULT_DEADLINE)?;
                states.load_ahead(number, unit)
            });
            let names = self.crew.names();
            barrier::wait_while(
                |_| hear(&mut self.link, &mut self.heard),
                Barrier::A,
                "prepare",
                names,
                &prepared,
                PREFAULT_DEADLINE,
                &mut self.recorder,
            )?;
        }
        let mut core = Duration::MAX;
        for _ in 0..REHEARSALS {
            let begin = Instant::now();
            host.rehearse()?;
            core = core.min(begin.elapsed());
            self.recorder.note("core", "rehearse", begin, 0);
        }
        self.say(&ToSource::Prepared {
            core_us: micros(core),
            devices_us: micros(devices),
        })
    }

    /// Loads everything that is left, up to barrier E.
    fn load(&mut self, blob: &Blob, host: &mut impl NewHost) -> Result<(), MigrationError> {
        let begin = Instant::now();
        let loading = self.loading.take().ok_or(MigrationError::Unexpected {
            said: "its state",
            expected: "that it stops",
        })?;
        let mut core: CoreState = from_blob(blob)?;
        core.catch_up(self.stopping.elapsed());
        self.running = core.running;
        let devices = std::mem::take(&mut core.devices);
        host.load_core(core)?;
        check_units(&self.units, &devices)?;
        // After the local APICs, which take what was pending. It takes less time than to wake somebody.
        for (unit, device) in self.units.iter().zip(&devices) {
            unit.pci.restore(&device.state)?;
        }
        self.recorder
            .note("core", "load", begin, blob.payload.len() as u64);
        barrier::wait_while(
            |_| hear(&mut self.link, &mut self.heard),
            Barrier::E,
            "load",
            self.crew.names(),
            &loading,
            BLACKOUT_DEADLINE,
            &mut self.recorder,
        )?;
        if let Some(early) = self.heard.pop_front() {
            return Err(unexpected(&early, "nothing"));
        }
        if let Some(memory) = &self.layout {
            let begin = Instant::now();
            lay_out_again(memory)?;
            self.recorder.note("core", "lay out", begin, 0);
        }
        if let Some(memory) = self.memory.take() {
            let begin = Instant::now();
            let bytes = memory.wait(BLACKOUT_DEADLINE)?;
            self.recorder.note("core", "memory", begin, bytes);
        }
        self.check_devices()?;
        self.state = self.state.on(DestinationInput::Loaded).0;
        self.say(&ToSource::Loaded)
    }

    /// Whether the processes that have loaded the devices are still there. Who dies before the
    /// commit was heard is as bad as who never loaded.
    fn check_devices(&self) -> Result<(), MigrationError> {
        for (unit, &reconnects) in self.units.iter().zip(&self.reconnects) {
            unit.remote.check_served_since(reconnects)?;
        }
        Ok(())
    }

    /// The machine is here: devices, then vCPUs, then the word.
    fn start(&mut self, host: &mut impl NewHost) -> Result<(), MigrationError> {
        self.state = self.state.on(DestinationInput::Commit).0;
        let running = self.running;
        let started = self.crew.take_up(running, &mut self.recorder);
        let begin = Instant::now();
        host.run(running && started.is_ok());
        self.recorder.note("core", "run", begin, 0);
        self.recorder
            .note_span("core", STOPPED, self.stopping, begin, 0);
        let problem = started.err().map(|error| crate::machine::chain(&error));
        if let Some(problem) = &problem {
            tracing::error!(
                problem,
                "the machine is here and stays paused; resume it when that is mended"
            );
            let stopped = self.crew.each(|_, unit| Ok(unit.pci.stop()?));
            if let Err(error) = self.crew.meet_again("stop", &stopped, &mut self.recorder) {
                tracing::error!(%error, "a device of a paused machine does not stop");
            }
        }
        self.recorder.set_costs(costs::now().since(&self.before));
        // Nobody waits for that, and a network that is not told learns from the guest's packets.
        for number in 0..self.units.len() {
            self.crew.send(number, |unit| {
                if let Err(error) = unit.remote.announce() {
                    tracing::warn!(%error, "a network is not told where the guest is");
                }
            });
        }
        let timeline = self.recorder.side().clone();
        // The machine is here, whether the source hears it or not; it stays paused if it does not.
        if let Err(error) = self.say(&ToSource::Running { timeline, problem }) {
            tracing::warn!(%error, "the source was not told that the machine is here");
        }
        Ok(())
    }

    /// Gives up: from now on the machine will never run here.
    fn discard(&mut self, error: &MigrationError) {
        let input = match error {
            MigrationError::Link(LinkError::Deadline { .. }) => DestinationInput::Deadline,
            MigrationError::Link(LinkError::Cancelled) => DestinationInput::Failed,
            MigrationError::Link(_) => DestinationInput::LinkLost,
            MigrationError::GivenUp { .. } => DestinationInput::Abort,
            _ => DestinationInput::Failed,
        };
        let (next, word) = self.state.on(input);
        self.state = next;
        self.states.cut();
        if let Some(unit) = self.units.first() {
            unit.remote.end_waits();
        }
        if word.is_some() {
            if let Ok(cancel) = Cancel::new() {
                self.link.set_cancel(cancel);
            }
            let reason = crate::machine::chain(error);
            // A link that is lost says it, too.
            let _ = self
                .link
                .send(&ToSource::Discarded { reason }, LAST_WORD_DEADLINE);
        }
    }

    fn meet<T>(
        &mut self,
        barrier: Barrier,
        what: &'static str,
        arrivals: &Receiver<Arrival<T>>,
    ) -> Result<Vec<T>, MigrationError> {
        let names = self.crew.names();
        let within = BLACKOUT_DEADLINE;
        barrier::wait(barrier, what, names, arrivals, within, &mut self.recorder)
    }

    fn say(&mut self, message: &ToSource) -> Result<(), MigrationError> {
        Ok(self.link.send(message, ANSWER_DEADLINE)?)
    }
}

/// Gives each device the registers that it had, what is wired in the same way already left alone.
pub(super) fn restore_devices(
    units: &[Arc<Unit>],
    devices: &[DeviceWiring],
) -> Result<(), MigrationError> {
    check_units(units, devices)?;
    for (unit, device) in units.iter().zip(devices) {
        unit.pci.restore(&device.state)?;
    }
    Ok(())
}

/// Every region of memory anew, one by one.
fn lay_out_again(memory: &Memory) -> Result<(), MigrationError> {
    for region in memory.regions() {
        let mut layout = memory.begin();
        layout.remove(region.gpa())?;
        layout.commit()?;
        let mut layout = memory.begin();
        layout.add(region)?;
        layout.commit()?;
    }
    Ok(())
}

/// Whether `devices` are those of `units`.
fn check_units(units: &[Arc<Unit>], devices: &[DeviceWiring]) -> Result<(), MigrationError> {
    let ids = devices.iter().map(|device| &device.id);
    if !ids.eq(units.iter().map(|unit| &unit.id)) {
        return Err(MigrationError::Units {
            found: devices.iter().map(|device| device.id.clone()).collect(),
            expected: units.iter().map(|unit| unit.id.clone()).collect(),
        });
    }
    Ok(())
}

/// Keeps what comes while devices are waited for. A source that gives up meanwhile says so, or is gone.
fn hear(link: &mut Link, heard: &mut VecDeque<ToDestination>) -> Result<(), MigrationError> {
    while heard.len() < MOST_HEARD && link.has_message() {
        match link.receive(ANSWER_DEADLINE)? {
            ToDestination::Abort { reason } => return Err(MigrationError::GivenUp { reason }),
            message => heard.push_back(message),
        }
    }
    Ok(())
}

fn unexpected(message: &ToDestination, expected: &'static str) -> MigrationError {
    let said = match message {
        ToDestination::Hello(_) => "hello",
        ToDestination::Wiring(_) => "its wiring",
        ToDestination::Copied => "that its memory is copied",
        ToDestination::Alive => "that it lives",
        ToDestination::Stopping => "that it stops",
        ToDestination::Core(_) => "its state",
        ToDestination::Commit => "commit",
        ToDestination::Abort { .. } => "abort",
    };
    MigrationError::Unexpected { said, expected }
}
