//! What a guest sees of its processor when the definition names a level of the x86-64 psABI: all of
//! that level, nothing of the next ones, and the same after it has moved.
//!
//! A KVM may not be able to hide what it does not know, as one without support of the hardware;
//! so this is about the features that it says to support.

use anyhow::{Context as _, Result, ensure};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use test_framework::machine::DEADLINE;
use test_guest::{Report, command};
use test_migration::{Side, Spec, beat_on, busy, finish};

/// ECX and EDX of leaf 1, EBX of leaf 7, ECX of leaf 0x8000_0001.
type View = [u32; 4];

/// What each level adds: CMPXCHG8B, CMOV, FXSR, SSE, SSE2; CMPXCHG16B, LAHF, POPCNT, SSE3 to SSE4.2;
/// AVX, AVX2, BMI1, BMI2, F16C, FMA, LZCNT, MOVBE, XSAVE; AVX512F, BW, CD, DQ, VL.
const ADDED: [(&str, View); 4] = [
    ("x86-64-v1", [0, bits(&[8, 15, 24, 25, 26]), 0, 0]),
    (
        "x86-64-v2",
        [bits(&[0, 9, 13, 19, 20, 23]), 0, 0, bits(&[0])],
    ),
    (
        "x86-64-v3",
        [bits(&[12, 22, 26, 28, 29]), 0, bits(&[3, 5, 8]), bits(&[5])],
    ),
    ("x86-64-v4", [0, 0, bits(&[16, 17, 28, 30, 31]), 0]),
];

const fn bits(set: &[u32]) -> u32 {
    let (mut all, mut at) = (0, 0);
    while at < set.len() {
        all |= 1 << set[at];
        at += 1;
    }
    all
}

fn both(a: &View, b: &View) -> View {
    std::array::from_fn(|at| a[at] & b[at])
}

/// What this KVM says that a guest may see.
fn supported() -> Result<View> {
    let cpuid = Kvm::new()?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let leaf = |function| {
        let mut entries = cpuid.as_slice().iter();
        let found = entries.find(|entry| (entry.function, entry.index) == (function, 0));
        found.copied().unwrap_or_default()
    };
    let (one, seven, extended) = (leaf(1), leaf(7), leaf(0x8000_0001));
    Ok([one.ecx, one.edx, seven.ebx, extended.ecx])
}

/// What the guest sees, whose CPL0 asks: above it the hardware itself may answer.
fn view(side: &mut Side) -> Result<View> {
    side.console.send(command::CPUID)?;
    let found = side.console.report(
        "what the processor shows",
        DEADLINE,
        |report| match *report {
            Report::Cpuid {
                one_ecx,
                one_edx,
                seven_ebx,
                extended_ecx,
            } => Some([one_ecx, one_edx, seven_ebx, extended_ecx]),
            _ => None,
        },
    );
    Ok(found
        .with_context(|| format!("the core said: {}", side.core().stderr()))?
        .1)
}

#[test]
fn a_guest_sees_its_level_and_no_more_also_when_it_has_moved() -> Result<()> {
    let supported = supported()?;
    let there = ADDED
        .iter()
        .take_while(|(_, added)| both(added, &supported) == *added)
        .count();
    let mut hidden = 0;
    for (number, (level, _)) in ADDED.iter().enumerate().take(there) {
        let mut spec = Spec::of(busy());
        spec.cpu = level;
        let mut side = Side::boot(&spec)?;
        let seen = view(&mut side)?;
        for (other, (name, added)) in ADDED.iter().enumerate() {
            let known = both(added, &supported);
            let shown = both(&known, &seen);
            let wanted = if other <= number {
                known
            } else {
                View::default()
            };
            ensure!(shown == wanted, "{level}: {name} in {seen:x?}");
            hidden += known.iter().map(|bits| bits.count_ones()).sum::<u32>()
                - shown.iter().map(|bits| bits.count_ones()).sum::<u32>();
        }
        side = side.move_on(&spec)?.side;
        beat_on(&mut side)?;
        ensure!(view(&mut side)? == seen, "{level}: another after the move");
        finish(side)?;
    }
    ensure!(hidden > 0, "there was nothing to hide in {supported:x?}");
    Ok(())
}
