//! What device threads may change without the transport's lock.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

use vmm_sys_util::eventfd::EventFd;

use super::{DeviceNotifier, TroubleSink};

/// The part of the registers that a device may change at any time. A vCPU may hold the
/// transport's lock while it waits for the same device, so none is taken here.
pub(super) struct Notifier {
    name: String,
    sink: Arc<dyn TroubleSink>,
    /// The configuration change's interrupt source.
    event: Arc<EventFd>,
    /// Locked while the configuration changes, so that nobody reads new bytes and then
    /// the old generation.
    generation: RwLock<u8>,
    config_changed: AtomicBool,
    needs_reset: AtomicBool,
    driver_ok: AtomicBool,
}

impl Notifier {
    pub(super) fn new(name: String, sink: Arc<dyn TroubleSink>, event: Arc<EventFd>) -> Self {
        Self {
            name,
            sink,
            event,
            generation: RwLock::new(0),
            config_changed: AtomicBool::new(false),
            needs_reset: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
        }
    }

    /// Config generation (virtio 1.3, 4.1.4.3).
    pub(super) fn generation(&self) -> u8 {
        *self
            .generation
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_generation(&self, value: u8) {
        *self.generation_mut() = value;
    }

    fn generation_mut(&self) -> RwLockWriteGuard<'_, u8> {
        self.generation
            .write()
            .unwrap_or_else(PoisonError::into_inner)
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

    /// Signals a configuration change.
    pub(super) fn interrupt(&self) {
        self.set_config_changed(true);
        if self.driver_ok.load(Ordering::Acquire) {
            // Fails only at 2^64 unheard signals, which one more would not change.
            let _ = self.event.write(1);
        }
    }
}

impl DeviceNotifier for Notifier {
    fn config_changed(&self, change: &mut dyn FnMut()) {
        let mut generation = self.generation_mut();
        change();
        *generation = generation.wrapping_add(1);
        drop(generation);
        self.interrupt();
    }

    fn trouble(&self, error: &(dyn Error + 'static)) {
        self.set_needs_reset(true);
        self.interrupt();
        self.report(error);
    }
}
