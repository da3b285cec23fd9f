//! One front-end, from its connection to its end.
//!
//! The messages are read and answered by the `vhost` crate's `BackendReqHandler`, for which
//! [`Session`] is the handler ([`handler`]). `vhost-user-backend`'s daemon is not used: it has no
//! in-flight tracking and no state that outlives a connection, loses the dirty log with each memory
//! table, holds its lock while it drains, and cannot be ended while a front-end is silent.
//!
//! Order rules:
//! - A ring is started, stopped and moved by the control thread, between two turns of its queue
//!   thread; the control thread waits for that, and for nothing else of the data path.
//! - The device's state is saved and loaded on the control thread, see [`transfer`].
//! - Rings use only memory of the table in force. A new table reaches every queue thread before
//!   its message is answered, so that the front-end may then take the old memory away.
//! - When a session ends, however it ends, its rings are stopped and drained first. Then nothing
//!   of it is left: memory, descriptors, log and in-flight file are its own.

mod config_change;
mod connection;
mod error;
mod handler;
mod lifecycle;
mod server;
mod services;
mod transfer;
mod vring;
mod wired;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migration::channel::Cancel;
use migration::state::DeviceState;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::VhostUserProtocolFeatures;

pub use self::config_change::ConfigChange;
use self::connection::serve;
use self::error::SessionError;
use self::lifecycle::Lifecycle;
pub use self::server::run;
pub(crate) use self::services::Services;
use self::transfer::{Direction, Transfer};
use self::vring::Vring;
use crate::device::Device;
use crate::ending::chain;
use crate::features::{EVENT_IDX, INDIRECT_DESC, LOG_ALL, PROTOCOL, RARP};
use crate::memory::{DirtyLog, Memory};
use crate::queue::{InflightFile, Queue, QueueIndex, RingLayout};
use crate::queue_thread::RingEvent;

/// Requests that take longer than this to end when a ring stops are reported.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// One front-end being served.
pub(crate) struct Session<D> {
    services: Arc<Services<D>>,
    /// Ends a transfer of state with the connection.
    end: Cancel,
    state: Mutex<State>,
}

/// What this front-end has said.
struct State {
    features: u64,
    protocol_features: u64,
    memory: Arc<Memory>,
    log: Arc<DirtyLog>,
    inflight: Option<InflightFile>,
    vrings: Vec<Vring>,
    transfer: Option<Transfer>,
    life: Lifecycle,
}

