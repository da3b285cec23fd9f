//! What a vCPU shows when its machine shall fit more than one processor: a micro-architecture
//! level of the x86-64 psABI (chapter 3.1.1, table 3.1), and nothing of the host beyond it but what
//! a kernel needs to work and to protect itself.
//!
//! Vendor, model and caches stay the host's: kernels go by them, and machines do not move between
//! vendors.

use std::fmt;
use std::str::FromStr;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use thiserror::Error;

/// What vCPUs show of the host's processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuLevel {
    /// All that KVM lets a guest use.
    #[default]
    Host,
    /// x86-64-v1: what every such processor has, SSE2.
    V1,
    /// x86-64-v2: SSE4.2, and no vectors beyond 128 bits.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA.
    V3,
    /// x86-64-v4: AVX-512.
    V4,
}

/// A level that this host cannot give.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("this host's processor, or its KVM, lacks {missing}, which {level} has: give a lower cpu")]
pub struct LacksLevel {
    level: CpuLevel,
    missing: String,
}

const NAMES: [(&str, CpuLevel); 5] = [
    ("host", CpuLevel::Host),
    ("x86-64-v1", CpuLevel::V1),
    ("x86-64-v2", CpuLevel::V2),
    ("x86-64-v3", CpuLevel::V3),
    ("x86-64-v4", CpuLevel::V4),
];

/// Registers of CPUID.
#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

type Leaf = (u32, u32, Register);

/// What programs may use: level, register, bit, name.
const INSTRUCTIONS: [(CpuLevel, Leaf, u32, &str); 31] = [
    (CpuLevel::V1, (1, 0, Edx), 0, "FPU"),
    (CpuLevel::V1, (1, 0, Edx), 8, "CX8"),
    (CpuLevel::V1, (1, 0, Edx), 15, "CMOV"),
    (CpuLevel::V1, (1, 0, Edx), 23, "MMX"),
    (CpuLevel::V1, (1, 0, Edx), 24, "FXSR"),
    (CpuLevel::V1, (1, 0, Edx), 25, "SSE"),
    (CpuLevel::V1, (1, 0, Edx), 26, "SSE2"),
    (CpuLevel::V1, (0x8000_0001, 0, Edx), 11, "SYSCALL"),
    (CpuLevel::V1, (0x8000_0001, 0, Edx), 29, "LM"),
    (CpuLevel::V2, (0x8000_0001, 0, Ecx), 0, "LAHF"),
    (CpuLevel::V2, (1, 0, Ecx), 0, "SSE3"),
    (CpuLevel::V2, (1, 0, Ecx), 9, "SSSE3"),
    (CpuLevel::V2, (1, 0, Ecx), 13, "CX16"),
    (CpuLevel::V2, (1, 0, Ecx), 19, "SSE4.1"),
    (CpuLevel::V2, (1, 0, Ecx), 20, "SSE4.2"),
    (CpuLevel::V2, (1, 0, Ecx), 23, "POPCNT"),
    (CpuLevel::V3, (1, 0, Ecx), 12, "FMA"),
    (CpuLevel::V3, (1, 0, Ecx), 22, "MOVBE"),
    (CpuLevel::V3, (1, 0, Ecx), 26, "XSAVE"),
    (CpuLevel::V3, (1, 0, Ecx), 28, "AVX"),
    (CpuLevel::V3, (1, 0, Ecx), 29, "F16C"),
    (CpuLevel::V3, (7, 0, Ebx), 3, "BMI1"),
    (CpuLevel::V3, (7, 0, Ebx), 5, "AVX2"),
    (CpuLevel::V3, (7, 0, Ebx), 8, "BMI2"),
    (CpuLevel::V3, (0x8000_0001, 0, Ecx), 5, "LZCNT"),
    (CpuLevel::V3, (0xd, 0, Eax), 2, "the state of AVX"),
    (CpuLevel::V4, (7, 0, Ebx), 16, "AVX512F"),
    (CpuLevel::V4, (7, 0, Ebx), 17, "AVX512DQ"),
    (CpuLevel::V4, (7, 0, Ebx), 28, "AVX512CD"),
    (CpuLevel::V4, (7, 0, Ebx), 30, "AVX512BW"),
    (CpuLevel::V4, (7, 0, Ebx), 31, "AVX512VL"),
];

