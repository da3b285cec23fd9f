//! A vhost-user device: what the guest wants of it, and the session that serves that.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::rings::Forecast;
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

use super::config::system;
use super::session::{Session, Wanted};
use super::shared::{Phase, Shared, Standing, State};
use super::{
    DirtyLog, StateDirection, VhostUserConfig, VhostUserError, Watchdog, device_config, monitor,
    negotiation, queues, rings, state,
};
use crate::machine::chain;
use crate::memory::{LayoutChange, LayoutListener, Memory};
use crate::remote::endpoint::adopt;
use crate::remote::{Endpoint, Health, RemoteDevice};
use crate::transport::{
    ActivatedQueue, DeviceError, DeviceKind, DeviceNotifier, StoppedQueue, VirtioDevice,
};

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
        let (stream, path) = endpoint.connect(&config.id, config.deadline)?;
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
                stops_by: None,
                inflight: None,
                log: None,
                unwritten: BTreeMap::new(),
                touched: false,
                failures: 0,
            }),
            wake,
            ended: AtomicBool::new(false),
            standing: Mutex::new(Standing::CONNECTED),
            reconnects: AtomicU32::new(0),
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

    /// Its name.
    pub fn id(&self) -> &str {
        self.shared.id()
    }

    /// Whether there is a back-end now. Waits for nobody.
    pub fn is_connected(&self) -> bool {
        self.shared.standing().connected
    }

    /// Why there will not be one any more, if that is so. Waits for nobody.
    pub fn failure(&self) -> Option<Arc<VhostUserError>> {
        self.shared.standing().failure.clone()
    }

    /// How many times a back-end took the place of another.
    pub fn reconnects(&self) -> u32 {
        self.shared.reconnects.load(Ordering::Relaxed)
    }

    /// Whether the back-end has state of its own to move.
    pub fn has_state(&self) -> bool {
        self.shared.has(Protocol::DEVICE_STATE)
    }

    /// Whether the back-end can log what it writes. One that cannot, cannot move.
    pub fn has_log(&self) -> bool {
        self.shared.has(Protocol::LOG_SHMFD)
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
            // One that hangs up for it is not asked again when it is back.
            self.shared.note(state, &result);
            result?;
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

    /// Has the back-end take what only one process may have, the lock of an image, or give it up
    /// for the machine's twin while no ring runs. It is taken anyway before rings start.
    pub fn hold(&self, hold: bool) -> Result<(), VhostUserError> {
        let state = &mut *self.shared.state();
        if state.wanted.is_some() {
            return if hold {
                Ok(())
            } else {
                Err(self.shared.rings_run())
            };
        }
        let result = self
            .shared
            .with_session(state, |session, _| session.hold(hold));
        self.shared.note(state, &result);
        result
    }

    /// What the device's part in a switchover will take, as far as the back-end can say; nothing
    /// where there is none now.
    pub fn forecast(&self) -> Result<Forecast, VhostUserError> {
        let state = &mut *self.shared.state();
        let Phase::Connected(session) = &mut state.phase else {
            return Ok(Forecast::default());
        };
        let result = session.forecast();
        self.shared.note(state, &result);
        result
    }

    /// Whether the back-end is of ours: what can be told ahead is, and one message does what takes
    /// others several.
    pub fn is_ours(&self) -> bool {
        matches!(&self.shared.state().phase, Phase::Connected(session) if session.is_ours())
    }

    /// Has the back-end map what guest memory holds, where it can be asked to.
    pub fn prefault(&self, deadline: Duration) -> Result<(), VhostUserError> {
        let state = &mut *self.shared.state();
        let Phase::Connected(session) = &mut state.phase else {
            return Ok(());
        };
        let result = session.prefault(deadline);
        self.shared.note(state, &result);
        result
    }

    /// Has a back-end of ours that runs stop, and then save its state into `channel`; and if the
    /// machine `goes`, give up what only one process may have. Whether that was ordered; then
    /// [`VirtioDevice::stop`] waits for the first, `within` that time, and [`Self::saved`] for the
    /// rest, and nobody may ask for anything else meanwhile.
    pub fn order_stop(&self, channel: &OwnedFd, goes: bool, within: Duration) -> bool {
        let state = &mut *self.shared.state();
        let Phase::Connected(session) = &mut state.phase else {
            return false;
        };
        if state.wanted.is_none() || !session.is_ours() {
            return false;
        }
        state.touched = true;
        let result = session.order_stop(channel, goes);
        // Who is gone is noticed by who waits.
        self.shared.note(state, &result);
        state.stops_by = Some(Instant::now() + within);
        true
    }

    /// Whether it was ordered to stop and save, and that was not awaited.
    pub fn is_leaving(&self) -> bool {
        matches!(&self.shared.state().phase, Phase::Connected(session) if session.connection.is_owed())
    }

    /// Waits until the back-end has saved its state, and given up what it must, as
    /// [`Self::order_stop`] said.
    pub fn saved(&self, deadline: Duration) -> Result<(), VhostUserError> {
        let state = &mut *self.shared.state();
        let connection = self.shared.stopped_session(state)?;
        let result = rings::saved(connection, deadline);
        self.shared.note(state, &result);
        result
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

    /// Tells the network where the guest is now, if this is a network card whose back-end can.
    pub fn announce(&self) -> Result<(), VhostUserError> {
        if self.shared.config.kind != DeviceKind::NET || !self.shared.has(Protocol::RARP) {
            return Ok(());
        }
        let state = &mut *self.shared.state();
        // The driver may have changed the address.
        let config = self.shared.fetch_config(state)?;
        let Some(&mac) = config.as_deref().and_then(<[u8]>::first_chunk) else {
            return Ok(());
        };
        let Phase::Connected(session) = &mut state.phase else {
            return Ok(());
        };
        let result = session.connection.send_rarp(mac);
        self.shared.note(state, &result);
        result
    }

    /// Fails if the back-end is not the one that was there `reconnects` ago, or is gone, whether
    /// that was noticed before or not. It is sent nothing.
    pub fn check_served_since(&self, reconnects: u32) -> Result<(), VhostUserError> {
        let state = self.shared.state();
        match &state.phase {
            Phase::Connected(session)
                if self.reconnects() == reconnects && !session.connection.has_hung_up() =>
            {
                Ok(())
            }
            _ => Err(self.shared.away()),
        }
    }

    /// Ends every wait for an answer, of this device and of all others of its machine: who has not
    /// answered by now is taken for gone.
    pub fn give_up(&self) {
        self.shared.watchdog.give_up();
    }

    /// As [`Self::give_up`], from now on: the machine ends, and waits for no device.
    pub fn end_waits(&self) {
        self.shared.watchdog.end();
    }

    /// Waits for the end of a transfer of state, and says whether all of it was good.
    pub fn check_state(&self, deadline: Duration) -> Result<(), VhostUserError> {
        let state = &mut *self.shared.state();
        let result = state::check(self.shared.stopped_session(state)?, deadline);
        self.shared.note(state, &result);
        result
    }

    /// The back-end has loaded its state. What the guest reads of a balloon is part of that, and
    /// must not be what it was before when the guest goes on.
    pub fn loaded(&self) -> Result<(), VhostUserError> {
        if self.shared.config.kind != DeviceKind::BALLOON {
            return Ok(());
        }
        let state = &mut *self.shared.state();
        if let Some(bytes) = self.shared.fetch_config(state)? {
            self.shared.set_config(bytes);
        }
        Ok(())
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

    fn wire(&self, features: u64, mut queues: Vec<ActivatedQueue>) -> Result<(), DeviceError> {
        queues.retain(|queue| queue.index.0 < self.shared.plan.served);
        let state = &mut *self.shared.state();
        let wanted = Wanted { features, queues };
        state.touched = true;
        let result = self
            .shared
            .with_session(state, |session, around| session.wire(&wanted, around));
        self.shared.settle(state, result).map_err(DeviceError::new)
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

    fn order_activate(
        &self,
        features: u64,
        mut queues: Vec<ActivatedQueue>,
    ) -> Result<bool, DeviceError> {
        queues.retain(|queue| queue.index.0 < self.shared.plan.served);
        let state = &mut *self.shared.state();
        if !matches!(&state.phase, Phase::Connected(session) if session.is_ours()) {
            return Ok(false);
        }
        let wanted = Wanted { features, queues };
        state.touched = true;
        let result = self.shared.with_session(state, |session, around| {
            session.order_start(&wanted, around)
        });
        let result = self.shared.settle(state, result).map_err(DeviceError::new);
        state.wanted = result.is_ok().then_some(wanted);
        result.map(|()| true)
    }

    fn activated(&self, within: Duration) -> Result<(), DeviceError> {
        let state = &mut *self.shared.state();
        let result = self
            .shared
            .with_session(state, |session, _| session.started(within));
        self.shared.settle(state, result).map_err(|error| {
            state.wanted = None;
            DeviceError::new(error)
        })
    }

    fn looks_at_rings(&self) -> bool {
        self.is_ours()
    }

    fn stop(&self) -> Result<Vec<StoppedQueue>, DeviceError> {
        let state = &mut *self.shared.state();
        let Some(wanted) = state.wanted.take() else {
            return Ok(Vec::new());
        };
        let left = |end: Instant| end.saturating_duration_since(Instant::now());
        let ordered = state.stops_by.take().map(left);
        let result = match &mut state.phase {
            Phase::Connected(session) => session.stop(&wanted, ordered),
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

impl RemoteDevice for VhostUserDevice {
    fn health(&self) -> Health {
        Health {
            connected: self.is_connected(),
            reconnects: self.reconnects(),
            trouble: self.failure().map(|e| chain(&*e)).unwrap_or_default(),
        }
    }
}

impl LayoutListener for VhostUserDevice {
    fn name(&self) -> String {
        format!("device {}", self.shared.id())
    }

    fn commit(&self, change: &LayoutChange<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let ram = change.all.iter().filter(|region| region.is_ram());
        let regions: Vec<_> = ram.cloned().collect();
        let state = &mut *self.shared.state();
        if state.regions == regions {
            return Ok(());
        }
        if let Some(log) = &state.log
            && !log.covers(&regions)
        {
            let full = io::Error::from(io::ErrorKind::StorageFull);
            return Err(Box::new(system(
                self.shared.id(),
                "log the new memory",
                full,
            )));
        }
        if let Phase::Connected(session) = &mut state.phase {
            let result = session.set_memory(&regions, state.log.as_deref());
            self.shared.settle(state, result)?;
        }
        state.regions = regions;
        Ok(())
    }
}
