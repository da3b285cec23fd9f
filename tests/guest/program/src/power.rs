//! Off, reset, and what is left when neither works.

use crate::acpi::{Power, Register, Tables};
use crate::sync::SpinLock;
use crate::{clock, cpu, mmio, port};

static CONTROL: SpinLock<(Power, u16)> = SpinLock::new((
    Power {
        pm1a_control: None,
        sleep_control: None,
        reset: None,
    },
    0,
));
/// How long the machine may take to go away before the next way is tried.
const PATIENCE_US: u64 = 200_000;

/// Remembers how to power off: `sleep_type` is what `\_S5` names.
pub fn init(tables: &Tables, sleep_type: u16) {
    *CONTROL.lock() = (tables.power(), sleep_type);
}

/// Powers off by ACPI S5; resets where there is no such thing.
pub fn off() -> ! {
    let (power, sleep_type) = *CONTROL.lock();
    if let Some(register) = power.pm1a_control {
        write(register, 2, u32::from(sleep_type) << 10 | 1 << 13);
        wait();
    }
    if let Some(register) = power.sleep_control {
        write(register, 1, u32::from(sleep_type) << 2 | 1 << 5);
        wait();
    }
    reset()
}

/// Resets by ACPI's register, the chipset's port, the keyboard controller, or a triple fault.
pub fn reset() -> ! {
    let (power, _) = *CONTROL.lock();
    if let Some((register, value)) = power.reset {
        write(register, 1, value.into());
        wait();
    }
    port::write8(0xcf9, 0x06);
    wait();
    port::write8(0x64, 0xfe);
    wait();
    cpu::triple_fault()
}

fn write(register: Register, bytes: u8, value: u32) {
    match (register, bytes) {
        (Register::Port(port), 2) => port::write16(port, value as u16),
        (Register::Port(port), _) => port::write8(port, value as u8),
        (Register::Memory(address), 2) => mmio::write(address, value as u16),
        (Register::Memory(address), _) => mmio::write(address, value as u8),
    }
}

fn wait() {
    let deadline = clock::Deadline::after_us(PATIENCE_US);
    while !deadline.passed() {
        core::hint::spin_loop();
    }
}
