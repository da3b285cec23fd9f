//! What the platform's devices were doing, as it is sent to another process.
//!
//! Fields are only ever added, with `#[serde(default)]` and a default that means what the
//! program without the field did; [`PLATFORM_SCHEMA`] rises with each addition. A field
//! that this program does not know is an error. The types say nothing of what values
//! are legal: each device's `restore` does.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Number of the schema of the types here.
pub const PLATFORM_SCHEMA: u32 = 2;

/// Saved state that no device can have been in.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("saved state of the {device}: {field} is {value:#x}, {rule}")]
pub struct InvalidState {
    /// Name of the device.
    pub device: &'static str,
    /// Name of the field.
    pub field: &'static str,
    /// Its value, or its length.
    pub value: u64,
    /// What it would have to be.
    pub rule: &'static str,
}

/// Registers of the serial port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialSavedState {
    /// Divisor latch.
    pub divisor: u16,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Pending interrupts, as in the identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Received bytes that the guest has not read, oldest first; 64 at most.
    pub received: Vec<u8>,
}

/// Registers of the clock and its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CmosSavedState {
    /// Selected register, 0 to 127.
    pub index: u8,
    /// Seconds that the guest's clock is ahead of the host's.
    pub ahead: i64,
    /// Status register A without its update bit.
    pub status_a: u8,
    /// Status register B.
    pub status_b: u8,
    /// Second, minute and hour of the alarm.
    pub alarm: [u8; 3],
    /// Shutdown status.
    pub shutdown: u8,
    /// The time registers while the guest sets them.
    pub setting: Option<ClockSetting>,
}

/// The clock's registers while it is stopped to be set, in BCD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockSetting {
    /// Second, 0 to 59.
    pub second: u8,
    /// Minute, 0 to 59.
    pub minute: u8,
    /// Hour, 0 to 23.
    pub hour: u8,
    /// Day of the week, 1 (Sunday) to 7.
    pub weekday: u8,
    /// Day of the month, from 1.
    pub day: u8,
    /// Month, from 1.
    pub month: u8,
    /// Year within the century.
    pub year: u8,
    /// Century, 20 for the years from 2000.
    pub century: u8,
}

/// Registers of ACPI's fixed hardware.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerSavedState {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control.
    pub control: u16,
}

/// Registers of the firmware configuration device; there since schema 2. Any value is one that a
/// guest can have written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FwCfgSavedState {
    /// Selected item.
    pub key: u16,
    /// Next byte of it.
    pub offset: u32,
    /// Upper half of the address of the next DMA access.
    pub address_high: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn power() -> PowerSavedState {
        PowerSavedState {
            status: 0x100,
            enable: 0x120,
            control: 1,
        }
    }

    #[test]
    fn state_survives_its_encoding() {
        let bytes = rmp_serde::to_vec_named(&power()).unwrap();
        let back: PowerSavedState = rmp_serde::from_slice(&bytes).unwrap();
        assert_eq!(back, power());
    }

    #[test]
    fn a_field_that_is_not_known_is_named() {
        #[derive(Serialize)]
        struct Newer {
            status: u16,
            enable: u16,
            control: u16,
            timer: u16,
        }
        let bytes = rmp_serde::to_vec_named(&Newer {
            status: 0,
            enable: 0,
            control: 1,
            timer: 7,
        })
        .unwrap();
        let error = rmp_serde::from_slice::<PowerSavedState>(&bytes).unwrap_err();
        assert!(error.to_string().contains("`timer`"), "{error}");
    }

    #[test]
    fn truncated_state_is_an_error() {
        let bytes = rmp_serde::to_vec_named(&power()).unwrap();
        for len in 0..bytes.len() {
            assert!(rmp_serde::from_slice::<PowerSavedState>(&bytes[..len]).is_err());
        }
    }
}
