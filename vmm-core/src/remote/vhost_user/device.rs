//! A vhost-user device: what the guest wants of it, and the session that serves that.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, TryLockError, Weak,
};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vm_memory::{Bytes, GuestAddress};

use super::channel::Channel;
use super::config::{adopt, connect_to, system};
use super::inflight::Inflight;
use super::negotiation::{self, Negotiated};
use super::queues::{self, QueuePlan};
use super::session::{Session, Wanted};
use super::{
    DirtyLog, Endpoint, StateDirection, VhostUserConfig, VhostUserError, Watchdog, device_config,
    monitor, state,
};
use crate::memory::{LayoutChange, LayoutListener, Memory, Region};
use crate::transport::{
    ActivatedQueue, DeviceError, DeviceKind, DeviceNotifier, RingBase, StoppedQueue, VirtioDevice,
};

/// So many back-ends in a row may go away while they are set up, before the driver is
/// told to start anew.
const MAX_FAILURES: u32 = 5;

/// See the module's header.
enum Phase {
    Connected(Box<Session>),
    Away,
    Failed(Arc<VhostUserError>),
}

struct State {
    phase: Phase,
    regions: Vec<Region>,
    wanted: Option<Wanted>,
    inflight: Option<Inflight>,
    log: Option<Arc<DirtyLog>>,
    /// What a driver wrote to the configuration while the back-end was away, by offset.
    unwritten: BTreeMap<u32, Vec<u8>>,
    /// The back-end has state that a reset must clear.
    touched: bool,
    /// Back-ends in a row that went away while they were set up.
    failures: u32,
}

/// What the monitor has to look at.
pub(super) struct Watched {
    pub(super) socket: Option<Arc<UnixStream>>,
    pub(super) channel: Option<Arc<Channel>>,
    pub(super) looks_for_backend: bool,
}

/// The device, shared with its monitor.
pub(super) struct Shared {
    config: VhostUserConfig,
    /// Where a back-end that went away may be found again.
    path: Option<PathBuf>,
    plan: QueuePlan,
    offer: u64,
    /// Features that any later back-end must have.
    needed: u64,
    /// The configuration is the back-end's, not made here.
    has_remote_config: bool,
    watchdog: Arc<Watchdog>,
    /// Not owned: memory owns its listeners, of which this device is one.
    memory: Weak<Memory>,
    bytes: RwLock<Vec<u8>>,
    config_stale: Arc<AtomicBool>,
    notifier: OnceLock<Arc<dyn DeviceNotifier>>,
    state: Mutex<State>,
    wake: EventFd,
    ended: AtomicBool,
}

/// A virtio device served by a vhost-user back-end.
pub struct VhostUserDevice {
    shared: Arc<Shared>,
    monitor: Option<JoinHandle<()>>,
}

