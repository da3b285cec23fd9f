//! What a device and its monitor share: what the guest wants, and who serves it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, TryLockError, Weak,
};
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vm_memory::{Bytes, GuestAddress};

use super::connection::Connection;
use super::inflight::Inflight;
use super::queues::QueuePlan;
use super::session::{Session, Surroundings, Wanted};
use super::{DirtyLog, VhostUserConfig, VhostUserError, Watchdog, device_config};
use crate::memory::{Memory, Region};
use crate::transport::{ActivatedQueue, DeviceNotifier, RingBase, StoppedQueue};

/// See the module's header.
pub(super) enum Phase {
    Connected(Box<Session>),
    Away,
    Failed(Arc<VhostUserError>),
}

pub(super) struct State {
    pub(super) phase: Phase,
    pub(super) regions: Vec<Region>,
    pub(super) wanted: Option<Wanted>,
    /// A back-end of ours was ordered to stop, and has done so by then.
    pub(super) stops_by: Option<Instant>,
    pub(super) inflight: Option<Inflight>,
    pub(super) log: Option<Arc<DirtyLog>>,
    /// What a driver wrote to the configuration while the back-end was away, by offset.
    pub(super) unwritten: BTreeMap<u32, Vec<u8>>,
    /// The back-end has state that a reset must clear.
    pub(super) touched: bool,
    /// Back-ends in a row that went away while they were set up.
    pub(super) failures: u32,
}

/// The device, shared with its monitor.
pub(super) struct Shared {
    pub(super) config: VhostUserConfig,
    /// Where a back-end that went away may be found again.
    pub(super) path: Option<PathBuf>,
    pub(super) plan: QueuePlan,
    pub(super) offer: u64,
    /// Features that any later back-end must have.
    pub(super) needed: u64,
    /// The configuration is the back-end's, not made here.
    pub(super) has_remote_config: bool,
    pub(super) watchdog: Arc<Watchdog>,
    /// Not owned: memory owns its listeners, of which this device is one.
    pub(super) memory: Weak<Memory>,
    pub(super) bytes: RwLock<Vec<u8>>,
    pub(super) config_stale: Arc<AtomicBool>,
    pub(super) notifier: OnceLock<Arc<dyn DeviceNotifier>>,
    pub(super) state: Mutex<State>,
    pub(super) wake: EventFd,
    pub(super) ended: AtomicBool,
    /// What `state` says, for those who must not wait for it.
    pub(super) standing: Mutex<Standing>,
    /// Back-ends that took the place of another.
    pub(super) reconnects: AtomicU32,
}

/// Whether there is a back-end, and why there never will be one.
#[derive(Clone, Debug)]
pub(super) struct Standing {
    pub(super) connected: bool,
    pub(super) failure: Option<Arc<VhostUserError>>,
}

impl Standing {
    pub(super) const CONNECTED: Standing = Standing {
        connected: true,
        failure: None,
    };
}

impl Shared {
    pub(super) fn id(&self) -> &str {
        &self.config.id
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    pub(super) fn take_wake(&self) {
        // Empty is what it shall be.
        let _ = self.wake.read();
    }

    pub(super) fn wake_monitor(&self) {
        // Fails only when it is full of wakes.
        let _ = self.wake.write(1);
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a back-end that has agreed to this.
    pub(super) fn has(&self, feature: Protocol) -> bool {
        matches!(&self.state().phase, Phase::Connected(session) if session.has(feature))
    }

    pub(super) fn unsupported(&self, what: &'static str) -> VhostUserError {
        VhostUserError::Unsupported {
            device: self.id().into(),
            what,
        }
    }

    pub(super) fn rings_run(&self) -> VhostUserError {
        VhostUserError::RingsRun {
            device: self.id().into(),
        }
    }

    pub(super) fn away(&self) -> VhostUserError {
        VhostUserError::Away {
            device: self.id().into(),
        }
    }

    /// Goes to another phase and says so.
    pub(super) fn set_phase(&self, state: &mut State, phase: Phase) {
        let standing = match &phase {
            Phase::Connected(_) => Standing::CONNECTED,
            Phase::Away => Standing {
                connected: false,
                failure: None,
            },
            Phase::Failed(cause) => Standing {
                connected: false,
                failure: Some(Arc::clone(cause)),
            },
        };
        state.phase = phase;
        state.stops_by = None;
        *self.standing() = standing;
    }

    /// What is known without waiting for whoever talks to the back-end.
    pub(super) fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of an error that ended the connection.
    pub(super) fn note<T>(&self, state: &mut State, result: &Result<T, VhostUserError>) {
        if let Err(error) = result
            && error.ends_connection()
        {
            tracing::warn!(%error, "a back-end is gone");
            self.set_phase(state, Phase::Away);
            self.wake_monitor();
        }
    }

    /// As [`Self::note`]; and what a back-end that hung up has missed, the next is told.
    pub(super) fn settle(
        &self,
        state: &mut State,
        result: Result<(), VhostUserError>,
    ) -> Result<(), VhostUserError> {
        self.note(state, &result);
        match result {
            Err(error) if error.is_hang_up() => Ok(()),
            other => other,
        }
    }

    /// The connection of a device none of whose rings runs, and that can move state.
    pub(super) fn stopped_session<'a>(
        &self,
        state: &'a mut State,
    ) -> Result<&'a mut Connection, VhostUserError> {
        if state.wanted.is_some() {
            return Err(self.rings_run());
        }
        match &mut state.phase {
            Phase::Connected(session) if session.has(Protocol::DEVICE_STATE) => {
                Ok(&mut session.connection)
            }
            Phase::Connected(_) => Err(self.unsupported("a transfer of its state")),
            _ => Err(self.away()),
        }
    }

