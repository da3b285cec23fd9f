//! The local APIC: x2APIC where there is one, else xAPIC at its usual address.

use crate::interrupts::{SPURIOUS, TIMER, Vector};
use crate::{cpu, mmio, port};
use core::sync::atomic::{AtomicBool, Ordering};

const MSR_APIC_BASE: u32 = 0x1b;
const APIC_ENABLE: u64 = 1 << 11;
const X2APIC_ENABLE: u64 = 1 << 10;
const XAPIC: u64 = 0xfee0_0000;

/// Registers, as offsets into the xAPIC page divided by 16 (x2APIC: MSR 0x800 + offset).
mod reg {
    pub const ID: u32 = 0x02;
    pub const TASK_PRIORITY: u32 = 0x08;
    pub const SPURIOUS: u32 = 0x0f;
    pub const COMMAND: u32 = 0x30;
    pub const COMMAND_HIGH: u32 = 0x31;
    pub const TIMER: u32 = 0x32;
    pub const LINT0: u32 = 0x35;
    pub const TIMER_COUNT: u32 = 0x38;
    pub const TIMER_DIVIDE: u32 = 0x3e;
}

unsafe extern "C" {
    /// Read by the interrupt handlers in traps.s.
    static x2apic_mode: AtomicBool;
}

fn mode() -> &'static AtomicBool {
    // SAFETY: the byte lives in traps.s for ever, is 0 or 1, and Rust accesses it atomically.
    unsafe { &x2apic_mode }
}

/// The id of a local APIC, as MSI messages and the MADT name it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ApicId(pub u32);

pub fn is_x2apic() -> bool {
    mode().load(Ordering::Relaxed)
}

/// Brings this CPU's APIC to life. The boot CPU's call settles the mode for all.
pub fn enable() {
    if cpu::index() == 0 {
        let [_, _, features, _] = cpu::cpuid(1, 0);
        mode().store(features & 1 << 21 != 0, Ordering::SeqCst);
        // Mask the 8259s: with LINT0 as ExtINT they would deliver vectors of their own.
        port::write8(0x21, 0xff);
        port::write8(0xa1, 0xff);
    }
    let enable = if is_x2apic() {
        APIC_ENABLE | X2APIC_ENABLE
    } else {
        APIC_ENABLE
    };
    let base = cpu::read_msr(MSR_APIC_BASE);
    if base & enable != enable {
        cpu::write_msr(MSR_APIC_BASE, base | APIC_ENABLE);
        cpu::write_msr(MSR_APIC_BASE, base | enable);
    }
    const SOFTWARE_ENABLE: u32 = 1 << 8;
    const MASKED: u32 = 1 << 16;
    const DIVIDE_BY_1: u32 = 0xb;
    write(reg::SPURIOUS, SOFTWARE_ENABLE | u32::from(SPURIOUS.0));
    write(reg::TASK_PRIORITY, 0);
    write(reg::LINT0, MASKED);
    write(reg::TIMER_DIVIDE, DIVIDE_BY_1);
    write(reg::TIMER, TIMER.0.into());
}

/// This CPU's id.
pub fn id() -> ApicId {
    let id = read(reg::ID);
    ApicId(if is_x2apic() { id } else { id >> 24 })
}

/// One timer interrupt after about `us` microseconds (KVM's timer counts nanoseconds).
pub fn timer_after_us(us: u64) {
    let count = us.saturating_mul(1000).clamp(1, u32::MAX.into());
    write(reg::TIMER_COUNT, count as u32);
}

/// Puts another CPU into its reset state.
pub fn send_init(to: ApicId) {
    const INIT_ASSERT: u32 = 0x4500;
    send(to, INIT_ASSERT);
}

/// Starts another CPU at `page` (a page number below 256).
pub fn send_startup(to: ApicId, page: u8) {
    const STARTUP_ASSERT: u32 = 0x4600;
    send(to, STARTUP_ASSERT | u32::from(page));
}

/// An ordinary interrupt for another CPU.
pub fn send_interrupt(to: ApicId, vector: Vector) {
    const FIXED_ASSERT: u32 = 0x4000;
    send(to, FIXED_ASSERT | u32::from(vector.0));
}

fn send(to: ApicId, command: u32) {
    if is_x2apic() {
        cpu::write_msr(
            0x800 + reg::COMMAND,
            u64::from(to.0) << 32 | u64::from(command),
        );
    } else {
        write(reg::COMMAND_HIGH, to.0 << 24);
        write(reg::COMMAND, command);
    }
}

fn read(register: u32) -> u32 {
    if is_x2apic() {
        cpu::read_msr(0x800 + register) as u32
    } else {
        mmio::read(XAPIC + u64::from(register) * 16)
    }
}

fn write(register: u32, value: u32) {
    if is_x2apic() {
        cpu::write_msr(0x800 + register, value.into());
    } else {
        mmio::write(XAPIC + u64::from(register) * 16, value);
    }
}
