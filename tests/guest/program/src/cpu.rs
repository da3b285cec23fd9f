//! Services of CPL0, and which CPU this is.
//!
//! Rust runs at CPL3 only. What needs CPL0 is asked for by `int3` (traps.s), at about a
//! microsecond an instruction where CPL0 is emulated. `int n` and SYSCALL do not work there.

use core::arch::asm;

/// CPUs that entry.s has stacks for.
pub const MAX_CPUS: usize = 32;
/// Bytes of one CPU's stacks; as in entry.s.
const STACK: usize = 0x8000;

unsafe extern "C" {
    static stacks: u8;
}

/// The numbers of the CPL0 services; the order is known to traps.s.
#[derive(Clone, Copy)]
enum Service {
    Halt = 0,
    ReadMsr = 1,
    WriteMsr = 2,
    Cpuid = 3,
    EnableInterrupts = 4,
    DisableInterrupts = 5,
    TripleFault = 6,
}

struct Answer {
    rax: u64,
    rbx: u64,
    rcx: u64,
    rdx: u64,
}

fn service(number: Service, first: u64, second: u64) -> Answer {
    let mut answer = Answer {
        rax: 0,
        rbx: 0,
        rcx: 0,
        rdx: 0,
    };
    // SAFETY: the gate changes these registers only. Of what an MSR can do, clock.rs alone makes
    // the hypervisor write to memory, and gives it a static of its own for that.
    unsafe {
        asm!("int3", inout("rax") number as u64 => answer.rax, inout("rdi") first => answer.rbx,
            inout("rsi") second => _, out("rcx") answer.rcx, out("rdx") answer.rdx)
    };
    answer
}

/// The number of this CPU, 0 for the boot CPU: told by the stack, which costs nothing.
pub fn index() -> usize {
    let rsp: usize;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) rsp, options(nomem, nostack, preserves_flags)) };
    (rsp - &raw const stacks as usize) / STACK
}

/// Halts until an interrupt has been taken. Call it with interrupts disabled.
pub fn halt() {
    service(Service::Halt, 0, 0);
}

pub fn read_msr(msr: u32) -> u64 {
    service(Service::ReadMsr, msr.into(), 0).rax
}

pub fn write_msr(msr: u32, value: u64) {
    service(Service::WriteMsr, msr.into(), value);
}

/// EAX, EBX, ECX, EDX as the hypervisor shows them.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let answer = service(Service::Cpuid, leaf.into(), subleaf.into());
    [answer.rax, answer.rbx, answer.rcx, answer.rdx].map(|register| register as u32)
}

pub fn enable_interrupts() {
    service(Service::EnableInterrupts, 0, 0);
}

pub fn disable_interrupts() {
    service(Service::DisableInterrupts, 0, 0);
}

pub fn triple_fault() -> ! {
    service(Service::TripleFault, 0, 0);
    stop()
}

/// Nothing more on this CPU.
pub fn stop() -> ! {
    disable_interrupts();
    loop {
        halt();
    }
}
