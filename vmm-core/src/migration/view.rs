//! A running machine, as its migration sees it.

use std::sync::Arc;

use migration::wire::Definition;

use super::ram::CoreWrites;
use super::unit::Unit;
use crate::hypervisor::{MemorySlots, Throttle};
use crate::memory::Memory;
use crate::remote::device1::DeviceLinks;

/// The running machine, as far as the source's thread has to do with it.
pub struct View {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// KVM's dirty log.
    pub slots: Arc<MemorySlots>,
    /// Devices, in order.
    pub units: Vec<Arc<Unit>>,
    /// What the machine is.
    pub definition: Definition,
    /// What the core writes to guest memory meanwhile.
    pub core_writes: CoreWrites,
    /// Connections to the devices' processes.
    pub links: Arc<DeviceLinks>,
    /// Slows the guest down.
    pub throttle: Throttle,
}

impl View {
    /// Ends every log. One that does not end costs time and no more.
    pub fn stop_logs(&self) {
        if let Err(error) = self.slots.stop_log() {
            tracing::warn!(%error, "KVM's dirty log stays on");
        }
        for unit in &self.units {
            if let Err(error) = unit.remote.stop_log() {
                tracing::warn!(%error, "a dirty log stays on");
            }
        }
    }
}
