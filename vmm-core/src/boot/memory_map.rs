//! What the guest is told of its memory: the e820 map.

use std::ops::Range;

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout::{EBDA, ECAM, HIGH_MEMORY, KVM_IDENTITY_MAP, KVM_TSS, LOW_RAM_END};

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

/// The regions of RAM, adjacent ones as one.
fn ram(memory: &GuestMemoryMmap<()>) -> Vec<Range<u64>> {
    let mut merged: Vec<Range<u64>> = Vec::new();
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        let end = start.saturating_add(region.len());
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

/// The map, by rising addresses.
///
/// The configuration space is reserved, because Linux does not use it otherwise before
/// it has read the ACPI namespace.
pub(super) fn memory_map(memory: &GuestMemoryMmap<()>) -> Vec<Entry> {
    let reserved = [
        EBDA..HIGH_MEMORY,
        ECAM,
        KVM_IDENTITY_MAP..KVM_TSS + KVM_TSS_SIZE,
    ];
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
                (0xfffb_c000, 0xfffc_0000, Reserved),
                (0x1_0000_0000, 0x1_0020_0000, Ram),
            ]
        );
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
