//! The other CPUs: started by INIT and SIPI, each waits at CPL3 for what it is to run.

use crate::acpi::Tables;
use crate::apic::ApicId;
use crate::console::fail;
use crate::cpu::MAX_CPUS;
use crate::protocol::Text;
use crate::{apic, clock, cpu, mmio, work};
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Where entry.s expects its copy of the trampoline.
const TRAMPOLINE: u64 = 0x8000;
const RESEND_US: u64 = 100_000;
const GIVE_UP_US: u64 = 10_000_000;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

static STARTED: AtomicUsize = AtomicUsize::new(1);
static APIC_IDS: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(0) }; MAX_CPUS];

/// Starts all CPUs that the tables name, or the first `limit` (0: all). Returns how many run.
pub fn start(tables: &Tables, limit: u32) -> usize {
    let own = apic::id();
    APIC_IDS[0].store(own.0, Ordering::Relaxed);
    let limit = if limit == 0 {
        MAX_CPUS
    } else {
        (limit as usize).min(MAX_CPUS)
    };
    let others = tables
        .apic_ids()
        .into_iter()
        .map(ApicId)
        .filter(|&id| id != own)
        .take(limit - 1);
    let others: alloc::vec::Vec<_> = others.collect();
    if others.is_empty() {
        return 1;
    }
    let code = &raw const trampoline as u64;
    for offset in 0..&raw const trampoline_end as u64 - code {
        mmio::write(TRAMPOLINE + offset, mmio::read::<u8>(code + offset));
    }
    for &id in &others {
        apic::send_init(id);
    }
    for &id in &others {
        apic::send_startup(id, (TRAMPOLINE >> 12) as u8);
    }
    wait_for(&others);
    STARTED.load(Ordering::Acquire)
}

fn wait_for(others: &[ApicId]) {
    let give_up = clock::Deadline::after_us(GIVE_UP_US);
    let mut resend = clock::Deadline::after_us(RESEND_US);
    while STARTED.load(Ordering::Acquire) < others.len() + 1 {
        if give_up.passed() {
            fail(
                "cpus-missing",
                others.len() as u64 + 1,
                STARTED.load(Ordering::Acquire) as u64,
                Text::new(""),
            );
        }
        if resend.passed() {
            // A CPU that runs already ignores this.
            for &id in others {
                apic::send_startup(id, (TRAMPOLINE >> 12) as u8);
            }
            resend = clock::Deadline::after_us(RESEND_US);
        }
        core::hint::spin_loop();
    }
}

/// The APIC of a CPU that runs.
pub fn apic_id(cpu: usize) -> ApicId {
    ApicId(APIC_IDS[cpu].load(Ordering::Relaxed))
}

/// The Rust code of every CPU but the first.
pub fn application_processor() -> ! {
    apic::enable();
    APIC_IDS[cpu::index()].store(apic::id().0, Ordering::Relaxed);
    STARTED.fetch_add(1, Ordering::AcqRel);
    work::run_on_this_cpu()
}