/// What kernels use, as far as it is there: level from which it is shown, register, bits.
///
/// Of the means against speculation those are there that are used when they are seen; none that
/// say that a processor needs none (ARCH_CAPABILITIES), for the next one may.
const OF_KERNELS: [(CpuLevel, Leaf, u32); 16] = [
    // VME to MCE, APIC to PSE36, CLFSH, HTT.
    (CpuLevel::V1, (1, 0, Edx), 0x100b_fffe),
    // x2APIC, TSC deadline, hypervisor.
    (CpuLevel::V1, (1, 0, Ecx), 1 << 21 | 1 << 24 | 1 << 31),
    // The timer of the local APIC never stops.
    (CpuLevel::V1, (6, 0, Eax), 1 << 2),
    // MD_CLEAR, SPEC_CTRL, STIBP, SSBD.
    (
        CpuLevel::V1,
        (7, 0, Edx),
        1 << 10 | 1 << 26 | 1 << 27 | 1 << 31,
    ),
    // What AMD says again of leaf 1, NX, RDTSCP.
    (
        CpuLevel::V1,
        (0x8000_0001, 0, Edx),
        0x0183_f3ff | 1 << 20 | 1 << 27,
    ),
    // AMD: CR8 by a prefix, topology.
    (CpuLevel::V1, (0x8000_0001, 0, Ecx), 1 << 4 | 1 << 22),
    // The time stamp counter never stops.
    (CpuLevel::V1, (0x8000_0007, 0, Edx), 1 << 8),
    // AMD: IBPB, IBRS, STIBP, SSBD.
    (
        CpuLevel::V1,
        (0x8000_0008, 0, Ebx),
        1 << 12 | 1 << 14 | 1 << 15 | 1 << 24,
    ),
    // FSGSBASE, TSC_ADJUST, SMEP.
    (CpuLevel::V3, (7, 0, Ebx), 1 | 1 << 1 | 1 << 7),
    // RDRAND.
    (CpuLevel::V3, (1, 0, Ecx), 1 << 30),
    // Pages of 1 GiB.
    (CpuLevel::V3, (0x8000_0001, 0, Edx), 1 << 26),
    // State of x87, SSE and AVX.
    (CpuLevel::V3, (0xd, 0, Eax), 0b111),
    // PCID, INVPCID, SMAP.
    (CpuLevel::V4, (1, 0, Ecx), 1 << 17),
    (CpuLevel::V4, (7, 0, Ebx), 1 << 10 | 1 << 20),
    // UMIP.
    (CpuLevel::V4, (7, 0, Ecx), 1 << 2),
    // State of AVX-512.
    (CpuLevel::V4, (0xd, 0, Eax), 0b1110_0000),
];

/// The last basic function of a level.
const LAST_BASIC: u32 = 0xd;
/// The last extended one.
const LAST_EXTENDED: u32 = 0x8000_001e;
/// Physical address bits, at most: more than any machine of ours uses.
const ADDRESS_BITS: u32 = 42;
/// Bytes of x87, SSE and the header of an XSAVE area (Intel SDM volume 1, 13.4).
const XSAVE_LEGACY: u32 = 576;

impl CpuLevel {
    /// Leaves of `cpuid`, which is KVM's, what the level has.
    ///
    /// # Errors
    /// What is missing, by name.
    pub fn apply(self, cpuid: &mut CpuId) -> Result<(), LacksLevel> {
        if self == Self::Host {
            return Ok(());
        }
        let has = |(leaf, bit): (Leaf, u32)| {
            let entry = cpuid.as_slice().iter().find(|entry| is(entry, leaf));
            entry.is_some_and(|entry| register(entry, leaf.2) >> bit & 1 == 1)
        };
        let missing: Vec<_> = INSTRUCTIONS
            .iter()
            .filter(|(level, leaf, bit, _)| *level <= self && !has((*leaf, *bit)))
            .map(|(.., name)| *name)
            .collect();
        if !missing.is_empty() {
            let missing = missing.join(", ");
            return Err(LacksLevel {
                level: self,
                missing,
            });
        }
        cpuid.retain(|entry| self.shows(entry));
        let xsave_size = self.xsave_size(cpuid);
        for entry in cpuid.as_mut_slice() {
            self.mask(entry, xsave_size);
        }
        Ok(())
    }

