//! What the guest is told of its memory: the e820 map.

use std::ops::Range;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout::{
    EBDA, ECAM, HIGH_MEMORY, HIGH_RAM, KVM_IDENTITY_MAP, KVM_TSS, LOW_RAM_END, ROM,
};

/// Three pages at [`KVM_TSS`].
const KVM_TSS_SIZE: u64 = 3 * 4096;

/// What a range may be used for; the value is that of e820 and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// A range of the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) range: Range<u64>,
    pub(super) kind: Kind,
}

/// The regions of RAM, adjacent ones as one; in the hole there is only ROM.
fn ram(memory: &GuestMemoryMmap<()>) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::new();
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start.saturating_add(region.len());
        if (LOW_RAM_END..HIGH_RAM).contains(&start) {
            continue;
        }
        match merged.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => merged.push(start..end),
        }
    }
    merged
}

/// End of the RAM that starts at address 0 and ends below the hole; 0 without any.
pub(super) fn low_ram_end(memory: &GuestMemoryMmap<()>) -> u64 {
    match ram(memory).first() {
        Some(first) if first.start == 0 => first.end.min(LOW_RAM_END),
        _ => 0,
    }
}

const KVM_PAGES: Range<u64> = KVM_IDENTITY_MAP..KVM_TSS + KVM_TSS_SIZE;

/// The map, by rising addresses, for a kernel.
///
/// The configuration space is reserved, because Linux does not use it otherwise before
/// it has read the ACPI namespace.
pub(super) fn memory_map(memory: &GuestMemoryMmap<()>) -> Vec<Entry> {
    let reserved = [EBDA..HIGH_MEMORY, ECAM, KVM_PAGES];
    let mut map: Vec<Entry> = ram(memory)
        .into_iter()
        .flat_map(|r| {
            // Around the one reserved range that has RAM behind it.
            [r.start..r.end.min(EBDA), r.start.max(HIGH_MEMORY)..r.end]
        })
        .filter(|r| !r.is_empty())
        .map(|range| Entry {
            range,
            kind: Kind::Ram,
        })
        .chain(reserved.map(|range| Entry {
            range,
            kind: Kind::Reserved,
        }))
        .collect();
    map.sort_by_key(|entry| entry.range.start);
    map
}

/// The map for a firmware, which reserves what it takes below 1 MiB by itself: addresses,
/// lengths and kinds as in e820.
pub fn firmware_map(memory: &GuestMemoryMmap<()>) -> Vec<u8> {
    let reserved = [ECAM, KVM_PAGES, ROM].map(|range| (range, Kind::Reserved));
    let ram = ram(memory).into_iter().map(|range| (range, Kind::Ram));
    let mut map = Vec::new();
    for (range, kind) in ram.chain(reserved) {
        map.extend(range.start.to_le_bytes());
        map.extend((range.end - range.start).to_le_bytes());
        map.extend((kind as u32).to_le_bytes());
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use Kind::{Ram, Reserved};
    use vm_memory::GuestAddress;

    fn of(ranges: &[(u64, usize)]) -> Vec<(u64, u64, Kind)> {
        let ranges: Vec<_> = ranges.iter().map(|&(a, n)| (GuestAddress(a), n)).collect();
        memory_map(&GuestMemoryMmap::from_ranges(&ranges).unwrap())
            .into_iter()
            .map(|e| (e.range.start, e.range.end, e.kind))
            .collect()
    }

    #[test]
    fn ram_has_its_holes() {
        assert_eq!(
            of(&[(0, 0x40_0000), (0x1_0000_0000, 0x20_0000)]),
            [
                (0, 0x9_fc00, Ram),
                (0x9_fc00, 0x10_0000, Reserved),
                (0x10_0000, 0x40_0000, Ram),
                (0xe000_0000, 0xe010_0000, Reserved),
                (0xfeff_c000, 0xff00_0000, Reserved),
                (0x1_0000_0000, 0x1_0020_0000, Ram),
            ]
        );
    }

    #[test]
    fn rom_is_no_ram() {
        let ranges = [
            (GuestAddress(0), 2 << 20),
            (GuestAddress(0xfffc_0000), 0x4_0000),
            (GuestAddress(0x1_0000_0000), 1 << 20),
        ];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let map = firmware_map(&memory);
        let field = |entry: &[u8], at| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
        let entries: Vec<_> = map
            .chunks(20)
            .map(|entry| (field(entry, 0), field(entry, 8), entry[16]))
            .collect();
        assert_eq!(
            entries,
            [
                (0, 2 << 20, 1),
                (0x1_0000_0000, 1 << 20, 1),
                (0xe000_0000, 1 << 20, 2),
                (0xfeff_c000, 0x4000, 2),
                (0xff00_0000, 0x100_0000, 2),
            ]
        );
        assert_eq!(ram(&memory).len(), 2);
    }

    #[test]
    fn adjacent_regions_are_one() {
        let map = of(&[(0, 0x20_0000), (0x20_0000, 0x20_0000)]);
        assert_eq!(map[2], (0x10_0000, 0x40_0000, Ram));
    }

    #[test]
    fn low_ram_starts_at_zero() {
        let end = |ranges: &[(GuestAddress, usize)]| {
            low_ram_end(&GuestMemoryMmap::from_ranges(ranges).unwrap())
        };
        assert_eq!(end(&[(GuestAddress(0), 0x1000)]), 0x1000);
        assert_eq!(end(&[(GuestAddress(0x1000), 0x1000)]), 0);
    }
}