impl<D: Device> Session<D> {
    pub(crate) fn new(services: Arc<Services<D>>, end: Cancel) -> Self {
        let log = Arc::new(DirtyLog::default());
        let max_size = services.device.max_queue_size();
        let vrings = (0..services.device.queue_count())
            .map(|index| Vring::new(QueueIndex::new(index), max_size))
            .collect();
        Session {
            state: Mutex::new(State {
                features: 0,
                protocol_features: 0,
                memory: Arc::new(Memory::empty(Arc::clone(&log))),
                log,
                inflight: None,
                vrings,
                transfer: None,
                life: Lifecycle::new(services.health.clone()),
            }),
            end,
            services,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Protocol features that this device has.
    fn protocol_offered(&self) -> VhostUserProtocolFeatures {
        let announcer = self.services.device.announcer();
        PROTOCOL | announcer.map_or(VhostUserProtocolFeatures::empty(), |_| RARP)
    }

    /// Protocol features in force.
    fn protocol_features(&self) -> u64 {
        self.state().protocol_features
    }

    /// Brings a ring to what the front-end wants of it.
    fn update_ring(&self, state: &mut State, at: usize) -> Result<(), SessionError> {
        let vring = &state.vrings[at];
        match (vring.wanted(), vring.running) {
            (true, false) => self.start_ring(state, at),
            (false, true) => self.stop_rings(state, &[at]),
            _ => Ok(()),
        }
    }

    fn start_ring(&self, state: &mut State, at: usize) -> Result<(), SessionError> {
        self.services.acquire()?;
        let running = if state.logging() {
            DeviceState::PreCopy
        } else {
            DeviceState::Running
        };
        self.go(state, running)?;
        let layout = state.layout(at)?;
        let vring = &mut state.vrings[at];
        let record = state
            .inflight
            .as_ref()
            .map(|file| file.queue(vring.index, vring.size))
            .transpose()?;
        let metrics = vring.metrics(&self.services.metrics);
        let started = Queue::start(
            vring.index,
            layout,
            vring.base,
            Arc::clone(&state.memory),
            record,
            metrics.clone(),
        );
        match started {
            Ok(queue) => {
                self.services.queues.start(queue)?;
                vring.running = true;
            }
            Err(error) => {
                // The guest's doing: the ring stays without service, the front-end with one, until
                // it is enabled anew.
                tracing::warn!(%error, "ring cannot be started");
                self.services.health.error(&error);
                metrics.broken.inc();
                vring.enabled = false;
            }
        }
        self.settle(state)
    }

    /// Stops rings, all at once, and waits until nothing of them is in flight.
    fn stop_rings(&self, state: &mut State, rings: &[usize]) -> Result<(), SessionError> {
        let mut waiting = Vec::new();
        for &at in rings {
            let vring = &state.vrings[at];
            if vring.running {
                waiting.push((at, self.services.queues.stop(vring.index)?));
            }
        }
        for (at, answer) in waiting {
            let vring = &mut state.vrings[at];
            vring.base =
                answer
                    .recv_timeout(STOP_DEADLINE)
                    .map_err(|_| SessionError::StopTimeout {
                        queue: vring.index,
                        seconds: STOP_DEADLINE.as_secs(),
                    })?;
            vring.running = false;
        }
        self.settle(state)
    }

    fn stop_all(&self, state: &mut State) -> Result<(), SessionError> {
        let all: Vec<usize> = (0..state.vrings.len()).collect();
        self.stop_rings(state, &all)
    }

    /// Without a running ring the device is stopped.
    fn settle(&self, state: &mut State) -> Result<(), SessionError> {
        if state.life.state().runs() && !state.running() {
            self.go(state, DeviceState::Stop)?;
        }
        Ok(())
    }

    fn go(&self, state: &mut State, to: DeviceState) -> Result<(), SessionError> {
        let device = &self.services.device;
        state.life.go(to, |from, to| device.transition(from, to))
    }

    /// Makes this the memory of all rings.
    fn use_memory(&self, state: &mut State, memory: Memory) -> Result<(), SessionError> {
        let memory = Arc::new(memory);
        state.memory = Arc::clone(&memory);
        let layouts: Vec<(QueueIndex, Option<RingLayout>)> = (0..state.vrings.len())
            .filter(|at| state.vrings[*at].running)
            .map(|at| (state.vrings[at].index, state.layout(at).ok()))
            .collect();
        self.services.queues.set_memory(&memory, &layouts)?;
        let mapped = i64::try_from(memory.size()).unwrap_or(i64::MAX);
        self.services.metrics.memory.set(mapped);
        self.services.prefault.use_memory(memory);
        Ok(())
    }

    /// Turns the log on or off as features and bitmap say.
    fn update_log(&self, state: &mut State) -> Result<(), SessionError> {
        let on = state.logging();
        state.log.set_on(on);
        if !state.life.state().runs() {
            return Ok(());
        }
        let to = if on {
            DeviceState::PreCopy
        } else {
            DeviceState::Running
        };
        self.go(state, to)
    }

    fn start_transfer(&self, direction: Direction, fd: OwnedFd) -> Result<(), String> {
        let mut state = self.state();
        if state.transfer.is_some() {
            return Err("the one before is not checked yet".to_owned());
        }
        if let Some(vring) = state.vrings.iter().find(|vring| vring.running) {
            return Err(format!("queue {} still runs", vring.index));
        }
        let to = match direction {
            Direction::Save => DeviceState::StopCopy,
            Direction::Load => DeviceState::Resuming,
        };
        self.go(&mut state, to).map_err(|error| chain(&error))?;
        state.transfer = Some(Transfer::new(direction, fd));
        Ok(())
    }

    fn go_on(&self, transfer: Transfer) -> Transfer {
        let services = &self.services;
        transfer.go_on(&*services.device, &services.unit, self.end.clone())
    }

    /// Saves what was asked for by the message before, then waits for the next one; a state that
    /// comes meanwhile is loaded.
    fn await_message(&self, stream: &UnixStream) -> Result<(), SessionError> {
        // Nobody but this thread uses it.
        let state = &mut *self.state();
        loop {
            if let Some(transfer) = state.transfer.take_if(|transfer| transfer.is_to_save()) {
                state.transfer = Some(self.go_on(transfer));
            }
            let awaited = state.transfer.as_ref().and_then(Transfer::awaited);
            // Where nothing is awaited, a message is awaited twice.
            let mut fds = [stream.as_fd(), awaited.unwrap_or(stream.as_fd())]
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            // No deadline: a front-end may be silent for days, and `Connection` ends the wait.
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(SessionError::Connection(error.into())),
            }
            let [message, twin] = fds.map(|fd| fd.any().unwrap_or(true));
            if message {
                return Ok(());
            }
            if twin && let Some(transfer) = state.transfer.take() {
                state.transfer = Some(self.go_on(transfer));
            }
        }
    }

    /// Saves the state of the stopped device here and now: the front-end waits for nothing else.
    fn save_now(&self, fd: OwnedFd) -> Result<(), String> {
        let state = &mut *self.state();
        if state.transfer.is_some() {
            return Err("a transfer before it is not checked yet".to_owned());
        }
        self.go(state, DeviceState::StopCopy)
            .map_err(|error| chain(&error))?;
        let transfer = self.go_on(Transfer::new(Direction::Save, fd));
        self.account(state, transfer)
    }

    fn transfer_failed(&self, reason: &str) {
        tracing::warn!(reason, "state transfer failed");
        let what = format!("a transfer of its state failed: {reason}");
        self.services.health.error(&what);
    }

    fn check_transfer(&self) -> Result<(), String> {
        let mut state = self.state();
        let Some(transfer) = state.transfer.take() else {
            return Err("there was none".to_owned());
        };
        let transfer = self.go_on(transfer);
        self.account(&mut state, transfer)
    }

    fn account(&self, state: &mut State, transfer: Transfer) -> Result<(), String> {
        let verdict = match (transfer.direction, transfer.result()) {
            (Direction::Load, Err(error)) => {
                state.life.fail();
                return Err(chain(&error));
            }
            // Saving changes nothing: a device that could not be saved goes on where it was.
            (Direction::Save, Err(error)) => Err(chain(&error)),
            (Direction::Save, Ok(())) => {
                self.services.metrics.states_saved.inc();
                Ok(())
            }
            (Direction::Load, Ok(())) => {
                self.services.metrics.states_loaded.inc();
                Ok(())
            }
        };
        self.go(state, DeviceState::Stop)
            .map_err(|error| chain(&error))?;
        verdict
    }

    /// Ends the session: nothing of it is in flight afterwards.
    ///
    /// # Errors
    /// When requests do not end; then only the end of the process helps.
    pub(crate) fn end(&self) -> Result<(), SessionError> {
        let mut state = self.state();
        self.services.config_change.set_channel(None);
        if let Some(transfer) = state.transfer.take() {
            let direction = transfer.direction;
            tracing::warn!(
                ?direction,
                "the session ended before a state transfer was checked"
            );
        }
        self.stop_all(&mut state)?;
        for vring in &state.vrings {
            for which in [RingEvent::Kick, RingEvent::Call, RingEvent::Error] {
                self.services.queues.set_event(vring.index, which, None)?;
            }
        }
        self.services.prefault.forget();
        state.memory = Arc::new(Memory::empty(Arc::clone(&state.log)));
        self.services.metrics.memory.set(0);
        Ok(())
    }
}

impl State {
    /// Whether writes are to be logged.
    fn logging(&self) -> bool {
        self.features & LOG_ALL != 0 && self.log.has_bitmap()
    }

    fn running(&self) -> bool {
        self.vrings.iter().any(|vring| vring.running)
    }

    fn layout(&self, at: usize) -> Result<RingLayout, SessionError> {
        self.vrings[at].layout(
            &self.memory,
            self.features & EVENT_IDX != 0,
            self.features & INDIRECT_DESC != 0,
        )
    }
}
