//! Time, by the time-stamp counter, and the largest gap that CPU 0 sees in it.
//!
//! The gap is how a stopped machine looks from inside. Whatever CPU 0 does in a loop calls
//! [`observe`] often, even between two characters of a console line, so the guest's own work adds
//! at most one VM exit to a gap.

use crate::protocol::Text;
use crate::{console, cpu, mmio};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

static START: AtomicU64 = AtomicU64::new(0);
static KHZ: AtomicU64 = AtomicU64::new(0);
static LAST: AtomicU64 = AtomicU64::new(0);
static GAP: AtomicU64 = AtomicU64::new(0);
static MAX_GAP: AtomicU64 = AtomicU64::new(0);
static WENT_BACK: AtomicU64 = AtomicU64::new(0);

/// Ticks of the time-stamp counter.
pub fn now() -> u64 {
    // SAFETY: RDTSC has no effect on memory, and CR4.TSD is off.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Remembers when the guest started.
pub fn start() {
    let now = now();
    START.store(now, Relaxed);
    LAST.store(now, Relaxed);
}

pub fn khz() -> u64 {
    KHZ.load(Relaxed)
}

pub fn us(ticks: u64) -> u64 {
    let khz = khz().max(1);
    (u128::from(ticks) * 1000 / u128::from(khz)) as u64
}

/// Ticks of `us` microseconds.
pub fn ticks(us: u64) -> u64 {
    us.saturating_mul(khz()) / 1000
}

/// Nothing before [`set_frequency`] has been called, so that a failure then needs no clock.
pub fn since_start_us() -> u64 {
    us(now().saturating_sub(START.load(Relaxed)))
}

/// A point in time to give up at.
#[derive(Clone, Copy)]
pub struct Deadline(u64);

impl Deadline {
    pub fn after_us(us: u64) -> Self {
        Self(now().saturating_add(ticks(us)))
    }

    pub fn passed(self) -> bool {
        now() >= self.0
    }
}

/// Looks at the clock on CPU 0's behalf and returns it.
pub fn observe() -> u64 {
    let now = now();
    if cpu::index() == 0 {
        note_gap(LAST.load(Relaxed), now);
        LAST.store(now, Relaxed);
    }
    now
}

/// As [`observe`], after CPU 0 had meant to sleep until `deadline`: only what is later counts.
pub fn observe_wake(deadline: u64) -> u64 {
    let now = now();
    if cpu::index() == 0 {
        let last = LAST.load(Relaxed);
        note_gap(
            if now < last {
                last
            } else {
                deadline.clamp(last, now.max(last))
            },
            now,
        );
        LAST.store(now, Relaxed);
    }
    now
}

fn note_gap(last: u64, now: u64) {
    if now < last {
        WENT_BACK.fetch_add(1, Relaxed);
    } else if now - last > GAP.load(Relaxed) {
        GAP.store(now - last, Relaxed);
        MAX_GAP.fetch_max(now - last, Relaxed);
    }
}

/// Forgets all gaps: those of the start, when devices are set up, say nothing of the machine.
pub fn forget_gaps() {
    observe();
    GAP.store(0, Relaxed);
    MAX_GAP.store(0, Relaxed);
}

/// The largest gap since the last call, the largest of all, and how often the clock went back.
pub fn take_gap() -> (u64, u64, u64) {
    (
        GAP.swap(0, Relaxed),
        MAX_GAP.load(Relaxed),
        WENT_BACK.load(Relaxed),
    )
}

/// The largest gap of all, in ticks.
pub fn max_gap() -> u64 {
    MAX_GAP.load(Relaxed)
}

/// Settles the counter's frequency: as given, or as the hypervisor says.
pub fn set_frequency(given_khz: u64) {
    let khz = if given_khz != 0 {
        given_khz
    } else {
        from_kvm_clock()
            .or_else(from_hypervisor_leaf)
            .or_else(from_cpuid)
            .unwrap_or_else(|| console::fail("no-tsc-frequency", 0, 0, Text::new("give-tsc_khz")))
    };
    KHZ.store(khz, Relaxed);
}

const KVM_SIGNATURE: [u32; 3] = [
    u32::from_le_bytes(*b"KVMK"),
    u32::from_le_bytes(*b"VMKV"),
    u32::from_le_bytes(*b"M\0\0\0"),
];

fn kvm_leaf(offset: u32) -> Option<[u32; 4]> {
    let [last, signature @ ..] = cpu::cpuid(0x4000_0000, 0);
    (signature == KVM_SIGNATURE && last >= 0x4000_0000 + offset)
        .then(|| cpu::cpuid(0x4000_0000 + offset, 0))
}

#[repr(C, align(64))]
struct KvmClock([AtomicU64; 4]);
static KVM_CLOCK: KvmClock = KvmClock([const { AtomicU64::new(0) }; 4]);

/// KVM's paravirtual clock holds the factor from ticks to nanoseconds. It is switched off again at
/// once, so that no page of the guest is written behind its back.
fn from_kvm_clock() -> Option<u64> {
    const CLOCKSOURCE2: u32 = 1 << 3;
    const MSR_KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
    if kvm_leaf(1)?[0] & CLOCKSOURCE2 == 0 {
        return None;
    }
    let page = &raw const KVM_CLOCK as u64;
    cpu::write_msr(MSR_KVM_SYSTEM_TIME, page | 1);
    // struct pvclock_vcpu_time_info: version, pad, tsc, ns, multiplier (u32), shift (i8)
    let mut multiplier = 0;
    for _ in 0..1000 {
        multiplier = mmio::read::<u32>(page + 24);
        if multiplier != 0 {
            break;
        }
    }
    let shift = i32::from(mmio::read::<u8>(page + 28) as i8);
    cpu::write_msr(MSR_KVM_SYSTEM_TIME, 0);
    if multiplier == 0 || !(-31..=31).contains(&shift) {
        return None;
    }
    let khz = (1_000_000u128 << 64 >> 32) / u128::from(multiplier);
    Some(if shift < 0 {
        khz << -shift
    } else {
        khz >> shift
    } as u64)
}

fn from_hypervisor_leaf() -> Option<u64> {
    kvm_leaf(0x10)
        .map(|[khz, ..]| khz.into())
        .filter(|&khz| khz != 0)
}

fn from_cpuid() -> Option<u64> {
    if cpu::cpuid(0, 0)[0] < 0x15 {
        return None;
    }
    let [denominator, numerator, crystal_hz, _] = cpu::cpuid(0x15, 0).map(u64::from);
    (denominator != 0 && numerator != 0 && crystal_hz != 0)
        .then(|| crystal_hz * numerator / denominator / 1000)
}
