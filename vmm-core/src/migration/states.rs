//! The sockets from device to device, and what goes through them.
//!
//! ```text
//! ours     source       socket given with the order to stop ─ stopped ─ saved and let go, by a second answer
//!          destination  socket given before the stop … the twin's state comes ─ CHECK_DEVICE_STATE
//! others   stopped ─ SET_DEVICE_STATE_FD, on both sides ─ CHECK_DEVICE_STATE
//! ```
//! What passes there passes no core; only a back-end that insists on a descriptor of its own is
//! relayed, and all are without [`Mechanism::Channels`].

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration::channel::{Cancel, StateChannel};
use migration::report::Recorder;
use nix::sys::socket::{Shutdown as SocketShutdown, shutdown};

use super::barrier::{self, Arrival, Barrier};
use super::error::system;
use super::saved_state::DeviceWiring;
use super::unit::{Crew, Unit, arrive};
use super::without::{Mechanism, Turns, Without};
use super::{BLACKOUT_DEADLINE, MigrationError};
use crate::remote::vhost_user::StateDirection;

/// The sockets from device to device. A copy of each is kept here until its device has saved, so
/// that a device that waits for a silent twin can be made to stop waiting.
#[derive(Clone)]
pub(super) struct StateSockets {
    pairs: Arc<Mutex<Vec<Option<Pair>>>>,
    /// Without [`Mechanism::Channels`]: who may use the cores' only way.
    turns: Option<Arc<Turns>>,
}

struct Pair {
    given: Option<OwnedFd>,
    kept: OwnedFd,
    /// The device is told before it is time.
    ahead: bool,
}

impl StateSockets {
    /// One for each of `units` that has state.
    pub(super) fn new(
        sockets: Vec<Option<OwnedFd>>,
        units: &[Arc<Unit>],
        without: &Without,
    ) -> io::Result<Self> {
        let turns = without.has(Mechanism::Channels);
        let pair = |(socket, unit): (Option<OwnedFd>, &Arc<Unit>)| {
            let pair = |socket: OwnedFd| {
                Ok(Pair {
                    kept: socket.try_clone()?,
                    given: Some(socket),
                    ahead: !turns && unit.remote.is_ours(),
                })
            };
            socket.map(pair).transpose()
        };
        let pairs = sockets.into_iter().zip(units).map(pair);
        let pairs = pairs.collect::<io::Result<_>>()?;
        Ok(Self {
            pairs: Arc::new(Mutex::new(pairs)),
            turns: turns.then(Arc::default),
        })
    }

    fn pairs(&self) -> MutexGuard<'_, Vec<Option<Pair>>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells every device to stop, save and, if the machine `goes`, give up what only one process may
    /// have. One of ours that runs is only told: all of them work while the first is heard. `within`
    /// that time they have stopped.
    pub(super) fn leave(&self, crew: &Crew, goes: bool, within: Duration) -> Leaving {
        let ((stop, stopped), (save, saved)) = (channel(), channel());
        let mut told = Vec::new();
        for (number, unit) in crew.units().iter().enumerate() {
            let begin = Instant::now();
            if crew.is_parallel() && self.order_stop(number, unit, goes, within) {
                told.push((number, Arc::clone(unit), begin));
                continue;
            }
            let (stop, save, states) = (stop.clone(), save.clone(), self.clone());
            crew.send(number, move |unit| {
                let begin = Instant::now();
                let told = states.order_stop(number, unit, goes, within);
                if arrive(&stop, number, begin, || stopped_device(unit)) {
                    arrive(&save, number, Instant::now(), || match told {
                        true => states.saved(number, unit, BLACKOUT_DEADLINE),
                        false => states.save(number, unit, goes),
                    });
                }
            });
        }
        Leaving {
            states: self.clone(),
            names: crew.names().to_vec(),
            told,
            stop,
            stopped,
            save,
            saved,
        }
    }

    fn is_ahead(&self, number: usize) -> bool {
        self.pairs()[number].as_ref().is_some_and(|pair| pair.ahead)
    }

    /// Gives a device of ours its socket with the order to stop.
    fn order_stop(&self, number: usize, unit: &Unit, goes: bool, within: Duration) -> bool {
        let mut pairs = self.pairs();
        let Some(pair) = pairs[number].as_mut().filter(|pair| pair.ahead) else {
            return false;
        };
        let channel = pair
            .given
            .take_if(|channel| unit.remote.order_stop(channel, goes, within));
        channel.is_some()
    }

    /// Waits until a device has saved and let go that was told to.
    fn saved(&self, number: usize, unit: &Unit, within: Duration) -> Result<(), MigrationError> {
        let saved = unit.remote.saved(within);
        // With the last copy the twin sees the end.
        self.pairs()[number] = None;
        Ok(saved?)
    }

    /// Lets a stopped device save itself into its socket, if it has state, and let go.
    fn save(&self, number: usize, unit: &Unit, goes: bool) -> Result<(), MigrationError> {
        self.transfer(number, unit, StateDirection::Save)?;
        match goes {
            true => unit.let_go(),
            false => Ok(()),
        }
    }

    /// Lets a device of ours wait for its twin's state before that comes.
    pub(super) fn load_ahead(&self, number: usize, unit: &Unit) -> Result<(), MigrationError> {
        if self.is_ahead(number)
            && let Some(socket) = self.take(number)
        {
            unit.remote.transfer_state(StateDirection::Load, socket)?;
        }
        Ok(())
    }

