//! The source before the stop, on a thread of its own while the machine runs.
//!
//! ```text
//! Hello ─▶ Welcome ─ logs on ─ wiring ─ round 1 (all pages) ─ Copied ─ round 2 (dirty ones) … ─ stop
//!                                       ▲ Ready may come at any time after Welcome, and twice must
//! ```
//! Whatever fails here leaves the machine as it is: it never stopped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::channel::Cancel;
use migration::link::Link;
use migration::report::{Recorder, Report, Round, micros};
use migration::rings::Forecast;
use migration::wire::{Blob, Hello, MemoryTransfer, PROTOCOL, ToDestination, ToSource};
use tokio::sync::watch;

use super::barrier::Barrier;
use super::converge::{Convergence, Decision, Measured};
use super::definition::used;
use super::error::system;
use super::free_pages::FreePages;
use super::prediction::Around;
use super::ram::{DirtyTracker, Pace, RamSender, WORD_PAGES};
use super::saved_state::{DeviceWiring, WiringState, to_blob};
use super::setup::{MaxDowntime, MigrateOptions, Sockets};
use super::states::StateSockets;
use super::status::{Progress, Status};
use super::switchover::Switchover;
use super::unit::{Crew, Unit};
pub use super::view::View;
use super::wake::wake_up;
use super::without::Without;
use super::{
    ALIVE_EVERY, ANSWER_DEADLINE, LAST_WORD_DEADLINE, MigrationError, READY_DEADLINE, READY_STEP,
    REASON_DEADLINE,
};

/// How often it is looked whether the guest has named its free pages.
const HINT_STEP: Duration = Duration::from_millis(2);

/// Words of pages that are given to the channels at once: 4 MiB of memory, so that the other side
/// hears something in time on a slow link too.
const PIECE_WORDS: usize = 16;

/// A migration to do.
pub struct Job {
    /// The machine.
    pub view: View,
    /// Its way.
    pub sockets: Sockets,
    /// How.
    pub options: MigrateOptions,
    /// What may change of that.
    pub max_downtime: MaxDowntime,
    /// And how not.
    pub without: Without,
    /// Ends it.
    pub cancel: Cancel,
    /// Where its progress is seen.
    pub status: watch::Sender<Status>,
}

/// Copies the machine until it is time to stop it. On a failure the other side is told, logs are
/// off again, and the machine was never stopped.
pub fn run(job: Job) -> Result<Box<Switchover>, MigrationError> {
    let Job {
        view,
        mut sockets,
        options,
        max_downtime,
        without,
        cancel,
        status,
    } = job;
    let states = sockets.take_states(&view.units, options.shared_memory)?;
    for unit in &view.units {
        unit.remote.check_served_since(unit.remote.reconnects())?;
    }
    if !options.shared_memory
        && let Some(unit) = view.units.iter().find(|unit| !unit.remote.has_log())
    {
        return Err(MigrationError::CannotMove {
            device: unit.id.clone(),
            why: "its back-end has no dirty log",
        });
    }
    let states = StateSockets::new(states, &view.units, &without)
        .map_err(system("a copy of a device's socket"))?;
    let regions = view.memory.regions();
    let mut source = Source {
        free_pages: FreePages::new(&view.units, &view.links, &regions),
        link: Link::new(sockets.control, cancel.clone()),
        recorder: Recorder::start(),
        report: Report::default(),
        convergence: Convergence::new(options, max_downtime),
        around: Around::default(),
        view,
        options,
        without,
        cancel,
        status,
        ready: false,
        unready: 0,
        wiring: None,
        alive: Instant::now(),
        began: Instant::now(),
        asked: Instant::now(),
        pace: Pace::new(Instant::now()),
    };
    let mut memory = None;
    let prepared = source.prepare(sockets.ram, &mut memory).and_then(|crew| {
        source.copy(&mut memory)?;
        Ok(crew)
    });
    // The guest gets all of its time back, whatever comes now.
    let unthrottled = source.view.throttle.set(0).map_err(system("a thread"));
    match unthrottled.and(prepared) {
        Ok(crew) => Ok(Box::new(Switchover {
            link: source.link,
            memory,
            crew,
            states,
            recorder: source.recorder,
            report: source.report,
            free_pages: source.free_pages,
            view: source.view,
            cancel: source.cancel,
            limit: options.blackout_limit(),
            end: Instant::now(),
            status: source.status,
        })),
        Err(error) => {
            let error = ask_why(&mut source.link, error);
            say_last(&mut source.link, &error);
            source.cancel.cancel();
            drop(memory);
            source.view.stop_logs();
            Err(error)
        }
    }
}

