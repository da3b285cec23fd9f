//! The blackout, on the machine's main thread.
//!
//! ```text
//!  main     Stopping ▮B vCPUs ▮C     ▮D ─ last pages ─ core ─ rest of the pages … ▮E Commit … Running
//!  devices                    stop ─┘└─ save, each to its twin, locks ─┘
//! ```
//! Until *Commit* is sent every failure goes back: devices with their locks, then vCPUs, as before;
//! without its locks the machine stays paused. Afterwards
//! only the other side's word, or a person's, does: see [`migration::commit`].

use std::time::{Duration, Instant};

use migration::channel::Cancel;
use migration::commit::{Source, SourceInput, SourceWord};
use migration::link::Link;
use migration::report::{Recorder, Report, micros};
use migration::wire::{ToDestination, ToSource};
use tokio::sync::watch;

use super::barrier::Barrier;
use super::error::system;
use super::free_pages::FreePages;
use super::saved_state::{CoreState, DeviceWiring, to_blob};
use super::source::{MovingMemory, View, ask_why, say_last, unexpected};
use super::states::StateSockets;
use super::status::Status;
use super::unit::Crew;
use super::{BLACKOUT_DEADLINE, MigrationError};
use crate::costs;

/// Name of the destination's span from the word of the stop until the machine runs.
pub(super) const STOPPED: &str = "stopped";

/// What the switchover needs of the machine whose main thread it runs on.
pub trait Host {
    /// Gets every vCPU out of the guest. Fine when they are out.
    fn stop_vcpus(&mut self) -> Result<(), MigrationError>;
    /// What the guest has asked for that must be done here, and not elsewhere.
    fn pending_request(&mut self) -> Option<String>;
    /// The core's state, with that of the stopped devices.
    fn save_core(&mut self, devices: Vec<DeviceWiring>) -> Result<CoreState, MigrationError>;
    /// Lets vCPUs run, if the machine ran.
    fn run(&mut self);
    /// The machine ran, and is paused from now on.
    fn stay_paused(&mut self);
    /// Whether the machine ran when the switchover began.
    fn ran(&self) -> bool;
}

/// Everything that was made before the stop.
pub struct Switchover {
    pub(super) link: Link,
    /// `None` where both sides map the same.
    pub(super) memory: Option<MovingMemory>,
    pub(super) crew: Crew,
    pub(super) states: StateSockets,
    pub(super) recorder: Recorder,
    pub(super) report: Report,
    pub(super) free_pages: FreePages,
    pub(super) view: View,
    pub(super) cancel: Cancel,
    /// How long the blackout may last before it is given up.
    pub(super) limit: Duration,
    /// When that is.
    pub(super) end: Instant,
    /// What the owner sees.
    pub status: watch::Sender<Status>,
}

/// How a switchover ended.
#[derive(Debug)]
pub struct Ended {
    /// Where the machine is.
    pub state: Source,
    /// Why it is not at the destination.
    pub error: Option<MigrationError>,
    /// What it took.
    pub report: Report,
}

impl Switchover {
    /// Moves the machine over, or leaves everything as it was.
    pub fn run(mut self, host: &mut impl Host) -> Ended {
        let begin = Instant::now();
        let before = costs::now();
        self.end = begin + self.limit;
        self.status
            .send_modify(|status| status.progress.phase = "switchover");
        let (mut state, _) = Source::Copying.on(SourceInput::Stop);
        let result = self.blackout(host, &mut state);
        // Where it runs again is known best there, in time since it heard of the stop. What was
        // measured here ends when this process was woken once more.
        let there = self.report.destination.span("core", STOPPED);
        self.report.blackout_us = there.map_or(micros(begin.elapsed()), |span| {
            (span.end_us.saturating_sub(span.start_us))
                .saturating_add(micros(self.link.round_trip() / 2))
        });
        self.recorder.set_costs(costs::now().since(&before));
        let mut error = result.err();
        if let Some(mut why) = error.take() {
            if state != Source::Committed {
                why = ask_why(&mut self.link, why);
            }
            let before = state;
            let (next, word) = state.on(why.input());
            state = next;
            if word == Some(SourceWord::Abort) {
                say_last(&mut self.link, &why);
            }
            if state == Source::Committed {
                // Nothing but the other side's word says what became of it.
                state = state.on(SourceInput::LinkLost).0;
            }
            if state == Source::Unresolved {
                self.view.stop_logs();
            }
            if state == Source::Kept {
                tracing::warn!(
                    ?before,
                    "the migration is given up, the machine goes on here"
                );
                error = self
                    .go_back(host)
                    .err()
                    .map(|problem| MigrationError::StaysPaused {
                        why: crate::machine::chain(&why),
                        source: Box::new(problem),
                    });
            }
            error = error.or(Some(why));
        }
        if state == Source::Gone {
            self.free_pages.moved();
        }
        self.report.source = self.recorder.side().clone();
        Ended {
            state,
            error,
            report: self.report,
        }
    }