    /// Lets a stopped device load itself from its socket; it may do so already.
    pub(super) fn load(&self, number: usize, unit: &Unit) -> Result<(), MigrationError> {
        if self.is_ahead(number) {
            self.load_ahead(number, unit)?;
            let result = unit.remote.check_state(BLACKOUT_DEADLINE);
            self.pairs()[number] = None;
            result?;
        } else {
            self.transfer(number, unit, StateDirection::Load)?;
        }
        Ok(unit.remote.loaded()?)
    }

    fn take(&self, number: usize) -> Option<OwnedFd> {
        self.pairs()[number].as_mut().and_then(|p| p.given.take())
    }

    fn transfer(
        &self,
        number: usize,
        unit: &Unit,
        direction: StateDirection,
    ) -> Result<(), MigrationError> {
        let Some(turns) = &self.turns else {
            let Some(socket) = self.take(number) else {
                return Ok(());
            };
            return self.straight(number, unit, direction, socket);
        };
        turns.take(number, BLACKOUT_DEADLINE, || {
            self.through_cores(number, unit, direction)
        })
    }

    /// As without channels of its own: both cores pass the device's state on.
    fn through_cores(
        &self,
        number: usize,
        unit: &Unit,
        direction: StateDirection,
    ) -> Result<(), MigrationError> {
        if self.take(number).is_none() {
            return Ok(());
        }
        let (ours, theirs) = UnixStream::pair().map_err(system("a device's socket"))?;
        let mut file = match unit.remote.transfer_state(direction, theirs.into())? {
            Some(file) => file,
            None => OwnedFd::from(ours).into(),
        };
        self.relay(number, &mut file, direction)?;
        // The device sees the end.
        drop(file);
        Ok(unit.remote.check_state(BLACKOUT_DEADLINE)?)
    }

    fn straight(
        &self,
        number: usize,
        unit: &Unit,
        direction: StateDirection,
        socket: OwnedFd,
    ) -> Result<(), MigrationError> {
        if let Some(mut file) = unit.remote.transfer_state(direction, socket)? {
            self.relay(number, &mut file, direction)?;
        }
        let result = unit.remote.check_state(BLACKOUT_DEADLINE);
        // With the last copy the twin sees the end.
        self.pairs()[number] = None;
        Ok(result?)
    }

    /// For a back-end that insists on a descriptor of its own.
    fn relay(
        &self,
        number: usize,
        file: &mut std::fs::File,
        direction: StateDirection,
    ) -> Result<(), MigrationError> {
        let pair = self.pairs()[number].take();
        let Some(pair) = pair else { return Ok(()) };
        let cancel = Cancel::new().map_err(system("an eventfd"))?;
        let mut socket = StateChannel::new(pair.kept, BLACKOUT_DEADLINE, cancel);
        let copied = match direction {
            StateDirection::Save => io::copy(file, &mut socket),
            StateDirection::Load => io::copy(&mut socket, file),
        };
        copied.map(drop).map_err(system("a device's state"))
    }

    /// Ends every transfer that is still under way.
    pub(super) fn cut(&self) {
        for pair in self.pairs().iter().flatten() {
            // A file, or a socket that is closed already, needs none.
            let _ = shutdown(pair.kept.as_raw_fd(), SocketShutdown::Both);
        }
    }
}

/// Devices that have been told to leave.
pub(super) struct Leaving {
    states: StateSockets,
    names: Vec<String>,
    /// Who is heard here: its number, and when it was told.
    told: Vec<(usize, Arc<Unit>, Instant)>,
    stop: Sender<Arrival<DeviceWiring>>,
    stopped: Receiver<Arrival<DeviceWiring>>,
    save: Sender<Arrival<()>>,
    saved: Receiver<Arrival<()>>,
}

impl Leaving {
    /// Barrier D: waits until all have stopped.
    pub(super) fn stopped(
        &self,
        within: Duration,
        recorder: &mut Recorder,
    ) -> Result<Vec<DeviceWiring>, MigrationError> {
        for (number, unit, begin) in &self.told {
            arrive(&self.stop, *number, *begin, || stopped_device(unit));
        }
        let (names, arrivals) = (&self.names, &self.stopped);
        barrier::wait(Barrier::D, "stop", names, arrivals, within, recorder)
    }

    /// The devices' part of barrier E: waits until all have saved, and let go.
    pub(super) fn saved(
        &self,
        within: Duration,
        recorder: &mut Recorder,
    ) -> Result<(), MigrationError> {
        let end = Instant::now() + within;
        for (number, unit, begin) in &self.told {
            arrive(&self.save, *number, *begin, || {
                let left = end.saturating_duration_since(Instant::now());
                self.states.saved(*number, unit, left)
            });
        }
        let left = end.saturating_duration_since(Instant::now());
        let (names, arrivals) = (&self.names, &self.saved);
        barrier::wait(Barrier::E, "save", names, arrivals, left, recorder).map(drop)
    }
}

/// Waits until a device has stopped: what it is now.
fn stopped_device(unit: &Unit) -> Result<DeviceWiring, MigrationError> {
    unit.pci.stop()?;
    Ok(DeviceWiring {
        id: unit.id.clone(),
        state: unit.pci.save()?,
    })
}