    /// Starts what is wanted, if there is somebody to do it.
    pub(super) fn start(&self, state: &mut State) -> Result<(), VhostUserError> {
        let Some(wanted) = state.wanted.take() else {
            return Ok(());
        };
        let result = self.with_session(state, |session, around| session.start(&wanted, around));
        state.wanted = Some(wanted);
        result
    }

    /// Does something with the back-end's session, if there is one.
    pub(super) fn with_session(
        &self,
        state: &mut State,
        work: impl FnOnce(&mut Session, Surroundings<'_>) -> Result<(), VhostUserError>,
    ) -> Result<(), VhostUserError> {
        let around = Surroundings {
            regions: &state.regions,
            log: state.log.as_deref(),
            inflight: &mut state.inflight,
            served: self.plan.served,
        };
        match &mut state.phase {
            Phase::Connected(session) => work(session, around),
            Phase::Away => Ok(()),
            Phase::Failed(cause) => Err(VhostUserError::Failed {
                device: self.id().into(),
                source: Arc::clone(cause),
            }),
        }
    }

    /// Where rings go on whose back-end is gone: what it has given back is in guest
    /// memory (virtio 1.3, 2.7.8), and the rest is done again.
    pub(super) fn bases_from_memory(&self, wanted: &Wanted) -> Vec<StoppedQueue> {
        let memory = self.memory.upgrade().map(|m| m.guest());
        let used = |queue: &ActivatedQueue| -> Option<u16> {
            let at = GuestAddress(queue.device.checked_add(2)?);
            memory.as_ref()?.load(at, Ordering::Acquire).ok()
        };
        wanted
            .queues
            .iter()
            .map(|queue| StoppedQueue {
                index: queue.index,
                base: used(queue).map_or(queue.base, RingBase),
            })
            .collect()
    }

    pub(super) fn is_config_stale(&self) -> bool {
        self.config_stale.load(Ordering::Acquire)
    }

    /// Reads a configuration that has changed, unless somebody talks to the back-end: it
    /// may be that party whose message is answered only after this thread has answered
    /// the next request.
    pub(super) fn refresh_config(&self) {
        if !self.is_config_stale() {
            return;
        }
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if matches!(&state.phase, Phase::Connected(session) if session.connection.is_owed()) {
            return;
        }
        self.config_stale.store(false, Ordering::Release);
        match self.fetch_config(&mut state) {
            Ok(Some(bytes)) => self.change_config(bytes),
            Ok(None) => {}
            // What went wrong with the connection is noted; the rest is the old
            // configuration, which stays.
            Err(error) => tracing::warn!(%error, "a changed configuration is not known"),
        }
    }

    /// The configuration as the back-end has it, if there is one.
    pub(super) fn fetch_config(
        &self,
        state: &mut State,
    ) -> Result<Option<Vec<u8>>, VhostUserError> {
        let Phase::Connected(session) = &mut state.phase else {
            return Ok(None);
        };
        let negotiated = session.negotiated;
        let connection = &mut session.connection;
        let read = device_config::read(connection, &self.config, &self.plan, &negotiated);
        self.note(state, &read);
        read.map(Some)
    }

    /// Puts a new configuration in place and tells the driver.
    pub(super) fn change_config(&self, bytes: Vec<u8>) {
        let mut bytes = Some(bytes);
        let mut change = || {
            if let Some(bytes) = bytes.take() {
                self.set_config(bytes);
            }
        };
        match self.notifier.get() {
            Some(notifier) => notifier.config_changed(&mut change),
            None => change(),
        }
    }

    pub(super) fn config_bytes(&self) -> RwLockReadGuard<'_, Vec<u8>> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_config(&self, bytes: Vec<u8>) {
        *self.bytes.write().unwrap_or_else(PoisonError::into_inner) = bytes;
    }

    pub(super) fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), VhostUserError> {
        if !self.has_remote_config {
            return Ok(());
        }
        let state = &mut *self.state();
        let Phase::Connected(session) = &mut state.phase else {
            state.unwritten.insert(offset, data.to_vec());
            return Ok(());
        };
        let result = device_config::write(&mut session.connection, offset, data);
        self.note(state, &result);
        match result {
            Err(error) if error.is_hang_up() => {
                state.unwritten.insert(offset, data.to_vec());
                Ok(())
            }
            // A driver may write what is read-only; nothing changes then.
            Ok(()) | Err(VhostUserError::Refused { .. }) => {
                if let Some(bytes) = self.fetch_config(state)? {
                    self.set_config(bytes);
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn reset(&self, state: &mut State) -> Result<(), VhostUserError> {
        let wanted = state.wanted.take();
        state.inflight = None;
        state.unwritten.clear();
        if !std::mem::take(&mut state.touched) {
            return Ok(());
        }
        let Phase::Connected(session) = &mut state.phase else {
            return Ok(());
        };
        if let Some(wanted) = wanted {
            session.stop(&wanted, None)?;
        }
        session.reset()
    }
}
