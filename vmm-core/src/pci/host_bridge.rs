//! The host bridge at 00:00.0: registers that say that there is a bus, and nothing else.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::saved_state::HostBridgeState;
use super::{ConfigError, Header, Identity, PciFunction};

/// A generic host bridge; guests bind no driver to it.
const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x0d57,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// The function at 00:00.0.
pub struct HostBridge {
    header: Mutex<Header>,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self {
            header: Mutex::new(Header::new(&IDENTITY)),
        }
    }
}

impl HostBridge {
    fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest has written.
    pub fn save(&self) -> HostBridgeState {
        HostBridgeState {
            registers: self.header().config().save(),
        }
    }

    /// Takes saved registers over.
    pub fn restore(&self, state: &HostBridgeState) -> Result<(), ConfigError> {
        self.header().config_mut().restore(&state.registers)
    }

    /// As after power-on.
    pub fn reset(&self) {
        self.header().reset();
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.header().config().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.header().config_mut().write(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_wrote_survives() {
        let bridge = HostBridge::default();
        bridge.write_config(0x3c, &[11]);
        let saved = bridge.save();
        bridge.reset();
        let mut line = [9];
        bridge.read_config(0x3c, &mut line);
        assert_eq!(line, [0]);
        bridge.restore(&saved).unwrap();
        bridge.read_config(0x3c, &mut line);
        assert_eq!(line, [11]);
    }
}