    fn blackout(&mut self, host: &mut impl Host, state: &mut Source) -> Result<(), MigrationError> {
        self.say(&ToDestination::Stopping)?;
        let stopping = Instant::now();
        host.stop_vcpus()?;
        self.recorder.note("core", Barrier::B.name(), stopping, 0);
        if let Some(what) = host.pending_request() {
            return Err(MigrationError::Guest(what));
        }
        self.quiet_peers();
        let leaving = self.states.leave(&self.crew, true, self.left());
        let devices = leaving.stopped(self.left(), &mut self.recorder)?;
        self.send_dirty(|memory| Ok(memory.tracker.collect()?))?;
        let begin = Instant::now();
        let mut core = host.save_core(devices)?;
        core.clock_age_us = micros(stopping.elapsed());
        let core = to_blob(&core)?;
        let bytes = core.payload.len() as u64;
        self.say(&ToDestination::Core(core))?;
        self.recorder.note("core", "save", begin, bytes);
        leaving.saved(self.left(), &mut self.recorder)?;
        self.send_dirty(|memory| {
            memory.tracker.collect_from_devices();
            Ok(())
        })?;
        let begin = Instant::now();
        if let Some(memory) = self.memory.take() {
            self.report.memory_bytes = memory.sender.end()?;
            self.recorder
                .note("core", "memory", begin, self.report.memory_bytes);
        }
        self.await_loaded()?;
        self.decide(state)?;
        self.commit(state)
    }

    /// Barrier C. vhost-user devices start no access to other devices: nothing has to be said.
    fn quiet_peers(&mut self) {
        self.recorder
            .note("core", Barrier::C.name(), Instant::now(), 0);
    }

    /// Sends what is dirty, on threads of its own.
    fn send_dirty(
        &mut self,
        collect: impl FnOnce(&mut MovingMemory) -> Result<(), MigrationError>,
    ) -> Result<(), MigrationError> {
        let Some(memory) = &mut self.memory else {
            return Ok(());
        };
        let begin = Instant::now();
        collect(memory)?;
        let bytes = memory.tracker.pending_bytes();
        while let Some((page, words)) = memory.tracker.take_last_chunk() {
            memory.sender.send(page, &words)?;
        }
        self.recorder.note("core", "last pages", begin, bytes);
        Ok(())
    }

    /// Barrier E: the other side has everything.
    fn await_loaded(&mut self) -> Result<(), MigrationError> {
        let begin = Instant::now();
        match self.link.receive(self.left())? {
            ToSource::Loaded => {}
            other => return Err(unexpected(other, "that it has loaded everything")),
        }
        self.recorder.note("core", Barrier::E.name(), begin, 0);
        Ok(())
    }

    /// The last moment to give up.
    fn decide(&mut self, state: &mut Source) -> Result<(), MigrationError> {
        // Too late to cancel from here on. What was cancelled before is seen here.
        let cancel = Cancel::new().map_err(system("an eventfd"))?;
        if self.cancel.is_cancelled() {
            return Err(migration::link::LinkError::Cancelled.into());
        }
        self.link.set_cancel(cancel);
        let (next, word) = state.on(SourceInput::Loaded);
        *state = next;
        debug_assert_eq!(word, Some(SourceWord::Commit));
        Ok(())
    }

    /// The right to run is the other side's when the word is said, and its answer ends it.
    fn commit(&mut self, state: &mut Source) -> Result<(), MigrationError> {
        let begin = Instant::now();
        self.say(&ToDestination::Commit)?;
        match self.link.receive(BLACKOUT_DEADLINE)? {
            ToSource::Running { timeline, problem } => {
                *state = state.on(SourceInput::Running).0;
                self.report.destination = timeline;
                self.report
                    .destination
                    .spans
                    .truncate(migration::report::MAX_SPANS);
                if let Some(why) = problem {
                    return Err(MigrationError::PausedThere { why });
                }
            }
            other => return Err(unexpected(other, "that the machine runs")),
        }
        self.recorder.note("core", "commit", begin, 0);
        Ok(())
    }

    /// The machine goes on here: devices with what only they may have, then vCPUs, then whatever
    /// takes longer. Without all of its devices it stays paused.
    fn go_back(&mut self, host: &mut impl Host) -> Result<(), MigrationError> {
        let begin = Instant::now();
        self.cancel.cancel();
        self.states.cut();
        let running = host.ran();
        // In line behind whatever each device still does.
        let started = self.crew.take_up(running, &mut self.recorder);
        if started.is_ok() {
            host.run();
        } else if running {
            let stopped = self.crew.each(|_, unit| Ok(unit.pci.stop()?));
            if let Err(error) = self.crew.meet_again("stop", &stopped, &mut self.recorder) {
                tracing::error!(%error, "a device of a paused machine does not stop");
            }
            host.stay_paused();
        }
        self.memory = None;
        self.view.stop_logs();
        self.recorder.note("core", "go back", begin, 0);
        started
    }

    /// What is left of the time that the blackout may last.
    fn left(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    fn say(&mut self, message: &ToDestination) -> Result<(), MigrationError> {
        let left = self.left();
        Ok(self.link.send(message, left)?)
    }
}
