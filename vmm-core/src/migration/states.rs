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
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::channel::{Cancel, StateChannel};
use nix::sys::socket::{Shutdown as SocketShutdown, shutdown};

use super::barrier::Arrival;
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

    /// Stops every device, and lets it save at once; each arrives twice. If the machine `goes`, a
    /// device that has saved gives up what only one process may have.
    pub(super) fn stop_and_save(
        &self,
        crew: &Crew,
        goes: bool,
    ) -> (Receiver<Arrival<DeviceWiring>>, Receiver<Arrival<()>>) {
        let ((stop, stopped), (save, saved)) = (channel(), channel());
        crew.send(|number| {
            let (stop, save, states) = (stop.clone(), save.clone(), self.clone());
            Box::new(move |unit| {
                let is_stopped = arrive(&stop, number, || {
                    states.save_at_stop(number, unit, goes);
                    unit.pci.stop()?;
                    Ok(DeviceWiring {
                        id: unit.id.clone(),
                        state: unit.pci.save()?,
                    })
                });
                if is_stopped {
                    arrive(&save, number, || states.save(number, unit, goes));
                }
            })
        });
        (stopped, saved)
    }

    fn is_ahead(&self, number: usize) -> bool {
        self.pairs()[number].as_ref().is_some_and(|pair| pair.ahead)
    }

    /// Gives a device of ours its socket with the order to stop.
    fn save_at_stop(&self, number: usize, unit: &Unit, goes: bool) {
        if self.is_ahead(number)
            && let Some(socket) = self.take(number)
        {
            unit.remote.save_at_stop(socket, goes);
        }
    }

    /// Lets a stopped device save itself into its socket, and let go. Nothing for one without state.
    fn save(&self, number: usize, unit: &Unit, goes: bool) -> Result<(), MigrationError> {
        if self.is_ahead(number) {
            let saved = unit.remote.saved(BLACKOUT_DEADLINE);
            if !matches!(saved, Ok(Some(_))) {
                // With the last copy the twin sees the end.
                self.pairs()[number] = None;
            }
            let Some(socket) = saved? else {
                return Ok(());
            };
            // It did not run.
            self.straight(number, unit, StateDirection::Save, socket)?;
        } else {
            self.transfer(number, unit, StateDirection::Save)?;
        }
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