/// Tries to tell the other side that it is over.
pub(super) fn say_last(link: &mut Link, error: &MigrationError) {
    if let Ok(cancel) = Cancel::new() {
        link.set_cancel(cancel);
    }
    let reason = crate::machine::chain(error);
    // A link that is lost says it, too.
    let _ = link.send(&ToDestination::Abort { reason }, LAST_WORD_DEADLINE);
}

/// Where a channel or the link ended at its other end, the reason is there: it is said on the link.
/// For before the commit: after it, the other side's word is not to be missed.
pub(super) fn ask_why(link: &mut Link, error: MigrationError) -> MigrationError {
    if error.is_of_a_channel() {
        // It looks at its memory channels when it hears something; a link that is lost was said to be.
        let _ = link.send(&ToDestination::Alive, LAST_WORD_DEADLINE);
    }
    let end = Instant::now() + REASON_DEADLINE;
    while error.is_of_a_channel() || error.is_of_a_lost_link() {
        let left = end.saturating_duration_since(Instant::now());
        match link.await_message(left) {
            Ok(true) => {}
            _ => break,
        }
        match link.receive(REASON_DEADLINE) {
            Ok(ToSource::Ready) => {}
            Ok(word @ (ToSource::Refused { .. } | ToSource::Discarded { .. })) => {
                return unexpected(word, "nothing");
            }
            _ => break,
        }
    }
    error
}

/// Memory on its way.
pub(super) struct MovingMemory {
    pub(super) tracker: DirtyTracker,
    pub(super) sender: RamSender,
}

struct Source {
    view: View,
    link: Link,
    options: MigrateOptions,
    without: Without,
    cancel: Cancel,
    status: watch::Sender<Status>,
    recorder: Recorder,
    report: Report,
    convergence: Convergence,
    free_pages: FreePages,
    around: Around,
    /// Barrier A was passed once.
    ready: bool,
    /// How often the other side was told what it has not said to be ready for.
    unready: u32,
    /// What the other side was told last.
    wiring: Option<Blob>,
    /// When the other side heard something last.
    alive: Instant,
    began: Instant,
    /// When the other side was told something last that it has to get ready for.
    asked: Instant,
    pace: Pace,
}

impl Source {
    /// Everything until the first page is sent.
    fn prepare(
        &mut self,
        channels: Vec<std::os::fd::OwnedFd>,
        memory: &mut Option<MovingMemory>,
    ) -> Result<Crew, MigrationError> {
        let transfer = if self.options.shared_memory {
            MemoryTransfer::Shared
        } else {
            MemoryTransfer::Copied {
                channels: u32::try_from(channels.len()).unwrap_or(u32::MAX),
            }
        };
        let hello = Hello {
            protocol: PROTOCOL,
            definition: self.view.definition.clone(),
            memory: transfer,
            memory_used: used(&self.view.memory),
        };
        self.progress("negotiating", |_| {});
        self.say(&ToDestination::Hello(hello))?;
        match self.link.receive(ANSWER_DEADLINE)? {
            ToSource::Welcome => {}
            other => return Err(unexpected(other, "a welcome")),
        }
        self.recorder.note("core", "negotiate", self.began, 0);
        let crew = Crew::start(&self.view.units, &self.without)
            .map_err(system("a thread for a device"))?;
        if !self.options.shared_memory {
            let units = self.view.units.iter();
            let logs = units.map(|unit| unit.remote.start_log());
            let logs = logs.collect::<Result<_, _>>()?;
            let view = &self.view;
            let tracker = DirtyTracker::start(&view.memory, &view.slots, logs, &view.core_writes)?;
            let sender = RamSender::start(channels, &view.memory.guest(), &self.cancel)?;
            *memory = Some(MovingMemory { tracker, sender });
        }
        self.look_around(&crew)?;
        self.tell_wiring()?;
        if self.options.shared_memory {
            self.say_copied()?;
        }
        Ok(crew)
    }

    /// Rounds of copying, until the stop is short enough.
    fn copy(&mut self, memory: &mut Option<MovingMemory>) -> Result<(), MigrationError> {
        let mut first = true;
        loop {
            let mut remaining = 0;
            if let Some(memory) = memory {
                if !first {
                    memory.tracker.collect()?;
                }
                remaining = memory.tracker.pending_bytes();
            }
            let decision = if first && memory.is_some() {
                Decision::Copy
            } else {
                self.convergence.decide(remaining, Instant::now())?
            };
            let predicted = self.convergence.predict(remaining);
            self.report.prediction = predicted;
            self.report.predicted_us = predicted.total_us();
            self.note_progress(memory.as_ref(), remaining);
            match (decision, memory.as_mut()) {
                (Decision::Stop, _) | (_, None) if self.unready == 0 => return Ok(()),
                (Decision::Stop, memory) | (_, memory @ None) => {
                    self.await_ready()?;
                    if let Some(memory) = memory {
                        self.round(memory, first)?;
                    }
                }
                (Decision::Copy, Some(memory)) => {
                    self.round(memory, first)?;
                    if first {
                        self.say_copied()?;
                    }
                }
                (Decision::Throttle(percent), Some(memory)) => {
                    let throttle = &mut self.view.throttle;
                    throttle.set(percent).map_err(system("a thread"))?;
                    self.round(memory, first)?;
                }
            }
            first = false;
        }
    }

