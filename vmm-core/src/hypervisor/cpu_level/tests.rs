use std::path::Path;

use super::*;
use crate::hypervisor::{Vcpu, Vm, guest_cpuid, open_kvm};

/// A processor that has everything.
fn everything() -> CpuId {
    let leaf = |function, index| kvm_cpuid_entry2 {
        function,
        index,
        eax: !0,
        ebx: !0,
        ecx: !0,
        edx: !0,
        ..Default::default()
    };
    let state = |index, offset, bytes| kvm_cpuid_entry2 {
        eax: bytes,
        ebx: offset,
        ..leaf(0xd, index)
    };
    let plain = [
        (0, 0),
        (1, 0),
        (4, 0),
        (6, 0),
        (7, 0),
        (7, 1),
        (0xa, 0),
        (0xb, 0),
        (0xd, 0),
        (0xd, 1),
        (0x14, 0),
        (0x1f, 0),
        (0x4000_0000, 0),
        (0x4000_0001, 0),
        (0x8000_0000, 0),
        (0x8000_0001, 0),
        (0x8000_0007, 0),
        (0x8000_0008, 0),
        (0x8000_000a, 0),
    ];
    let mut all: Vec<_> = plain.into_iter().map(|(f, i)| leaf(f, i)).collect();
    // AVX, the three of AVX-512, PKRU, and the tiles of AMX.
    all.extend([
        state(2, 576, 256),
        state(5, 1088, 64),
        state(6, 1152, 512),
        state(7, 1664, 1024),
        state(9, 2688, 8),
        state(18, 2816, 8192),
    ]);
    CpuId::from_entries(&all).unwrap()
}

fn find(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
    let mut entries = cpuid.as_slice().iter();
    entries
        .find(|entry| (entry.function, entry.index) == (function, index))
        .copied()
}

fn at(level: CpuLevel) -> CpuId {
    let mut cpuid = everything();
    level.apply(&mut cpuid).unwrap();
    cpuid
}

#[test]
fn a_level_shows_its_instructions_and_not_those_of_the_next() {
    // SSE4.2, AVX and AVX512F.
    for (level, has) in [
        (CpuLevel::V1, [false, false, false]),
        (CpuLevel::V2, [true, false, false]),
        (CpuLevel::V3, [true, true, false]),
        (CpuLevel::V4, [true, true, true]),
        (CpuLevel::Host, [true, true, true]),
    ] {
        let cpuid = at(level);
        let (first, seventh) = (find(&cpuid, 1, 0).unwrap(), find(&cpuid, 7, 0).unwrap());
        let shown = [
            first.ecx >> 20 & 1 == 1,
            first.ecx >> 28 & 1 == 1,
            seventh.ebx >> 16 & 1 == 1,
        ];
        assert_eq!(shown, has, "{level}");
    }
}

#[test]
fn the_state_that_can_be_saved_is_that_of_the_level() {
    assert_eq!(find(&at(CpuLevel::V2), 0xd, 0), None);
    for (level, states, size, parts) in [
        (CpuLevel::V3, 0b111, 832, vec![2]),
        (CpuLevel::V4, 0b1110_0111, 2688, vec![2, 5, 6, 7]),
    ] {
        let cpuid = at(level);
        let leaf = find(&cpuid, 0xd, 0).unwrap();
        assert_eq!((leaf.eax, leaf.ecx, leaf.edx), (states, size, 0), "{level}");
        let shown = cpuid.as_slice().iter();
        let shown = shown.filter(|entry| entry.function == 0xd && entry.index >= 2);
        assert_eq!(shown.map(|entry| entry.index).collect::<Vec<_>>(), parts);
    }
}

#[test]
fn nothing_of_the_host_shows_that_another_may_not_have() {
    let cpuid = at(CpuLevel::V4);
    for (function, index) in [(7, 1), (0xa, 0), (0x14, 0), (0x1f, 0), (0x8000_000a, 0)] {
        assert_eq!(find(&cpuid, function, index), None, "{function:#x}.{index}");
    }
    assert_eq!(find(&cpuid, 0, 0).unwrap().eax, 0xd);
    let seventh = find(&cpuid, 7, 0).unwrap();
    assert_eq!(seventh.edx >> 29 & 1, 0, "ARCH_CAPABILITIES");
    assert_eq!(seventh.edx >> 24 & 1, 0, "AMX");
    assert_eq!(find(&cpuid, 1, 0).unwrap().ecx >> 5 & 1, 0, "VMX");
    let addresses = find(&cpuid, 0x8000_0008, 0).unwrap().eax;
    assert_eq!((addresses & 0xff, addresses >> 8), (42, 48));
    assert!(find(&cpuid, 0x4000_0001, 0).is_some(), "KVM's own");
}

#[test]
fn what_a_level_needs_and_the_host_lacks_is_named() {
    let mut cpuid = everything();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ecx &= !(1 << 22),
            7 => entry.ebx &= !(1 << 17),
            _ => {}
        }
    }
    let said = |level: CpuLevel| level.apply(&mut cpuid.clone()).map_err(|e| e.to_string());
    assert_eq!(said(CpuLevel::V2), Ok(()));
    assert_eq!(said(CpuLevel::Host), Ok(()));
    let v3 =
        "this host's processor, or its KVM, lacks MOVBE, which x86-64-v3 has: give a lower cpu";
    assert_eq!(said(CpuLevel::V3), Err(v3.into()));
    assert!(said(CpuLevel::V4).unwrap_err().contains("MOVBE, AVX512DQ,"));
}

#[test]
fn names_are_read_and_written() {
    for (name, level) in NAMES {
        assert_eq!(name.parse(), Ok(level));
        assert_eq!(level.to_string(), name);
    }
    assert!("x86-64-v5".parse::<CpuLevel>().is_err());
}

#[test]
fn this_kvm_takes_a_level() {
    let kvm = open_kvm(Path::new("/dev/kvm"), None).unwrap();
    let vm = Vm::new(&kvm).unwrap();
    let msrs = Vm::msrs(&kvm).unwrap();
    let host = guest_cpuid(&kvm, CpuLevel::Host, 0, 2).unwrap();
    let cpuid = guest_cpuid(&kvm, CpuLevel::V1, 0, 2).unwrap();
    let (shown, first) = (find(&cpuid, 1, 0).unwrap(), find(&host, 1, 0).unwrap());
    assert_eq!((shown.edx & !first.edx, shown.ecx & !first.ecx), (0, 0));
    assert!(cpuid.as_slice().len() < host.as_slice().len());
    let vcpu = Vcpu::new(&kvm, &vm, 0, &cpuid, &msrs).unwrap();
    vcpu.restore(&vcpu.save().unwrap()).unwrap();
}
