//! What a vCPU says of itself (Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::{CpuLevel, HypervisorError, refused};

/// CPUID of vCPU `id` of `count`: what KVM supports of `level`, one package, a core a vCPU, a
/// thread a core.
pub fn guest_cpuid(
    kvm: &Kvm,
    level: CpuLevel,
    id: u32,
    count: u32,
) -> Result<CpuId, HypervisorError> {
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("tell the CPUID that it supports"))?;
    level.apply(&mut cpuid)?;
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        adapt(entry, id, count, deadline_timer);
    }
    Ok(cpuid)
}

fn adapt(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, deadline_timer: bool) {
    const HYPERVISOR: u32 = 1 << 31;
    const TSC_DEADLINE: u32 = 1 << 24;
    const HTT: u32 = 1 << 28;
    let core_bits = count.next_power_of_two().trailing_zeros();
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = (entry.ebx & 0xff00) | id << 24 | count.min(255) << 16;
            entry.ecx |= HYPERVISOR;
            if deadline_timer {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx = if count > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Cache topology: nobody shares but the last level, which all do.
        (4, index) => {
            let shared = if index >= 3 { (1 << core_bits) - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | shared << 14 | ((1 << core_bits) - 1) << 26;
        }
        // Extended topology: threads, then cores, then the end.
        (0xb | 0x1f, level) => {
            let (shift, logical, kind) = match level {
                0 => (0, 1, 1),
                1 => (core_bits, count, 2),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = logical;
            entry.ecx = kind << 8 | level;
            entry.edx = id;
        }
        (0x8000_0008, _) => entry.ecx = core_bits << 12 | (count - 1) & 0xff,
        // AMD: extended APIC id, compute unit, node.
        (0x8000_001e, _) => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(function: u32, index: u32, id: u32, count: u32) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        };
        adapt(&mut entry, id, count, true);
        entry
    }

    #[test]
    fn every_vcpu_is_a_core_with_its_own_apic_id() {
        let leaf = adapted(1, 0, 5, 6);
        assert_eq!(leaf.ebx >> 24, 5);
        assert_eq!(leaf.ebx >> 16 & 0xff, 6);
        assert_eq!(leaf.edx >> 28 & 1, 1, "HTT");
        let core = adapted(0xb, 1, 5, 6);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        let thread = adapted(0xb, 0, 5, 6);
        assert_eq!(
            (thread.eax, thread.ebx, thread.ecx, thread.edx),
            (0, 1, 0x100, 5)
        );
    }

    #[test]
    fn a_single_vcpu_has_no_siblings() {
        assert_eq!(adapted(1, 0, 0, 1).edx >> 28 & 1, 0);
        assert_eq!(adapted(0x8000_0008, 0, 0, 1).ecx, 0);
        assert_eq!(adapted(4, 3, 0, 1).eax >> 14, 0);
    }
}
