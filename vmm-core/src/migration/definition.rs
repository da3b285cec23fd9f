//! What a machine is, for the comparison with the one that it shall become.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;

use kvm_bindings::CpuId;
use migration::schema::Schema;
use migration::wire::{CpuFeatures, Definition, Processor, Tsc, Unit as UnitDefinition};

use super::saved_state::{CoreState, WiringState};
use super::unit::Unit;
use crate::files;
use crate::hypervisor::CpuLevel;
use crate::memory::Memory;
use crate::transport::{DeviceKind, VirtioDevice as _};

/// Registers of CPUID whose bits are features: function, index, and which registers.
const FEATURE_LEAVES: [(u32, u32, &[&str]); 11] = [
    (1, 0, &["ecx", "edx"]),
    (6, 0, &["eax"]),
    (7, 0, &["ebx", "ecx", "edx"]),
    (7, 1, &["eax", "ebx", "edx"]),
    (7, 2, &["edx"]),
    (0xd, 0, &["eax", "edx"]),
    (0xd, 1, &["eax"]),
    (0x8000_0001, 0, &["ecx", "edx"]),
    (0x8000_0007, 0, &["edx"]),
    (0x8000_0008, 0, &["ebx"]),
    (0x4000_0001, 0, &["eax"]),
];
/// Bits of CPUID 1:ecx that say what the guest's kernel has switched on, not what there is.
const OSXSAVE: u32 = 1 << 27;
/// Bytes of a disk's configuration that are its capacity (virtio 1.3, 5.2.4).
const CAPACITY: usize = 8;

/// What `cpuid`, of this level, shows.
pub fn processor(level: CpuLevel, cpuid: &CpuId) -> Processor {
    let find = |function| cpuid.as_slice().iter().find(|e| e.function == function);
    let vendor = find(0).map_or_else(Vec::new, |leaf| {
        [leaf.ebx, leaf.edx, leaf.ecx]
            .map(u32::to_le_bytes)
            .concat()
    });
    Processor {
        level: level.to_string(),
        vendor: String::from_utf8_lossy(&vendor).into_owned(),
        address_bits: find(0x8000_0008).map_or(0, |leaf| leaf.eax & 0xff),
    }
}

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

/// Bytes of guest memory that take place on this host.
pub fn used(memory: &Memory) -> u64 {
    // One file is all of it.
    let regions = memory.regions();
    let file = regions
        .first()
        .and_then(|region| region.file().metadata().ok());
    file.map_or(0, |metadata| metadata.blocks() * 512)
}

/// Bytes of memory that this host can still give; nothing if it does not say.
pub fn available() -> Option<u64> {
    let file = files::open(File::options().read(true), "/proc/meminfo").ok()?;
    let meminfo = std::io::read_to_string(file).ok()?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// The whole of it.
pub fn define(
    cpus: u32,
    cpu_features: &[CpuFeatures],
    processor: &Processor,
    tsc: Option<Tsc>,
    memory: &Memory,
    units: &[impl AsRef<Unit>],
) -> Definition {
    let regions = memory.regions();
    Definition {
        cpus,
        cpu_features: cpu_features.to_vec(),
        processor: Some(processor.clone()),
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::memory::Ram;

    #[test]
    fn only_what_was_written_is_used() {
        let ram = Ram::allocate(4 << 20, None).unwrap();
        let memory = Memory::default();
        let mut layout = memory.begin();
        for region in ram.regions().unwrap() {
            layout.add(region).unwrap();
        }
        layout.commit().unwrap();
        assert_eq!(used(&memory), 0);
        ram.file().write_all_at(&[1; 8192], 1 << 20).unwrap();
        assert!((8192..4 << 20).contains(&used(&memory)));
    }

    #[test]
    fn this_host_has_memory() {
        assert!(available().unwrap() > 1 << 20);
    }
}
