//! What device threads may change without the transport's lock.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::{DeviceNotifier, TroubleSink};

/// The part of the registers that a device may change at any time. A vCPU may hold the
/// transport's lock while it waits for the same device, so none is taken here.
pub(super) struct Notifier {
    name: String,
    sink: Arc<dyn TroubleSink>,
    /// The configuration change's interrupt source.
    event: EventFd,
    generation: AtomicU8,
    config_changed: AtomicBool,
    needs_reset: AtomicBool,
    driver_ok: AtomicBool,
}

impl Notifier {
    pub(super) fn new(name: String, sink: Arc<dyn TroubleSink>, event: EventFd) -> Self {
        Self {
            name,
            sink,
            event,
            generation: AtomicU8::new(0),
            config_changed: AtomicBool::new(false),
            needs_reset: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
        }
    }

    /// Config generation (virtio 1.3, 4.1.4.3).
    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn set_generation(&self, value: u8) {
        self.generation.store(value, Ordering::Release);
    }

    /// Whether a change waits to be read from the interrupt status register.
    pub(super) fn is_config_changed(&self) -> bool {
        self.config_changed.load(Ordering::Acquire)
    }

    pub(super) fn set_config_changed(&self, value: bool) {
        self.config_changed.store(value, Ordering::Release);
    }

    /// Reads and clears it.
    pub(super) fn take_config_changed(&self) -> bool {
        self.config_changed.swap(false, Ordering::AcqRel)
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn set_needs_reset(&self, value: bool) {
        self.needs_reset.store(value, Ordering::Release);
    }

    /// Interrupts are sent between DRIVER_OK and reset only (virtio 1.3, 2.1.2).
    pub(super) fn set_driver_ok(&self, value: bool) {
        self.driver_ok.store(value, Ordering::Release);
    }

    /// Tells the machine, and not the driver.
    pub(super) fn report(&self, error: &(dyn Error + 'static)) {
        self.sink.trouble(&self.name, error);
    }

    fn interrupt(&self) {
        self.set_config_changed(true);
        if self.driver_ok.load(Ordering::Acquire) {
            // Fails only at 2^64 unheard signals, which one more would not change.
            let _ = self.event.write(1);
        }
    }
}

impl DeviceNotifier for Notifier {
    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.interrupt();
    }

    fn trouble(&self, error: &(dyn Error + 'static)) {
        self.set_needs_reset(true);
        self.interrupt();
        self.report(error);
    }
}
