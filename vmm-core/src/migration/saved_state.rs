//! What the core saves: everything of the machine that is not memory and not in a device process.

use std::time::Duration;

use migration::schema::{Schema, SchemaError};
use migration::wire::Blob;
use serde::{Deserialize, Serialize};

use crate::hypervisor::{VcpuSavedState, VmSavedState};
use crate::pci::saved_state::{HostBridgeState, RootState};
use crate::platform::saved_state::{
    CmosSavedState, FwCfgSavedState, PowerSavedState, SerialSavedState,
};
use crate::transport::saved_state::VirtioPciState;

/// The core, schema 2.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoreState {
    /// Whether the machine ran.
    pub running: bool,
    /// Microseconds from the word that it stops to the reading of its clocks.
    #[serde(default)]
    pub clock_age_us: u64,
    /// Interrupt controllers and clock.
    pub vm: VmSavedState,
    /// vCPUs, by number.
    pub vcpus: Vec<VcpuSavedState>,
    /// First serial port.
    pub serial: SerialSavedState,
    /// Real-time clock.
    pub cmos: CmosSavedState,
    /// ACPI's fixed hardware.
    pub power: PowerSavedState,
    /// What a firmware asks; since schema 2, nothing where there is none.
    #[serde(default)]
    pub fw_cfg: Option<FwCfgSavedState>,
    /// PCI's root.
    pub root: RootState,
    /// PCI's host bridge.
    pub bridge: HostBridgeState,
    /// Devices, by their order.
    pub devices: Vec<DeviceWiring>,
}

impl CoreState {
    /// Lets the machine's clocks go on for the time since they were read, when the word that it
    /// stops came so long ago. That word and this state took as long to come, so that the two
    /// computers' clocks need not agree.
    pub fn catch_up(&mut self, since_stopping: Duration) {
        let age = Duration::from_micros(self.clock_age_us);
        let elapsed = since_stopping.saturating_sub(age);
        self.vm.catch_up(elapsed);
        for vcpu in &mut self.vcpus {
            vcpu.catch_up(elapsed);
        }
    }
}

/// How devices are wired while the machine still runs, schema 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WiringState {
    /// Devices, by their order.
    pub devices: Vec<DeviceWiring>,
}

/// A device as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceWiring {
    /// Its id.
    pub id: String,
    /// Configuration space, MSI-X, virtio's registers.
    pub state: VirtioPciState,
}

impl Schema for CoreState {
    const KIND: &'static str = "core";
    const NUMBER: u32 = 2;

    fn from_old(number: u32, payload: &[u8]) -> Result<Self, SchemaError> {
        match number {
            1 => Self::decode(Self::NUMBER, payload),
            _ => Err(SchemaError::unknown::<Self>(number)),
        }
    }
}

impl Schema for WiringState {
    const KIND: &'static str = "wiring";
    const NUMBER: u32 = 1;

    fn from_old(number: u32, _payload: &[u8]) -> Result<Self, SchemaError> {
        Err(SchemaError::unknown::<Self>(number))
    }
}

/// For the link.
pub fn to_blob<S: Schema>(state: &S) -> Result<Blob, SchemaError> {
    Ok(Blob {
        schema: S::NUMBER,
        payload: state.encode()?,
    })
}

/// From the link.
pub fn from_blob<S: Schema>(blob: &Blob) -> Result<S, SchemaError> {
    S::decode(blob.schema, &blob.payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_that_is_not_known_is_named() {
        let blob = Blob {
            schema: 7,
            payload: Vec::new(),
        };
        let error = from_blob::<CoreState>(&blob).unwrap_err().to_string();
        assert_eq!(
            error,
            "schema 7 of core is unknown here, the newest known is 2"
        );
    }

    #[test]
    fn cut_state_is_refused() {
        let whole = to_blob(&WiringState {
            devices: Vec::new(),
        })
        .unwrap();
        assert!(from_blob::<WiringState>(&whole).is_ok());
        for length in 0..whole.payload.len() {
            let cut = Blob {
                schema: 1,
                payload: whole.payload[..length].to_vec(),
            };
            assert!(from_blob::<WiringState>(&cut).is_err());
        }
    }
}