    /// The bits of a register that the level may show.
    fn bits(self, function: u32, index: u32, of: Register) -> u32 {
        let is_it = |(f, i, r): Leaf| (f, i, r as u8) == (function, index, of as u8);
        let instructions = INSTRUCTIONS
            .iter()
            .filter(|(level, leaf, ..)| *level <= self && is_it(*leaf))
            .map(|(_, _, bit, _)| 1 << bit);
        let of_kernels = OF_KERNELS
            .iter()
            .filter(|(level, leaf, _)| *level <= self && is_it(*leaf))
            .map(|(.., bits)| *bits);
        instructions
            .chain(of_kernels)
            .fold(0, |all, bits| all | bits)
    }

    /// Whether a leaf stays: identity, caches, topology, features, KVM's own.
    fn shows(self, entry: &kvm_cpuid_entry2) -> bool {
        match entry.function {
            0xd => {
                let states = self.bits(0xd, 0, Eax);
                states != 0
                    && (entry.index < 2 || entry.index < 32 && states >> entry.index & 1 == 1)
            }
            7 => entry.index == 0,
            0..=2 | 4 | 6 | 0xb => true,
            0x4000_0000..=0x4000_00ff => true,
            0x8000_0000..=0x8000_0008 | 0x8000_001d | 0x8000_001e => true,
            _ => false,
        }
    }

    /// Bytes of an XSAVE area with all states of the level.
    fn xsave_size(self, cpuid: &CpuId) -> u32 {
        let states = cpuid.as_slice().iter();
        let ends = states
            .filter(|entry| entry.function == 0xd && entry.index >= 2)
            .map(|entry| entry.ebx.saturating_add(entry.eax));
        ends.fold(XSAVE_LEGACY, u32::max)
    }

    fn mask(self, entry: &mut kvm_cpuid_entry2, xsave_size: u32) {
        let (function, index) = (entry.function, entry.index);
        let bits = |register| self.bits(function, index, register);
        match (function, index) {
            (0, _) => entry.eax = entry.eax.min(LAST_BASIC),
            (1, _) => {
                entry.ecx &= bits(Ecx);
                entry.edx &= bits(Edx);
            }
            (6, _) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & bits(Eax), 0, 0, 0);
            }
            (7, _) => {
                entry.eax = 0;
                entry.ebx &= bits(Ebx);
                entry.ecx &= bits(Ecx);
                entry.edx &= bits(Edx);
            }
            (0xd, 0) => {
                entry.eax &= bits(Eax);
                entry.ecx = xsave_size;
                entry.edx = 0;
            }
            // Of XSAVE's variants there is none.
            (0xd, 1) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (0x8000_0000, _) => entry.eax = entry.eax.min(LAST_EXTENDED),
            (0x8000_0001, _) => {
                entry.ecx &= bits(Ecx);
                entry.edx &= bits(Edx);
            }
            (0x8000_0007, _) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, entry.edx & bits(Edx));
            }
            (0x8000_0008, _) => {
                // 48 linear ones: five levels of page tables are no part of a level.
                entry.eax = 48 << 8 | (entry.eax & 0xff).min(ADDRESS_BITS);
                entry.ebx &= bits(Ebx);
                entry.edx = 0;
            }
            _ => {}
        }
    }
}

fn is(entry: &kvm_cpuid_entry2, (function, index, _): Leaf) -> bool {
    (entry.function, entry.index) == (function, index)
}

fn register(entry: &kvm_cpuid_entry2, of: Register) -> u32 {
    match of {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    }
}

impl fmt::Display for CpuLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, level)| level == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

impl FromStr for CpuLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let level = NAMES.iter().find(|(name, _)| *name == text);
        level
            .map(|(_, level)| *level)
            .ok_or_else(|| "give host, x86-64-v1, x86-64-v2, x86-64-v3 or x86-64-v4".into())
    }
}

#[cfg(test)]
mod tests;
