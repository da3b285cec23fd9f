//! What the device and its workers share.
//!
//! The driver's settings (features, control state) have one owner, [`Shared`], behind a lock that
//! is taken only when they change or are looked at by the control thread. Workers use a [`View`]
//! of them, made anew at each change; a worker sees by one atomic number that there is a newer
//! one. A packet is handled by one view from its first byte to its last.
//!
//! Order rule: a change goes to the tap first, then to the state, then to the workers. A change
//! that the tap refuses leaves everything as it was.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use device_kit::{ConfigChange, QueueIndex, StateError};

use crate::config::NetConfig;
use crate::config_space::ConfigSpace;
use crate::control::{self, CommandError, ControlState, Limits};
use crate::features::{Features, Offloads};
use crate::filter::RxFilter;
use crate::mac::MacAddress;
use crate::metrics::Metrics;
use crate::packet::HEADER_LEN;
use crate::saved_state::NetState;
use crate::tap::Tap;

/// The features of a driver that accepted none yet: nothing but that it is not a legacy one.
const UNTOLD: Features = Features::VERSION_1;

/// The device, as every thread of the process sees it.
#[derive(Debug)]
pub(crate) struct Shared {
    tap: Tap,
    mac: MacAddress,
    mtu: Option<u16>,
    config_change: ConfigChange,
    metrics: Metrics,
    state: Mutex<State>,
    /// Number of the newest view.
    newest: AtomicU64,
}

#[derive(Debug)]
struct State {
    features: Features,
    control: ControlState,
    /// The driver is still to be told that it shall announce itself: while rings are stopped,
    /// nothing may be said to it.
    announce_untold: bool,
    view: Arc<View>,
    /// Pairs that the driver does not use are detached from the tap.
    settled: bool,
    /// What the tap was set to last.
    tap_offloads: Offloads,
    tap_header_len: usize,
}

/// The driver's settings, as workers use them.
#[derive(Debug)]
pub(crate) struct View {
    /// Bytes of the virtio header before each packet.
    pub(crate) header_len: usize,
    /// A packet may be put into several receive buffers.
    pub(crate) mergeable: bool,
    /// What the driver takes on.
    pub(crate) offloads: Offloads,
    /// Which packets the guest wants.
    pub(crate) filter: RxFilter,
    /// VLANs are filtered.
    pub(crate) vlan_filter: bool,
    /// The control queue, when the driver has one that comes here.
    pub(crate) control_queue: Option<QueueIndex>,
    /// Pairs that the driver does not use are detached from the tap.
    pub(crate) settled: bool,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Packets to the guest.
    Rx,
    /// Packets from the guest.
    Tx,
    /// Commands.
    Control,
}

impl View {
    fn new(features: Features, control: &ControlState, pairs: u16, settled: bool) -> View {
        // Without MQ the driver knows of one pair, whatever the device has (section 5.1.2).
        let used_pairs = if features.contains(Features::MQ) {
            pairs
        } else {
            1
        };
        View {
            header_len: features.header_len(),
            mergeable: features.contains(Features::MRG_RXBUF),
            offloads: control.effective_offloads(features),
            filter: control.filter.clone(),
            vlan_filter: features.contains(Features::CTRL_VLAN),
            control_queue: features
                .contains(Features::CTRL_VQ)
                .then(|| QueueIndex::new(2 * used_pairs)),
            settled,
        }
    }

    /// What `queue` is for.
    pub(crate) fn role(&self, queue: QueueIndex) -> Role {
        if self.control_queue == Some(queue) {
            Role::Control
        } else if queue.get().is_multiple_of(2) {
            Role::Rx
        } else {
            Role::Tx
        }
    }
}

