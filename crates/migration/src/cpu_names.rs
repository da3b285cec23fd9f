//! What features of a processor are called (Intel SDM volume 2A, CPUID; AMD APM volume 3,
//! appendix E).

use crate::wire::CpuFeatures;

/// Of a register of CPUID: function, index, register, and what its bits are called.
type Named = (u32, u32, &'static str, &'static [(u32, &'static str)]);

#[rustfmt::skip]
const NAMES: [Named; 12] = [
    (1, 0, "ecx", &[
        (0, "SSE3"), (1, "PCLMULQDQ"), (5, "VMX"), (9, "SSSE3"), (12, "FMA"), (13, "CX16"),
        (17, "PCID"), (19, "SSE4.1"), (20, "SSE4.2"), (21, "x2APIC"), (22, "MOVBE"),
        (23, "POPCNT"), (24, "the TSC deadline timer"), (25, "AES"), (26, "XSAVE"), (28, "AVX"),
        (29, "F16C"), (30, "RDRAND"),
    ]),
    (1, 0, "edx", &[
        (0, "FPU"), (8, "CX8"), (15, "CMOV"), (23, "MMX"), (24, "FXSR"), (25, "SSE"), (26, "SSE2"),
        (27, "SS"),
    ]),
    (7, 0, "ebx", &[
        (0, "FSGSBASE"), (1, "TSC_ADJUST"), (3, "BMI1"), (4, "HLE"), (5, "AVX2"),
        (6, "FDP_EXCPTN_ONLY"), (7, "SMEP"), (8, "BMI2"), (9, "ERMS"), (10, "INVPCID"),
        (11, "RTM"), (13, "ZERO_FCS_FDS"), (16, "AVX512F"), (17, "AVX512DQ"),
        (18, "RDSEED"), (19, "ADX"), (20, "SMAP"), (21, "AVX512IFMA"), (23, "CLFLUSHOPT"),
        (24, "CLWB"), (28, "AVX512CD"), (29, "SHA"), (30, "AVX512BW"), (31, "AVX512VL"),
    ]),
    (7, 0, "ecx", &[
        (1, "AVX512VBMI"), (2, "UMIP"), (3, "PKU"), (6, "AVX512VBMI2"), (8, "GFNI"), (9, "VAES"),
        (10, "VPCLMULQDQ"), (11, "AVX512VNNI"), (12, "AVX512BITALG"), (14, "AVX512VPOPCNTDQ"),
        (16, "LA57"), (22, "RDPID"), (25, "CLDEMOTE"), (27, "MOVDIRI"), (28, "MOVDIR64B"),
    ]),
    (7, 0, "edx", &[
        (4, "FSRM"), (10, "MD_CLEAR"), (14, "SERIALIZE"), (16, "TSXLDTRK"),
        (22, "AMX-BF16"), (23, "AVX512FP16"), (24, "AMX-TILE"), (25, "AMX-INT8"), (26, "SPEC_CTRL"), (27, "STIBP"),
        (29, "ARCH_CAPABILITIES"), (31, "SSBD"),
    ]),
    (7, 1, "eax", &[(4, "AVX-VNNI"), (5, "AVX512BF16"), (10, "FZRM"), (11, "FSRS"), (12, "FSRC")]),
    (0xd, 0, "eax", &[
        (0, "XSAVE of x87"), (1, "XSAVE of SSE"), (2, "XSAVE of AVX"), (5, "XSAVE of opmasks"),
        (6, "XSAVE of ZMM0-15"), (7, "XSAVE of ZMM16-31"), (9, "XSAVE of PKRU"),
        (17, "XSAVE of TILECFG"), (18, "XSAVE of TILEDATA"),
    ]),
    (0xd, 1, "eax", &[(0, "XSAVEOPT"), (1, "XSAVEC"), (3, "XSAVES")]),
    (0x8000_0001, 0, "ecx", &[
        (0, "LAHF"), (2, "SVM"), (5, "LZCNT"), (6, "SSE4A"), (8, "PREFETCHW"),
    ]),
    (0x8000_0001, 0, "edx", &[
        (11, "SYSCALL"), (20, "NX"), (26, "pages of 1 GiB"), (27, "RDTSCP"), (29, "LM"),
    ]),
    (0x8000_0007, 0, "edx", &[(8, "a TSC that never stops")]),
    (0x8000_0008, 0, "ebx", &[(12, "IBPB"), (14, "IBRS"), (15, "STIBP"), (24, "SSBD")]),
];

impl CpuFeatures {
    /// What each of these features is called; where that is not known, where it is.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let (function, index) = self.leaf;
        let is_it =
            |(f, i, register, _): &&Named| (*f, *i, *register) == (function, index, &self.register);
        let known = NAMES
            .iter()
            .find(is_it)
            .map_or(&[][..], |(.., names)| names);
        let set = (0..u32::BITS).filter(|bit| self.bits >> bit & 1 == 1);
        set.map(move |bit| match known.iter().find(|(at, _)| *at == bit) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("CPUID {function:#x}.{index}:{:.3}[{bit}]", self.register),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_has_its_name_or_its_place() {
        let features = CpuFeatures {
            leaf: (7, 0),
            register: "ebx".into(),
            bits: 1 << 5 | 1 << 16 | 1 << 22,
        };
        let names: Vec<_> = features.names().collect();
        assert_eq!(names, ["AVX2", "AVX512F", "CPUID 0x7.0:ebx[22]"]);
        let elsewhere = CpuFeatures {
            leaf: (0x99, 1),
            ..features
        };
        assert_eq!(elsewhere.names().next().unwrap(), "CPUID 0x99.1:ebx[5]");
    }
}
