//! What a machine is, for the comparison with the one that it shall become.

use kvm_bindings::CpuId;
use migration::schema::Schema;
use migration::wire::{CpuFeatures, Definition, Tsc, Unit as UnitDefinition};

use super::saved_state::{CoreState, WiringState};
use super::unit::Unit;
use crate::memory::Memory;
use crate::transport::{DeviceKind, VirtioDevice as _};

/// Registers of CPUID whose bits are features: function, index, and which registers.
const FEATURE_LEAVES: [(u32, u32, &[&str]); 7] = [
    (1, 0, &["ecx", "edx"]),
    (7, 0, &["ebx", "ecx", "edx"]),
    (7, 1, &["eax"]),
    (0xd, 0, &["eax", "edx"]),
    (0xd, 1, &["eax"]),
    (0x8000_0001, 0, &["ecx", "edx"]),
    (0x4000_0001, 0, &["eax"]),
];
/// Bits of CPUID 1:ecx that say what the guest's kernel has switched on, not what there is.
const OSXSAVE: u32 = 1 << 27;
/// Bytes of a disk's configuration that are its capacity (virtio 1.3, 5.2.4).
const CAPACITY: usize = 8;

/// The features that `cpuid` shows.
pub fn cpu_features(cpuid: &CpuId) -> Vec<CpuFeatures> {
    let mut features = Vec::new();
    for (function, index, registers) in FEATURE_LEAVES {
        let leaf = (function, index);
        let entry = cpuid
            .as_slice()
            .iter()
            .find(|entry| (entry.function, entry.index) == leaf);
        let Some(entry) = entry else { continue };
        for &register in registers {
            let bits = match register {
                "eax" => entry.eax,
                "ebx" => entry.ebx,
                "ecx" if function == 1 => entry.ecx & !OSXSAVE,
                "ecx" => entry.ecx,
                _ => entry.edx,
            };
            features.push(CpuFeatures {
                leaf,
                register: register.into(),
                bits,
            });
        }
    }
    features
}

/// The whole of it.
pub fn define(
    cpus: u32,
    cpu_features: &[CpuFeatures],
    tsc: Option<Tsc>,
    memory: &Memory,
    units: &[impl AsRef<Unit>],
) -> Definition {
    let regions = memory.regions();
    Definition {
        cpus,
        cpu_features: cpu_features.to_vec(),
        tsc,
        memory: regions.iter().map(|r| (r.gpa(), r.size())).collect(),
        units: units
            .iter()
            .map(|unit| define_unit(unit.as_ref()))
            .collect(),
        schemas: vec![
            (CoreState::KIND.into(), CoreState::NUMBER),
            (WiringState::KIND.into(), WiringState::NUMBER),
        ],
    }
}

fn define_unit(unit: &Unit) -> UnitDefinition {
    let remote = &unit.remote;
    let mut identity = Vec::new();
    if remote.kind() == DeviceKind::BLK {
        identity.resize(CAPACITY, 0);
        remote.read_config(0, &mut identity);
    }
    UnitDefinition {
        id: unit.id.clone(),
        device_type: remote.kind().id().into(),
        features: remote.features(),
        queues: remote.queues(),
        queue_size: remote.max_queue_size(),
        has_state: remote.has_state(),
        identity,
    }
}