impl Shared {
    pub(crate) fn new(config: NetConfig, metrics: Metrics, config_change: ConfigChange) -> Shared {
        let control = ControlState::new(config.mac);
        let features = UNTOLD;
        let pairs = config.tap.pairs();
        let settled = pairs == 1;
        let view = View::new(features, &control, pairs, settled);
        Shared {
            tap: config.tap,
            mac: config.mac,
            mtu: config.mtu,
            config_change,
            metrics,
            state: Mutex::new(State {
                features,
                control,
                announce_untold: false,
                settled,
                view: Arc::new(view),
                tap_offloads: Offloads::empty(),
                tap_header_len: HEADER_LEN,
            }),
            newest: AtomicU64::new(0),
        }
    }

    pub(crate) fn tap(&self) -> &Tap {
        &self.tap
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Bytes of the virtio header before each packet of the tap.
    pub(crate) fn header_len(&self) -> usize {
        self.lock().tap_header_len
    }

    /// The features to offer.
    pub(crate) fn offered(&self) -> Features {
        let mut features = Features::MAC
            | Features::STATUS
            | Features::MRG_RXBUF
            | Features::CTRL_VQ
            | Features::CTRL_RX
            | Features::CTRL_RX_EXTRA
            | Features::CTRL_VLAN
            | Features::CTRL_MAC_ADDR
            | Features::GUEST_ANNOUNCE
            | Features::of_tap(self.tap.possible_offloads());
        features.set(
            Features::CTRL_GUEST_OFFLOADS,
            features.contains(Features::GUEST_CSUM),
        );
        features.set(Features::MQ, self.tap.pairs() > 1);
        features.set(Features::MTU, self.mtu.is_some());
        features
    }

    /// The driver accepted these.
    pub(crate) fn accept(&self, features: Features) {
        let mut state = self.lock();
        if state.features == features {
            return;
        }
        let control = state.control.clone();
        if let Err(error) = self.apply(&mut state, features, &control) {
            // Packets that need what could not be set are dropped and counted.
            tracing::error!(tap = self.tap.name(), %error, "the tap does not take the driver's offloads");
        }
        self.unsettle(&mut state);
        self.publish(&mut state, features, control);
        drop(state);
        if features.contains(Features::CTRL_VQ) && !features.contains(Features::MQ) {
            // This driver knows of one pair; nothing is to be waited for.
            self.settle();
        }
    }

    /// The configuration space now.
    pub(crate) fn config_space(&self) -> ConfigSpace {
        let state = self.lock();
        ConfigSpace {
            mac: state.control.filter.mac,
            announce: state.control.announce && state.features.contains(Features::GUEST_ANNOUNCE),
            max_pairs: self.tap.pairs(),
            mtu: self.mtu.unwrap_or(0),
        }
    }

    /// Carries out a command of the driver and returns the answer.
    pub(crate) fn command(&self, command: &[u8]) -> u8 {
        let mut state = self.lock();
        let limits = Limits {
            features: state.features,
            pairs: self.tap.pairs(),
        };
        let done = match state.control.after(command, limits) {
            Ok(next) => {
                let features = state.features;
                self.apply(&mut state, features, &next)
                    .and_then(|()| self.set_pairs(&mut state, next.active_pairs))
                    .map(|()| self.publish(&mut state, features, next))
            }
            Err(error) => {
                drop(state);
                return self.refuse(&error);
            }
        };
        match done {
            Ok(()) => control::OK,
            Err(error) => {
                tracing::error!(tap = self.tap.name(), %error, "the tap does not take a command");
                self.metrics.refused_command();
                control::ERR
            }
        }
    }

    /// The answer to a command that makes no sense.
    pub(crate) fn refuse(&self, error: &CommandError) -> u8 {
        tracing::debug!(%error, "control command refused");
        self.metrics.refused_command();
        control::ERR
    }

    /// Tells the driver to announce itself, once after a move, when its rings run again.
    pub(crate) fn tell_announce(&self) {
        let mut state = self.lock();
        if std::mem::take(&mut state.announce_untold)
            && state.features.contains(Features::GUEST_ANNOUNCE)
        {
            drop(state);
            self.config_change.notify();
        }
    }

    /// What the driver made of the device.
    pub(crate) fn save(&self) -> NetState {
        NetState::from(&self.lock().control)
    }

    /// Takes over what the driver made of this device's twin.
    pub(crate) fn load(&self, saved: NetState) -> Result<(), StateError> {
        let mut control = saved.check(self.tap.pairs(), self.tap.possible_offloads())?;
        // The network is to learn where the guest is now.
        control.announce = true;
        let mut state = self.lock();
        let features = state.features;
        self.apply(&mut state, features, &control)
            .map_err(|error| {
                StateError(format!(
                    "tap {} does not take {} queue pairs and their offloads ({error})",
                    self.tap.name(),
                    control.active_pairs
                ))
            })?;
        state.announce_untold = true;
        self.unsettle(&mut state);
        self.publish(&mut state, features, control);
        Ok(())
    }

    /// Back to what it was when it was made, but for the features: the next driver's are told when
    /// they differ.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        let (features, control) = (state.features, ControlState::new(self.mac));
        if let Err(error) = self.apply(&mut state, features, &control) {
            tracing::error!(tap = self.tap.name(), %error, "the tap was not reset");
        }
        state.announce_untold = false;
        self.tap.release_claims();
        self.unsettle(&mut state);
        self.publish(&mut state, features, control);
    }