impl VhostUserDevice {
    /// Connects to the back-end and agrees with it on everything that the guest will
    /// see. Memory comes with [`Memory::subscribe`], queues with activation.
    pub fn connect(
        config: VhostUserConfig,
        endpoint: Endpoint,
        memory: &Arc<Memory>,
        watchdog: &Arc<Watchdog>,
    ) -> Result<Arc<Self>, VhostUserError> {
        config.check()?;
        let (stream, path) = match endpoint {
            Endpoint::Path(path) => {
                let stream = connect_to(&config.id, &path, config.deadline)?;
                (stream, Some(path))
            }
            Endpoint::Connected(fd) => (adopt(&config.id, fd)?, None),
        };
        let config_stale = Arc::new(AtomicBool::new(false));
        let mut session = Session::open(&config, stream, watchdog, &config_stale)?;
        let negotiated = session.negotiated;
        let control = negotiation::offers_control(config.kind, negotiated.features);
        let plan = queues::plan(&config, negotiated.rings, control)?;
        let offer = negotiation::offer(&config, &plan, &negotiated);
        let bytes = device_config::read(&mut session.connection, &config, &plan, &negotiated)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|e| system(&config.id, "make an eventfd", e.into()))?;
        let id = config.id.clone();
        let shared = Arc::new(Shared {
            path,
            plan,
            offer,
            needed: offer & negotiated.features,
            has_remote_config: negotiated.has(Protocol::CONFIG),
            watchdog: Arc::clone(watchdog),
            memory: Arc::downgrade(memory),
            bytes: RwLock::new(bytes),
            config_stale,
            notifier: OnceLock::new(),
            state: Mutex::new(State {
                phase: Phase::Connected(Box::new(session)),
                regions: Vec::new(),
                wanted: None,
                inflight: None,
                log: None,
                unwritten: BTreeMap::new(),
                touched: false,
                failures: 0,
            }),
            wake,
            ended: AtomicBool::new(false),
            config,
        });
        let watched = Arc::clone(&shared);
        let monitor = thread::Builder::new()
            .name(format!("watch-{id}"))
            .spawn(move || monitor::run(&watched))
            .map_err(|e| system(&id, "start a thread", e))?;
        Ok(Arc::new(Self {
            shared,
            monitor: Some(monitor),
        }))
    }

    /// Whether there is a back-end now.
    pub fn is_connected(&self) -> bool {
        matches!(self.shared.state().phase, Phase::Connected(_))
    }

    /// Gives the device a new back-end on a connected socket, in the place of the one it
    /// had, and sets everything up in it. An old one that still serves the rings must be
    /// stopped first, with [`VirtioDevice::stop`]: two would serve them for a moment.
    pub fn reconnect_with(&self, socket: OwnedFd) -> Result<(), VhostUserError> {
        let stream = adopt(self.shared.id(), socket)?;
        self.shared.attach(stream)
    }

    /// Starts to log what the back-end writes: from now on until [`Self::stop_log`], over
    /// reconnects too. Fails if the back-end cannot.
    pub fn start_log(&self) -> Result<Arc<DirtyLog>, VhostUserError> {
        let state = &mut *self.shared.state();
        let log = DirtyLog::new(&state.regions)
            .map_err(|e| system(self.shared.id(), "make a dirty log", e))?;
        let log = Arc::new(log);
        if let Phase::Connected(session) = &mut state.phase {
            let result = session.set_log(state.wanted.as_ref(), &state.regions, Some(&log));
            self.shared.settle(state, result)?;
        }
        state.log = Some(Arc::clone(&log));
        Ok(log)
    }

    /// Ends logging. Marks made before stay in the log.
    pub fn stop_log(&self) -> Result<(), VhostUserError> {
        let state = &mut *self.shared.state();
        if state.log.take().is_none() {
            return Ok(());
        }
        let Phase::Connected(session) = &mut state.phase else {
            return Ok(());
        };
        let result = session.set_log(state.wanted.as_ref(), &state.regions, None);
        self.shared.settle(state, result)
    }

    /// Lets the back-end save its state into `fd`, or load it from there, while no ring
    /// runs. It goes on in the background; [`Self::check_state`] waits for the end. A
    /// descriptor that comes back is to be used instead of the other end of `fd`.
    pub fn transfer_state(
        &self,
        direction: StateDirection,
        fd: OwnedFd,
    ) -> Result<Option<File>, VhostUserError> {
        let state = &mut *self.shared.state();
        state.touched = true;
        let result = state::begin(self.shared.stopped_session(state)?, direction, fd);
        self.shared.note(state, &result);
        result
    }

    /// Waits for the end of a transfer of state, and says whether all of it was good.
    pub fn check_state(&self, deadline: Duration) -> Result<(), VhostUserError> {
        let state = &mut *self.shared.state();
        let result = state::check(self.shared.stopped_session(state)?, deadline);
        self.shared.note(state, &result);
        result
    }
}