    fn round(&mut self, memory: &mut MovingMemory, first: bool) -> Result<(), MigrationError> {
        // A moment in which this host was busy must not count for all that come. Not between the last
        // look at what is dirty and the stop.
        if !first {
            self.around.wake = wake_up().map_err(system("a pair of sockets"))?;
        }
        self.find_free_pages(&mut memory.tracker, first)?;
        let begin = Instant::now();
        let pages = memory.tracker.pending_bytes() / super::ram::PAGE;
        let before = memory.sender.sent();
        while let Some((page, mut words)) = memory.tracker.take_chunk()? {
            self.free_pages.leave_out(page, &mut words);
            let holes = memory.tracker.holes(page, &words)?;
            let pieces = words.chunks(PIECE_WORDS).zip(holes.chunks(PIECE_WORDS));
            for (number, (words, holes)) in pieces.enumerate() {
                let offset = (number * PIECE_WORDS) as u64 * WORD_PAGES;
                let first = page + offset;
                let (began, before) = (Instant::now(), memory.sender.sent());
                memory.sender.send_with_holes(first, words, holes)?;
                self.listen()?;
                self.keep_pace(&mut memory.sender, began, before)?;
                let sent = memory.sender.sent();
                self.progress("copying", |progress| progress.sent_bytes = sent);
            }
            let remaining = memory.tracker.pending_bytes();
            let sent = memory.sender.sent();
            self.progress("copying", |progress| {
                progress.sent_bytes = sent;
                progress.remaining_bytes = remaining;
            });
        }
        memory.sender.flush()?;
        let time = begin.elapsed();
        self.free_pages.stop();
        memory.tracker.collect()?;
        let bytes = memory.sender.sent() - before;
        self.convergence.measured(Measured {
            sent: bytes,
            time,
            dirtied: memory.tracker.pending_bytes(),
        });
        self.report.rounds.push(Round {
            pages,
            bytes,
            us: micros(time),
        });
        self.recorder.note("core", "round", begin, bytes);
        let skipped = self.free_pages.skipped_bytes();
        if skipped > 0 {
            self.recorder.note("core", "left out", begin, skipped);
        }
        self.tell_wiring()
    }

    /// Waits until more may be sent, if the owner has set a limit; `before` bytes had been sent
    /// when a piece `began`.
    fn keep_pace(
        &mut self,
        sender: &mut RamSender,
        began: Instant,
        before: u64,
    ) -> Result<(), MigrationError> {
        let limit = self.options.max_bandwidth;
        if limit == 0 {
            return Ok(());
        }
        sender.flush()?;
        let due = self.pace.spend(began, sender.sent() - before, limit);
        while let Some(left) = due.checked_duration_since(Instant::now()) {
            self.link.await_message(left.min(ALIVE_EVERY))?;
            self.listen()?;
        }
        Ok(())
    }

    /// Asks the guest for pages that need not be sent, and waits for the many of the first round.
    fn find_free_pages(
        &mut self,
        tracker: &mut DirtyTracker,
        first: bool,
    ) -> Result<(), MigrationError> {
        let begin = Instant::now();
        self.free_pages.start(tracker)?;
        if first && let Some(mut head) = self.free_pages.head_start() {
            while self.free_pages.is_ahead(&mut head, self.convergence.rate()) {
                self.link.await_message(HINT_STEP)?;
                self.listen()?;
            }
            self.recorder.note("core", "free pages", begin, 0);
        }
        Ok(())
    }

