//! What a guest sees of its processor when the definition names a level of the x86-64 psABI: all of
//! that level, nothing of the next ones, and the same after it has moved.

use anyhow::{Context as _, Result, ensure};
use test_framework::machine::DEADLINE;
use test_guest::{Report, command};
use test_migration::{Side, Spec, at_work, beat_on, busy, finish};

/// A guest's view: ECX and EDX of leaf 1, EBX of leaf 7, ECX of leaf 0x8000_0001.
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
                ..
            } => Some([one_ecx, one_edx, seven_ebx, extended_ecx]),
            _ => None,
        },
    );
    Ok(found
        .with_context(|| format!("the core said: {}", side.core().stderr()))?
        .1)
}

/// Whether all of this is shown, and whether none of it is.
fn shows(view: &View, added: &View) -> (bool, bool) {
    let both = || view.iter().zip(added);
    (
        both().all(|(has, wants)| has & wants == *wants),
        both().all(|(has, wants)| has & wants == 0),
    )
}

#[test]
fn a_guest_sees_its_level_and_no_more_also_when_it_has_moved() -> Result<()> {
    let host = view(&mut at_work(&Spec::of(busy()))?)?;
    let there = ADDED.iter().take_while(|(_, added)| shows(&host, added).0);
    let there = there.count();
    ensure!(there >= 2, "this host shows nothing that v1 hides");
    for (number, (level, _)) in ADDED.iter().enumerate().take(there) {
        let mut spec = Spec::of(busy());
        spec.cpu = level;
        let mut side = at_work(&spec)?;
        let seen = view(&mut side)?;
        for (other, (name, added)) in ADDED.iter().enumerate() {
            let (all, none) = shows(&seen, added);
            let as_wanted = if other <= number { all } else { none };
            ensure!(as_wanted, "{level}: {name} in {seen:x?}");
        }
        side = side.move_on(&spec)?.side;
        beat_on(&mut side)?;
        ensure!(view(&mut side)? == seen, "{level}: another after the move");
        ensure!(finish(side)?.pages == 8 << 8);
    }
    Ok(())
}