    /// Sets the tap to what the state is going to be.
    fn apply(&self, state: &mut State, features: Features, next: &ControlState) -> io::Result<()> {
        let offloads = next.effective_offloads(features);
        if offloads != state.tap_offloads {
            self.tap.set_offloads(offloads)?;
            state.tap_offloads = offloads;
        }
        let header_len = features.header_len();
        if header_len != state.tap_header_len {
            self.tap.set_header_len(header_len)?;
            state.tap_header_len = header_len;
        }
        Ok(())
    }

    /// The driver said how many pairs it uses.
    fn set_pairs(&self, state: &mut State, pairs: u16) -> io::Result<()> {
        if pairs != state.control.active_pairs {
            self.tap.attach(pairs)?;
            self.tap.detach_after(pairs)?;
            state.settled = true;
        }
        Ok(())
    }

    /// It is open again which pairs are used.
    fn unsettle(&self, state: &mut State) {
        state.settled = self.tap.pairs() == 1;
    }

    /// The driver's first receive buffers are there: had it meant to use more pairs, it would have
    /// said so by now. Not done earlier, because it takes milliseconds, which a driver that is
    /// about to use all pairs need not wait.
    pub(crate) fn settle(&self) {
        let mut state = self.lock();
        if state.settled {
            return;
        }
        let detached = if state.view.control_queue.is_some() {
            self.tap.detach_after(state.control.active_pairs)
        } else {
            self.tap.detach_unclaimed()
        };
        if let Err(error) = detached {
            tracing::error!(tap = self.tap.name(), %error, "unused queues of the tap stay attached");
        }
        state.settled = true;
        let (features, control) = (state.features, state.control.clone());
        self.publish(&mut state, features, control);
    }

    /// Takes the state over and shows it to the workers.
    fn publish(&self, state: &mut State, features: Features, control: ControlState) {
        state.features = features;
        state.control = control;
        state.view = Arc::new(View::new(
            state.features,
            &state.control,
            self.tap.pairs(),
            state.settled,
        ));
        self.newest.fetch_add(1, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker's copy of the newest view.
#[derive(Debug)]
pub(crate) struct Viewer {
    seen: u64,
    view: Arc<View>,
}

impl Viewer {
    pub(crate) fn new(shared: &Shared) -> Viewer {
        let state = shared.lock();
        Viewer {
            seen: shared.newest.load(Ordering::Acquire),
            view: Arc::clone(&state.view),
        }
    }

    /// Takes the newest view; whether it is another than the last time.
    pub(crate) fn refresh(&mut self, shared: &Shared) -> bool {
        let changed = shared.newest.load(Ordering::Acquire) != self.seen;
        if changed {
            *self = Viewer::new(shared);
        }
        changed
    }

    /// The view that was taken last.
    pub(crate) fn view(&self) -> &View {
        &self.view
    }
}
