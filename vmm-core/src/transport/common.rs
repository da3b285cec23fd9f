//! The common configuration structure (virtio 1.3, 4.1.4.3) and the life of the device.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::notifier::Notifier;
use super::queue::{Queue, QueueError};
use super::saved_state::{QueueState, TransportState};
use super::{ActivatedQueue, DeviceError, DeviceNotifier, QueueIndex, RingBase, VirtioDevice};
use crate::pci::{Msix, MsixError, SourceIndex};

/// Device status bits (virtio 1.3, 2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;
/// Bits that a driver writes.
const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const SELECTED_QUEUE_ABSENT: u64 = 0;

/// The configuration change's interrupt; queue `i` has source `i + 1`.
pub(super) const CONFIG_SOURCE: SourceIndex = SourceIndex(0);

pub(super) fn queue_source(queue: usize) -> SourceIndex {
    SourceIndex(queue + 1)
}

/// Where each register is.
mod register {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const STATUS: u64 = 0x14;
    pub(super) const GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub(super) const QUEUE_DRIVER: u64 = 0x28;
    pub(super) const QUEUE_DEVICE: u64 = 0x30;
    pub(super) const QUEUE_END: u64 = 0x38;
}

/// Where the device is in its life, see the module's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Idle,
    Running,
    Stopped,
}

/// Why saved registers were not taken.
#[derive(Debug, Error)]
pub enum StateError {
    /// Another number of queues.
    #[error("saved device has {found} queues, this one has {expected}")]
    Queues {
        /// Queues saved.
        found: usize,
        /// Queues here.
        expected: usize,
    },
    /// Features accepted that are not offered here.
    #[error("saved features {found:#x} are not all in the offer {offer:#x}")]
    Features {
        /// Features saved.
        found: u64,
        /// Features offered here.
        offer: u64,
    },
    /// A status that no driver can have brought about.
    #[error("saved device status {0:#04x} is impossible")]
    Status(u8),
    /// A queue that cannot be.
    #[error("saved queue {index} is impossible")]
    Queue {
        /// Which queue.
        index: QueueIndex,
        /// Why.
        #[source]
        source: QueueError,
    },
}

/// The registers, and the device behind them.
pub(super) struct Common {
    device: Arc<dyn VirtioDevice>,
    notifier: Arc<Notifier>,
    pub(super) queues: Vec<Queue>,
    life: Life,
    status: u8,
    offer: u64,
    driver_features: u64,
    /// The driver accepted a feature beyond bit 63.
    unknown_features: bool,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
}

impl Common {
    pub(super) fn new(device: Arc<dyn VirtioDevice>, notifier: Arc<Notifier>) -> io::Result<Self> {
        let queues = (0..device.queues())
            .map(|_| Queue::new(device.max_queue_size()))
            .collect::<Result<_, _>>()?;
        let offer = device.features() | VERSION_1;
        Ok(Self {
            device,
            notifier,
            queues,
            life: Life::Idle,
            status: 0,
            offer,
            driver_features: 0,
            unknown_features: false,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
        })
    }

    pub(super) fn life(&self) -> Life {
        self.life
    }

