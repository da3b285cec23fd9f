//! The interrupt table, vectors, and the counters that the handlers in traps.s count up.

use crate::mmio;
use core::sync::atomic::{AtomicU32, Ordering};

unsafe extern "C" {
    static idt: u8;
    static service_gate: u8;
    static interrupt_stubs: u8;
    static exception_stubs: u8;
    static interrupt_counts: [AtomicU32; 256];
}

/// An interrupt vector.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Vector(pub u8);

/// The local APIC's timer.
pub const TIMER: Vector = Vector(0x20);
/// The local APIC's spurious vector.
pub const SPURIOUS: Vector = Vector(0xff);
const FIRST_QUEUE: u8 = 0x30;
const QUEUE_VECTORS: usize = 0xc0;

impl Vector {
    /// The vector of the n-th queue. Beyond 192 queues they share: the counters only say
    /// "look at your rings", so sharing costs a look.
    pub fn of_queue(n: usize) -> Self {
        Self(FIRST_QUEUE + (n % QUEUE_VECTORS) as u8)
    }
}

/// All interrupts that were taken, timers included.
pub fn total() -> u64 {
    let taken = |count: &AtomicU32| u64::from(count.load(Ordering::Relaxed));
    counts().iter().map(taken).sum()
}

/// Interrupts of one vector that were taken, modulo 2^32.
pub fn taken(vector: Vector) -> u32 {
    counts()[usize::from(vector.0)].load(Ordering::Relaxed)
}

fn counts() -> &'static [AtomicU32; 256] {
    // SAFETY: the array lives in traps.s for ever and is only ever accessed atomically.
    unsafe { &interrupt_counts }
}

/// Fills the table: exceptions, interrupts, and the service gate that CPL3 may call.
pub fn install() {
    const STUB: u64 = 16;
    let (exceptions, interrupts) = (
        &raw const exception_stubs as u64,
        &raw const interrupt_stubs as u64,
    );
    for vector in 0..32 {
        set_gate(vector, exceptions + STUB * vector, 0);
    }
    for vector in 32..256 {
        set_gate(vector, interrupts + STUB * (vector - 32), 0);
    }
    set_gate(3, &raw const service_gate as u64, 3);
}

fn set_gate(vector: u64, handler: u64, dpl: u64) {
    const KERNEL_CODE: u64 = 0x10;
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e00;
    let low = (handler & 0xffff)
        | KERNEL_CODE << 16
        | (PRESENT_INTERRUPT_GATE | dpl << 13) << 32
        | (handler >> 16 & 0xffff) << 48;
    let entry = &raw const idt as u64 + vector * 16;
    mmio::write(entry, low);
    mmio::write(entry + 8, handler >> 32);
}
