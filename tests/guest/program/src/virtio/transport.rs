//! The modern PCI transport (Virtio 1.2, section 4.1).
//!
//! Order, as section 3.1.1 wants it:
//! `Transport::start` (reset … FEATURES_OK) → `queue` for each → `driver_ok`.

use super::queue::Queue;
use super::{Setup, feature};
use crate::apic::ApicId;
use crate::console::fail;
use crate::interrupts::Vector;
use crate::pci::{Function, MsixTable, Window};
use crate::protocol::Text;
use crate::{clock, mmio};

const VENDOR: u16 = 0x1af4;
const CAP_VENDOR: u8 = 0x09;
const NO_VECTOR: u16 = 0xffff;
const RESET_TIMEOUT_US: u64 = 5_000_000;

/// Fields of the common configuration structure.
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
}

/// A kind of device (section 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Net,
    Block,
    Counter,
    Balloon,
}

/// The kind of a PCI function, if it is a virtio device that this program drives.
pub fn kind_of(function: &Function) -> Option<Kind> {
    if function.vendor != VENDOR {
        return None;
    }
    match function.device {
        0x1000 | 0x1041 => Some(Kind::Net),
        0x1001 | 0x1042 => Some(Kind::Block),
        0x107f => Some(Kind::Counter),
        0x1002 | 0x1045 => Some(Kind::Balloon),
        _ => None,
    }
}

/// One device, while its driver sets it up.
pub struct Transport {
    common: u64,
    notify: u64,
    notify_multiplier: u32,
    config: u64,
    msix: Option<MsixTable>,
    features: u64,
    setup: Setup,
}

impl Transport {
    /// Finds the device's structures, resets it, and agrees on `wanted` features.
    pub fn start(function: &Function, window: &mut Window<'_>, wanted: u64, setup: Setup) -> Self {
        let mut device = Self::locate(function, window, setup);
        function.enable();
        device.reset();
        device.set_status(status::ACKNOWLEDGE | status::DRIVER);
        device.negotiate(wanted);
        device
    }

    fn locate(function: &Function, window: &mut Window<'_>, setup: Setup) -> Self {
        let mut bars = [None; 6];
        let mut bar = |index: u8| {
            let slot = bars
                .get_mut(usize::from(index))
                .unwrap_or_else(|| fail("virtio-bar", index.into(), 0, Text::new("")));
            *slot.get_or_insert_with(|| function.bar(index, window))
        };
        let mut device = Self {
            common: 0,
            notify: 0,
            notify_multiplier: 0,
            config: 0,
            msix: None,
            features: 0,
            setup,
        };
        for (id, at) in function.capabilities() {
            match id {
                CAP_VENDOR => {
                    // struct virtio_pci_cap; the first of each type counts (section 4.1.4.1)
                    let place = match function.read8(at + 3) {
                        1 if device.common == 0 => &mut device.common,
                        2 if device.notify == 0 => {
                            device.notify_multiplier = function.read32(at + 16);
                            &mut device.notify
                        }
                        4 if device.config == 0 => &mut device.config,
                        _ => continue,
                    };
                    *place = bar(function.read8(at + 4)) + u64::from(function.read32(at + 8));
                }
                MsixTable::CAPABILITY if setup.msix => {
                    device.msix = Some(MsixTable::enable(function, at, &mut bar));
                }
                _ => {}
            }
        }
        if device.common == 0 || device.notify == 0 {
            fail(
                "not-a-modern-virtio-device",
                function.device.into(),
                0,
                Text::new(""),
            );
        }
        device
    }

    fn reset(&self) {
        self.set_status(0);
        let deadline = clock::Deadline::after_us(RESET_TIMEOUT_US);
        while self.status() != 0 {
            if deadline.passed() {
                fail("virtio-reset", self.status().into(), 0, Text::new(""));
            }
        }
    }