    fn status(&self) -> u8 {
        let needs_reset = self.notifier.needs_reset();
        self.status | if needs_reset { NEEDS_RESET } else { 0 }
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn selected_source(&self) -> SourceIndex {
        queue_source(usize::from(self.queue_select))
    }

    /// Fills `data`; a field is read whole, and a 64-bit one also by halves.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], msix: &Msix) {
        let queue = |field: fn(&Queue) -> u64| self.selected().map_or(SELECTED_QUEUE_ABSENT, field);
        let value = match (offset, data.len()) {
            (register::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select.into(),
            (register::DEVICE_FEATURE, 4) => half(self.offer, self.device_feature_select),
            (register::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select.into(),
            (register::DRIVER_FEATURE, 4) => half(self.driver_features, self.driver_feature_select),
            (register::CONFIG_VECTOR, 2) => msix.vector(CONFIG_SOURCE).into(),
            (register::NUM_QUEUES, 2) => self.queues.len() as u64,
            (register::STATUS, 1) => self.status().into(),
            (register::GENERATION, 1) => self.notifier.generation().into(),
            (register::QUEUE_SELECT, 2) => self.queue_select.into(),
            (register::QUEUE_SIZE, 2) => queue(|q| q.size.into()),
            (register::QUEUE_VECTOR, 2) => msix.vector(self.selected_source()).into(),
            (register::QUEUE_ENABLE, 2) => queue(|q| q.enabled.into()),
            (register::QUEUE_NOTIFY_OFF, 2) => self.queue_select.into(),
            (register::QUEUE_DESCRIPTORS..register::QUEUE_END, 4 | 8)
                if offset.is_multiple_of(data.len() as u64) =>
            {
                let value = match offset & !7 {
                    register::QUEUE_DESCRIPTORS => queue(|q| q.descriptors),
                    register::QUEUE_DRIVER => queue(|q| q.driver),
                    register::QUEUE_DEVICE => queue(|q| q.device),
                    _ => 0,
                };
                value >> (offset % 8 * 8)
            }
            _ => 0,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    /// Takes a driver's write. What does not fit the life of the device is dropped.
    pub(super) fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        msix: &mut Msix,
    ) -> Result<(), MsixError> {
        let mut bytes = [0; 8];
        if data.len() > bytes.len() {
            return Ok(());
        }
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let [a, b, c, d, ..] = bytes;
        let (low16, low32) = (u16::from_le_bytes([a, b]), u32::from_le_bytes([a, b, c, d]));
        match (offset, data.len()) {
            (register::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = low32,
            (register::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = low32,
            (register::DRIVER_FEATURE, 4) if self.status & FEATURES_OK == 0 => {
                self.accept_features(low32);
            }
            (register::CONFIG_VECTOR, 2) => msix.set_vector(CONFIG_SOURCE, low16)?,
            (register::STATUS, 1) => self.write_status(bytes[0], msix)?,
            (register::QUEUE_SELECT, 2) => self.queue_select = low16,
            (register::QUEUE_VECTOR, 2) => msix.set_vector(self.selected_source(), low16)?,
            _ if self.status & DRIVER_OK == 0 => self.write_queue(offset, data.len(), value, low16),
            _ => {}
        }
        Ok(())
    }

    fn accept_features(&mut self, bits: u32) {
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            _ => {
                self.unknown_features |= bits != 0;
                return;
            }
        };
        self.driver_features &= !(0xffff_ffff << shift);
        self.driver_features |= u64::from(bits) << shift;
    }

    /// `low` is the lower end of `value`.
    fn write_queue(&mut self, offset: u64, len: usize, value: u64, low: u16) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if queue.enabled {
            return;
        }
        match (offset, len) {
            (register::QUEUE_SIZE, 2) if queue.is_size_valid(low) => queue.size = low,
            (register::QUEUE_ENABLE, 2) if value == 1 => queue.enabled = true,
            (register::QUEUE_DESCRIPTORS..register::QUEUE_END, 4 | 8)
                if offset.is_multiple_of(len as u64) =>
            {
                let field = match offset & !7 {
                    register::QUEUE_DESCRIPTORS => &mut queue.descriptors,
                    register::QUEUE_DRIVER => &mut queue.driver,
                    register::QUEUE_DEVICE => &mut queue.device,
                    _ => return,
                };
                *field = match (len, offset % 8) {
                    (8, _) => value,
                    (_, 0) => *field & !0xffff_ffff | value,
                    _ => *field & 0xffff_ffff | value << 32,
                };
            }
            _ => {}
        }
    }

    /// Status handshake (virtio 1.3, 3.1.1). A driver only ever adds bits, or writes 0.
    fn write_status(&mut self, value: u8, msix: &mut Msix) -> Result<(), MsixError> {
        if value == 0 {
            return self.reset(msix);
        }
        let mut added = value & DRIVER_BITS & !self.status;
        if added & FEATURES_OK != 0 && !self.are_features_acceptable() {
            added &= !FEATURES_OK;
        }
        let features_ok = (self.status | added) & FEATURES_OK != 0;
        if added & DRIVER_OK != 0 && !features_ok {
            added &= !DRIVER_OK;
        }
        self.status |= added;
        if added & DRIVER_OK != 0 {
            self.notifier.set_driver_ok(true);
            if let Err(error) = self.activate(msix) {
                self.notifier.trouble(&error);
            }
        }
        Ok(())
    }

    fn are_features_acceptable(&self) -> bool {
        !self.unknown_features
            && self.driver_features & !self.offer == 0
            && self.driver_features & VERSION_1 != 0
    }

    fn activate(&mut self, msix: &Msix) -> Result<(), DeviceError> {
        let queues = self.enabled_queues(msix)?;
        self.device.activate(self.driver_features, queues)?;
        self.life = Life::Running;
        Ok(())
    }

    /// Prepares the device to start, if the driver has started it.
    pub(super) fn wire(&self, msix: &Msix) -> Result<(), DeviceError> {
        if self.life != Life::Stopped {
            return Ok(());
        }
        let queues = self.enabled_queues(msix)?;
        self.device.wire(self.driver_features, queues)
    }

    fn enabled_queues(&self, msix: &Msix) -> Result<Vec<ActivatedQueue>, DeviceError> {
        let indices = (0..).map(QueueIndex);
        let enabled = indices.zip(&self.queues).filter(|(_, q)| q.enabled);
        let activated = |(index, queue): (QueueIndex, &Queue)| {
            queue.check().map_err(DeviceError::new)?;
            Ok(ActivatedQueue {
                index,
                size: queue.size,
                descriptors: queue.descriptors,
                driver: queue.driver,
                device: queue.device,
                base: queue.base,
                kick: Arc::clone(&queue.kick),
                call: msix
                    .event(queue_source(index.0.into()))
                    .map_err(DeviceError::new)?,
            })
        };
        enabled.map(activated).collect()
    }

    /// Stops the activated queues, if the device runs. Stopping twice is fine.
    pub(super) fn stop(&mut self) -> Result<(), DeviceError> {
        if self.life != Life::Running {
            return Ok(());
        }
        for stopped in self.device.stop()? {
            if let Some(queue) = self.queues.get_mut(usize::from(stopped.index.0)) {
                queue.base = stopped.base;
            }
        }
        self.life = Life::Stopped;
        Ok(())
    }

    /// Goes on where [`Self::stop`] or [`Self::restore`] left off. A configuration change that the
    /// driver may not have heard of is signalled once more.
    pub(super) fn resume(&mut self, msix: &Msix) -> Result<(), DeviceError> {
        if self.life != Life::Stopped {
            return Ok(());
        }
        self.activate(msix)?;
        self.catch_up(msix)
    }

    /// Has the device go on as [`Self::resume`] does, if it can be ordered to; then
    /// [`Self::resumed`] must be asked.
    pub(super) fn order_resume(&mut self, msix: &Msix) -> Result<bool, DeviceError> {
        if self.life != Life::Stopped {
            return Ok(false);
        }
        let queues = self.enabled_queues(msix)?;
        let ordered = self.device.order_activate(self.driver_features, queues)?;
        if ordered {
            self.life = Life::Running;
        }
        Ok(ordered)
    }

    /// Waits until the device goes on.
    pub(super) fn resumed(&mut self, msix: &Msix, within: Duration) -> Result<(), DeviceError> {
        if let Err(error) = self.device.activated(within) {
            self.life = Life::Stopped;
            return Err(error);
        }
        self.catch_up(msix)
    }

    /// What may have been missed while the device was stopped.
    fn catch_up(&self, msix: &Msix) -> Result<(), DeviceError> {
        let unseen = !self.device.looks_at_rings();
        let queues = self.queues.iter().enumerate();
        for (i, queue) in queues.filter(|(_, q)| q.enabled && unseen) {
            let call = msix.event(queue_source(i)).map_err(DeviceError::new)?;
            for event in [&queue.kick, &call] {
                event.write(1).map_err(DeviceError::new)?;
            }
        }
        if self.notifier.is_config_changed() {
            self.notifier.interrupt();
        }
        Ok(())
    }

    /// As after power-on, the device too. A device that fails in it is reported, but does
    /// not ask for another reset: drivers wait for a status of 0.
    pub(super) fn reset(&mut self, msix: &mut Msix) -> Result<(), MsixError> {
        self.notifier.set_driver_ok(false);
        let result = self.device.reset();
        self.notifier.set_needs_reset(false);
        self.notifier.set_config_changed(false);
        self.life = Life::Idle;
        self.status = 0;
        self.driver_features = 0;
        self.unknown_features = false;
        (self.device_feature_select, self.driver_feature_select) = (0, 0);
        self.queue_select = 0;
        self.queues.iter_mut().for_each(Queue::reset);
        if let Err(error) = result {
            self.notifier.report(&error);
        }
        msix.reset_sources()
    }

    pub(super) fn save(&self, msix: &Msix) -> TransportState {
        let queue = |(i, q): (usize, &Queue)| QueueState {
            size: q.size,
            enabled: q.enabled,
            descriptors: q.descriptors,
            driver: q.driver,
            device: q.device,
            vector: msix.vector(queue_source(i)),
            base: q.base.0,
        };
        TransportState {
            status: self.status,
            needs_reset: self.notifier.needs_reset(),
            driver_features: self.driver_features,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            config_vector: msix.vector(CONFIG_SOURCE),
            config_generation: self.notifier.generation(),
            config_changed: self.notifier.is_config_changed(),
            queues: self.queues.iter().enumerate().map(queue).collect(),
        }
    }

    /// Whether [`Self::restore`] would take the state.
    pub(super) fn check(&self, state: &TransportState) -> Result<(), StateError> {
        if state.queues.len() != self.queues.len() {
            return Err(StateError::Queues {
                found: state.queues.len(),
                expected: self.queues.len(),
            });
        }
        let status = state.status;
        let driver_ok_alone = status & DRIVER_OK != 0 && status & FEATURES_OK == 0;
        if status & !DRIVER_BITS != 0 || driver_ok_alone {
            return Err(StateError::Status(status));
        }
        let accepted = status & FEATURES_OK != 0;
        if accepted && state.driver_features & !self.offer != 0 {
            return Err(StateError::Features {
                found: state.driver_features,
                offer: self.offer,
            });
        }
        let indices = (0..).map(QueueIndex);
        for (index, (saved, queue)) in indices.zip(state.queues.iter().zip(&self.queues)) {
            // Addresses mean something only once the queue is enabled.
            let areas = match saved.enabled {
                true => [saved.descriptors, saved.driver, saved.device],
                false => [0; 3],
            };
            queue
                .check_layout(saved.size, areas)
                .map_err(|source| StateError::Queue { index, source })?;
        }
        Ok(())
    }

    /// Takes a checked state over; vectors are [`Msix::restore`]'s.
    pub(super) fn restore(&mut self, state: &TransportState) {
        self.status = state.status;
        self.driver_features = state.driver_features;
        self.unknown_features = false;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.queue_select = state.queue_select;
        for (queue, saved) in self.queues.iter_mut().zip(&state.queues) {
            queue.size = saved.size;
            queue.enabled = saved.enabled;
            queue.descriptors = saved.descriptors;
            queue.driver = saved.driver;
            queue.device = saved.device;
            queue.base = RingBase(saved.base);
        }
        let driver_ok = state.status & DRIVER_OK != 0;
        self.notifier.set_generation(state.config_generation);
        self.notifier.set_config_changed(state.config_changed);
        self.notifier.set_needs_reset(state.needs_reset);
        self.notifier.set_driver_ok(driver_ok);
        self.life = if driver_ok && !state.needs_reset {
            Life::Stopped
        } else {
            Life::Idle
        };
    }
}

fn half(bits: u64, select: u32) -> u64 {
    match select {
        0 => bits & 0xffff_ffff,
        1 => bits >> 32,
        _ => 0,
    }
}