    /// Finds out what a switchover would take besides memory. Once: a device that is busy must not
    /// hold up the copying.
    fn look_around(&mut self, crew: &Crew) -> Result<(), MigrationError> {
        let (forecasts, devices) = crew.ask(&mut self.recorder)?;
        let slowest = |time: fn(&Forecast) -> Duration| forecasts.iter().map(time).max();
        let stop = slowest(|forecast| forecast.stop).unwrap_or_default();
        let start = slowest(|forecast| forecast.start).unwrap_or_default();
        self.around.wake = wake_up().map_err(system("a pair of sockets"))?;
        self.around.processors = std::thread::available_parallelism()
            .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX));
        self.around.copies_memory = !self.options.shared_memory;
        self.around.link = self.link.round_trip();
        self.around.devices = devices;
        self.around.transitions = stop.saturating_add(start);
        let bytes = || forecasts.iter().map(|forecast| forecast.bytes);
        self.around.state_bytes = bytes().fold(0, u64::saturating_add);
        self.around.largest_state = bytes().max().unwrap_or(0);
        self.convergence.found(self.around);
        Ok(())
    }

    /// Waits a moment for barrier A; meanwhile more gets dirty, so it is not longer.
    fn await_ready(&mut self) -> Result<(), MigrationError> {
        if self.asked.elapsed() >= READY_DEADLINE {
            return Err(MigrationError::Late {
                barrier: Barrier::A,
                units: vec!["destination".into()],
                within: READY_DEADLINE,
            });
        }
        self.link.await_message(READY_STEP)?;
        self.listen()
    }

    /// Hears what the other side has said, and lets it hear something now and then.
    fn listen(&mut self) -> Result<(), MigrationError> {
        while self.link.has_message() {
            match self.link.receive(ANSWER_DEADLINE)? {
                ToSource::Ready if self.unready > 0 => self.pass_a(),
                ToSource::Prepared {
                    core_us,
                    devices_us,
                } if self.unready > 0 => {
                    self.around.core = Duration::from_micros(core_us);
                    self.around.devices_there = Duration::from_micros(devices_us);
                    self.convergence.found(self.around);
                    self.pass_a();
                }
                other => return Err(unexpected(other, "nothing")),
            }
        }
        if self.alive.elapsed() >= ALIVE_EVERY {
            self.say(&ToDestination::Alive)?;
        }
        Ok(())
    }

    fn pass_a(&mut self) {
        self.unready -= 1;
        if self.unready == 0 && !self.ready {
            self.ready = true;
            self.recorder.note("core", Barrier::A.name(), self.began, 0);
        }
    }

    /// Says how devices are wired, if that has changed.
    fn tell_wiring(&mut self) -> Result<(), MigrationError> {
        let device = |unit: &Arc<Unit>| {
            Ok(DeviceWiring {
                id: unit.id.clone(),
                state: unit.pci.wiring()?,
            })
        };
        let devices = self.view.units.iter().map(device);
        let devices = devices.collect::<Result<Vec<_>, MigrationError>>()?;
        self.around.count(&devices);
        self.convergence.found(self.around);
        let blob = to_blob(&WiringState { devices })?;
        if self.wiring.as_ref() != Some(&blob) {
            self.say(&ToDestination::Wiring(blob.clone()))?;
            self.wiring = Some(blob);
            self.unready += 1;
            self.asked = Instant::now();
        }
        self.listen()
    }

    /// Memory is at the destination: its devices may map it.
    fn say_copied(&mut self) -> Result<(), MigrationError> {
        self.unready += 1;
        self.asked = Instant::now();
        self.say(&ToDestination::Copied)
    }

    fn say(&mut self, message: &ToDestination) -> Result<(), MigrationError> {
        self.alive = Instant::now();
        Ok(self.link.send(message, ANSWER_DEADLINE)?)
    }

    fn note_progress(&mut self, memory: Option<&MovingMemory>, remaining: u64) {
        let sent = memory.map_or(0, |memory| memory.sender.sent());
        let round = self.report.rounds.len() as u64 + 1;
        let throttle = self.view.throttle.percent();
        let convergence = &self.convergence;
        let (rate, dirty_rate) = (convergence.rate(), convergence.dirty_rate());
        let converging = convergence.is_converging();
        let predicted_us = self.report.predicted_us;
        self.progress("copying", |progress| {
            progress.round = round;
            progress.sent_bytes = sent;
            progress.remaining_bytes = remaining;
            progress.rate = rate;
            progress.dirty_rate = dirty_rate;
            progress.predicted_us = predicted_us;
            progress.converging = converging;
            progress.throttle = throttle;
        });
    }

    fn progress(&self, phase: &'static str, change: impl FnOnce(&mut Progress)) {
        self.status.send_modify(|status| {
            status.progress.phase = phase;
            change(&mut status.progress);
        });
    }
}

/// What a message means that was not the one waited for.
pub(super) fn unexpected(message: ToSource, expected: &'static str) -> MigrationError {
    let said = match message {
        ToSource::Refused { reasons } => return MigrationError::Refused { reasons },
        ToSource::Discarded { reason } => return MigrationError::GivenUp { reason },
        ToSource::Welcome => "welcome",
        ToSource::Ready => "ready",
        ToSource::Prepared { .. } => "prepared",
        ToSource::Loaded => "loaded",
        ToSource::Running { .. } => "running",
    };
    MigrationError::Unexpected { said, expected }
}