    fn negotiate(&mut self, wanted: u64) {
        let mut offered = 0;
        for half in 0..2u32 {
            mmio::write(self.common + common::DEVICE_FEATURE_SELECT, half);
            offered |=
                u64::from(mmio::read::<u32>(self.common + common::DEVICE_FEATURE)) << (32 * half);
        }
        let event_idx = if self.setup.event_idx {
            feature::EVENT_IDX
        } else {
            0
        };
        self.features =
            offered & (wanted | feature::VERSION_1 | feature::ACCESS_PLATFORM | event_idx);
        if self.features & feature::VERSION_1 == 0 {
            fail("virtio-version-1", offered, 0, Text::new(""));
        }
        for half in 0..2u32 {
            mmio::write(self.common + common::DRIVER_FEATURE_SELECT, half);
            mmio::write(
                self.common + common::DRIVER_FEATURE,
                (self.features >> (32 * half)) as u32,
            );
        }
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        if self.status() & status::FEATURES_OK == 0 {
            fail("virtio-features", offered, self.features, Text::new(""));
        }
        mmio::write(self.common + common::CONFIG_VECTOR, NO_VECTOR);
    }

    /// Whether all of these features were accepted.
    pub fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// Virtqueues that the device has.
    pub fn queue_count(&self) -> u16 {
        mmio::read(self.common + common::NUM_QUEUES)
    }

    /// A field of the device's own configuration; multi-field values are stable in these devices.
    pub fn config<T: mmio::Word>(&self, offset: u64) -> T {
        if self.config == 0 {
            fail("virtio-no-config", offset, 0, Text::new(""));
        }
        mmio::read(self.config + offset)
    }

    /// Writes a field of the device's own configuration.
    pub fn set_config<T: mmio::Word>(&self, offset: u64, value: T) {
        mmio::write(self.config + offset, value);
    }

    /// Makes and enables one virtqueue, whose interrupts go to `vector` at `target`.
    pub fn queue(&self, index: u16, vector: Vector, target: ApicId) -> Queue {
        mmio::write(self.common + common::QUEUE_SELECT, index);
        let offered = mmio::read::<u16>(self.common + common::QUEUE_SIZE);
        if offered == 0 {
            fail("virtio-queue-missing", index.into(), 0, Text::new(""));
        }
        let size = offered.min(self.setup.ring);
        mmio::write(self.common + common::QUEUE_SIZE, size);
        let entry = self
            .msix
            .as_ref()
            .map(|table| table.connect(index, vector, target));
        mmio::write(
            self.common + common::QUEUE_VECTOR,
            entry.unwrap_or(NO_VECTOR),
        );
        if let Some(entry) = entry
            && mmio::read::<u16>(self.common + common::QUEUE_VECTOR) != entry
        {
            fail(
                "virtio-queue-vector",
                index.into(),
                entry.into(),
                Text::new(""),
            );
        }
        let offset = mmio::read::<u16>(self.common + common::QUEUE_NOTIFY_OFF);
        let notify = self.notify + u64::from(offset) * u64::from(self.notify_multiplier);
        let queue = Queue::new(
            index,
            size,
            notify,
            self.has(feature::EVENT_IDX),
            self.setup.interrupts,
        );
        let [descriptors, driver, device] = queue.parts();
        self.write64(common::QUEUE_DESC, descriptors);
        self.write64(common::QUEUE_DRIVER, driver);
        self.write64(common::QUEUE_DEVICE, device);
        mmio::write(self.common + common::QUEUE_ENABLE, 1u16);
        queue
    }

    /// The device may run from here on.
    pub fn driver_ok(&self) {
        self.set_status(
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK,
        );
    }

    fn status(&self) -> u8 {
        mmio::read(self.common + common::STATUS)
    }

    fn set_status(&self, status: u8) {
        mmio::write(self.common + common::STATUS, status);
    }

    /// 64-bit fields are written in halves (section 4.1.3.1).
    fn write64(&self, field: u64, value: u64) {
        mmio::write(self.common + field, value as u32);
        mmio::write(self.common + field + 4, (value >> 32) as u32);
    }
}