impl Drop for VhostUserDevice {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        self.shared.wake_monitor();
        if let Some(monitor) = self.monitor.take()
            && monitor.join().is_err()
        {
            tracing::error!(device = self.shared.id(), "its monitor panicked");
        }
    }
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

    fn wake_monitor(&self) {
        // Fails only when it is full of wakes.
        let _ = self.wake.write(1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unsupported(&self, what: &'static str) -> VhostUserError {
        VhostUserError::Unsupported {
            device: self.id().into(),
            what,
        }
    }

    fn away(&self) -> VhostUserError {
        VhostUserError::Away {
            device: self.id().into(),
        }
    }

    /// Takes note of an error that ended the connection.
    fn note<T>(&self, state: &mut State, result: &Result<T, VhostUserError>) {
        if let Err(error) = result
            && error.ends_connection()
        {
            tracing::warn!(%error, "a back-end is gone");
            state.phase = Phase::Away;
            self.wake_monitor();
        }
    }

    /// As [`Self::note`]; and what a back-end that hung up has missed, the next is told.
    fn settle(
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
    fn stopped_session<'a>(
        &self,
        state: &'a mut State,
    ) -> Result<&'a mut super::connection::Connection, VhostUserError> {
        if state.wanted.is_some() {
            return Err(VhostUserError::RingsRun {
                device: self.id().into(),
            });
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
    fn start(&self, state: &mut State) -> Result<(), VhostUserError> {
        let Some(wanted) = &state.wanted else {
            return Ok(());
        };
        match &mut state.phase {
            Phase::Connected(session) => session.start(
                wanted,
                &state.regions,
                state.log.as_deref(),
                &mut state.inflight,
                self.plan.served,
            ),
            Phase::Away => Ok(()),
            Phase::Failed(cause) => Err(VhostUserError::Failed {
                device: self.id().into(),
                source: Arc::clone(cause),
            }),
        }
    }

    /// Where rings go on whose back-end is gone: what it has given back is in guest
    /// memory (virtio 1.3, 2.7.8), and the rest is done again.
    fn bases_from_memory(&self, wanted: &Wanted) -> Vec<StoppedQueue> {
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

    /// What the monitor has to look at now.
    pub(super) fn watched(&self) -> Watched {
        match &self.state().phase {
            Phase::Connected(session) => Watched {
                socket: Some(Arc::clone(session.connection.socket())),
                channel: session.channel.clone(),
                looks_for_backend: false,
            },
            Phase::Away => Watched {
                socket: None,
                channel: None,
                looks_for_backend: self.path.is_some(),
            },
            Phase::Failed(_) => Watched {
                socket: None,
                channel: None,
                looks_for_backend: false,
            },
        }
    }

    /// The back-end at the other end of `socket` is gone.
    pub(super) fn note_hang_up(&self, socket: &Arc<UnixStream>) {
        let state = &mut *self.state();
        if let Phase::Connected(session) = &state.phase
            && Arc::ptr_eq(session.connection.socket(), socket)
        {
            tracing::warn!(device = self.id(), "the back-end hung up");
            state.phase = Phase::Away;
        }
    }

    /// Handles a request of the back-end, or closes a channel that carries none.
    pub(super) fn serve(&self, channel: &Arc<Channel>) {
        let Err(error) = channel.serve(&self.watchdog) else {
            return;
        };
        tracing::warn!(%error, device = self.id(), "the back-end's requests are no longer heard");
        if let Phase::Connected(session) = &mut self.state().phase
            && session
                .channel
                .as_ref()
                .is_some_and(|c| Arc::ptr_eq(c, channel))
        {
            session.channel = None;
        }
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
    fn fetch_config(&self, state: &mut State) -> Result<Option<Vec<u8>>, VhostUserError> {
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
    fn change_config(&self, bytes: Vec<u8>) {
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

    fn config_bytes(&self) -> RwLockReadGuard<'_, Vec<u8>> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_config(&self, bytes: Vec<u8>) {
        *self.bytes.write().unwrap_or_else(PoisonError::into_inner) = bytes;
    }

    /// One attempt to find the back-end where it was.
    pub(super) fn look_for_backend(&self) -> Result<(), VhostUserError> {
        let path = self.path.as_ref().ok_or_else(|| self.away())?;
        let stream = connect_to(self.id(), path, self.config.deadline)?;
        self.attach(stream)
    }

    /// Puts a back-end into the place of the one that was there. One that cannot take it
    /// is an error for good; one that goes away again is not, but what makes several go
    /// away is taken for what the driver wants of them.
    fn attach(&self, stream: UnixStream) -> Result<(), VhostUserError> {
        let state = &mut *self.state();
        state.phase = Phase::Away;
        let result = self.set_up(state, stream);
        let result = match result {
            Ok(()) => {
                state.failures = 0;
                tracing::info!(device = self.id(), "the back-end is back");
                Ok(())
            }
            Err(error) if error.may_pass() => {
                state.phase = Phase::Away;
                state.failures += 1;
                if state.failures == MAX_FAILURES && state.wanted.take().is_some() {
                    self.report(&error);
                }
                Err(error)
            }
            Err(error) => {
                self.report(&error);
                let cause = Arc::new(error);
                state.phase = Phase::Failed(Arc::clone(&cause));
                Err(VhostUserError::Failed {
                    device: self.id().into(),
                    source: cause,
                })
            }
        };
        self.wake_monitor();
        result
    }

    /// The driver and the machine are told that the device does not work.
    fn report(&self, error: &VhostUserError) {
        if let Some(notifier) = self.notifier.get() {
            notifier.trouble(error);
        }
    }

    fn set_up(&self, state: &mut State, stream: UnixStream) -> Result<(), VhostUserError> {
        let mut session = Session::open(&self.config, stream, &self.watchdog, &self.config_stale)?;
        self.check_same(&session.negotiated)?;
        for (&offset, data) in &state.unwritten {
            device_config::write(&mut session.connection, offset, data)?;
        }
        session.set_memory(&state.regions, None)?;
        if let Some(wanted) = &mut state.wanted {
            let device = self.bases_from_memory(wanted);
            for (queue, stopped) in wanted.queues.iter_mut().zip(device) {
                queue.base = stopped.base;
            }
        }
        if let (None, Some(log)) = (&state.wanted, &state.log) {
            session.set_log(None, &state.regions, Some(log))?;
        }
        state.phase = Phase::Connected(Box::new(session));
        let bytes = self.fetch_config(state)?;
        let started = self.start(state);
        self.note(state, &started);
        started?;
        state.unwritten.clear();
        let same = |bytes: &Vec<u8>| *bytes == *self.config_bytes();
        if let Some(bytes) = bytes.filter(|bytes| !same(bytes)) {
            self.change_config(bytes);
        }
        // What the guest rang for, and what the back-end used before it could say so.
        for queue in state.wanted.iter().flat_map(|w| &w.queues) {
            for event in [&queue.kick, &queue.call] {
                // Fails only at 2^64 unheard signals, which one more would not change.
                let _ = event.write(1);
            }
        }
        Ok(())
    }

    fn check_same(&self, negotiated: &Negotiated) -> Result<(), VhostUserError> {
        let missing = self.needed & !negotiated.features;
        if missing != 0 {
            return Err(VhostUserError::FeaturesLost {
                device: self.id().into(),
                missing,
            });
        }
        if self.has_remote_config && !negotiated.has(Protocol::CONFIG) {
            return Err(VhostUserError::NoConfig {
                device: self.id().into(),
                hint: " any more",
            });
        }
        let served = u64::from(self.plan.served);
        match negotiated.rings {
            Some(offered) if offered < served => Err(VhostUserError::TooFewQueues {
                device: self.id().into(),
                wanted: self.plan.served,
                offered,
            }),
            _ => Ok(()),
        }
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), VhostUserError> {
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

    fn reset(&self, state: &mut State) -> Result<(), VhostUserError> {
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
            session.stop(&wanted)?;
        }
        session.reset()
    }
}

impl VirtioDevice for VhostUserDevice {
    fn name(&self) -> String {
        self.shared.id().into()
    }

    fn kind(&self) -> DeviceKind {
        self.shared.config.kind
    }

    fn features(&self) -> u64 {
        self.shared.offer
    }

    fn queues(&self) -> u16 {
        self.shared.plan.rings
    }

    fn max_queue_size(&self) -> u16 {
        self.shared.config.queue_size
    }

    fn set_notifier(&self, notifier: Arc<dyn DeviceNotifier>) {
        if self.shared.notifier.set(notifier).is_err() {
            tracing::error!(device = self.shared.id(), "it has a transport already");
        }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let bytes = self.shared.config_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        self.shared
            .write_config(offset, data)
            .map_err(DeviceError::new)
    }

    fn activate(&self, features: u64, mut queues: Vec<ActivatedQueue>) -> Result<(), DeviceError> {
        queues.retain(|queue| queue.index.0 < self.shared.plan.served);
        let state = &mut *self.shared.state();
        state.wanted = Some(Wanted { features, queues });
        state.touched = true;
        let result = self.shared.start(state);
        self.shared.settle(state, result).map_err(|error| {
            state.wanted = None;
            DeviceError::new(error)
        })
    }

    fn stop(&self) -> Result<Vec<StoppedQueue>, DeviceError> {
        let state = &mut *self.shared.state();
        let Some(wanted) = state.wanted.take() else {
            return Ok(Vec::new());
        };
        let result = match &mut state.phase {
            Phase::Connected(session) => session.stop(&wanted),
            _ => Err(self.shared.away()),
        };
        self.shared.note(state, &result);
        match result {
            Err(error) if error.is_hang_up() => Ok(self.shared.bases_from_memory(&wanted)),
            Err(error) => {
                state.wanted = Some(wanted);
                Err(DeviceError::new(error))
            }
            Ok(stopped) => Ok(stopped),
        }
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let state = &mut *self.shared.state();
        let result = self.shared.reset(state);
        self.shared.settle(state, result).map_err(DeviceError::new)
    }
}

impl LayoutListener for VhostUserDevice {
    fn name(&self) -> String {
        format!("device {}", self.shared.id())
    }

    fn commit(&self, change: &LayoutChange<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let state = &mut *self.shared.state();
        if let Some(log) = &state.log
            && !log.covers(change.all)
        {
            let full = io::Error::from(io::ErrorKind::StorageFull);
            return Err(Box::new(system(
                self.shared.id(),
                "log the new memory",
                full,
            )));
        }
        if let Phase::Connected(session) = &mut state.phase {
            let result = session.set_memory(change.all, state.log.as_deref());
            self.shared.settle(state, result)?;
        }
        state.regions = change.all.to_vec();
        Ok(())
    }
}
