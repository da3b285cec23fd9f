//! What a PVH kernel is handed: `hvm_start_info`, its modules and memory map
//! (Xen's `xen/include/public/arch-x86/hvm/start_info.h`).

use std::ops::Range;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{self, BootConfigurator, BootParams};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::memory_map::Entry;
use crate::layout::RSDP;

/// Guest-physical address of the start info.
pub(super) const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6040;
const MEMORY_MAP: u64 = 0x7000;

/// Version 1 has the memory map.
const VERSION: u32 = 1;

/// Writes the start info for a kernel whose command line stands at `command_line`.
pub(super) fn write(
    memory: &GuestMemoryMmap<()>,
    command_line: u64,
    initrd: Option<&Range<u64>>,
    map: &[Entry],
) -> Result<(), configurator::Error> {
    let entries: Vec<_> = map
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.range.start,
            size: entry.range.end - entry.range.start,
            type_: entry.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .map(|range| hvm_modlist_entry {
            paddr: range.start,
            size: range.end - range.start,
            ..Default::default()
        })
        .into_iter()
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: command_line,
        rsdp_paddr: RSDP,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(entries.len()).unwrap_or(u32::MAX),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&entries, GuestAddress(MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::memory_map::memory_map;
    use crate::boot::testing::memory;
    use vm_memory::Bytes;

    #[test]
    fn the_start_info_leads_to_everything() {
        let memory = memory(4);
        let initrd = 0x3f_f000..0x3f_f123;
        write(&memory, 0x2_0000, Some(&initrd), &memory_map(&memory)).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(START_INFO)).unwrap();
        assert_eq!(info.magic, 0x336e_c578);
        assert_eq!((info.version, info.nr_modules), (1, 1));
        assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (0x2_0000, 0xe_0000));
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x3f_f000, 0x123));
        let first: hvm_memmap_table_entry =
            memory.read_obj(GuestAddress(info.memmap_paddr)).unwrap();
        assert_eq!((first.addr, first.size, first.type_), (0, 0x9_fc00, 1));
        assert_eq!(info.memmap_entries, 5);
    }

    #[test]
    fn without_an_initrd_there_is_no_module() {
        let memory = memory(4);
        write(&memory, 0x2_0000, None, &memory_map(&memory)).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(START_INFO)).unwrap();
        assert_eq!((info.nr_modules, info.modlist_paddr), (0, 0));
    }
}
