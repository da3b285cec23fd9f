//! What a PC has besides PCI: serial port, clock, power management, reset line; and what a firmware
//! asks about the machine.
//!
//! Each is a [`crate::bus::BusDevice`] of a range of ports in [`crate::layout`]. State
//! is behind a lock of the device's own; the interrupt line is moved with that lock held,
//! so that its level is always that of the registers, and requests to the machine are
//! made without it.
//!
//! `save`, `restore` and `reset` may be called only while no vCPU runs. `restore` checks
//! everything before it changes anything.

mod calendar;
mod cmos;
mod fw_cfg;
mod i8042;
mod power;
pub mod saved_state;
mod serial;
#[cfg(test)]
mod testing;

pub use cmos::{CENTURY_REGISTER, Cmos, RamSize, WallClock};
pub use fw_cfg::{Files, FwCfg};
pub use i8042::I8042;
pub use power::{PM1_CONTROL, PM1_CONTROL_LEN, PM1_EVENT_LEN, PowerManagement};
pub use saved_state::{
    ClockSetting, CmosSavedState, FwCfgSavedState, InvalidState, PLATFORM_SCHEMA, PowerSavedState,
    SerialSavedState,
};
pub use serial::{OutputBuffer, SerialInput, SerialPort, Taken};
