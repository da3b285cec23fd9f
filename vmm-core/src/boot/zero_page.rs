//! What a bzImage is handed: the zero page (`struct boot_params`).

use std::ops::Range;

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{self, BootConfigurator, BootParams};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::bzimage::BzImage;
use super::memory_map::Entry;
use crate::layout::RSDP;

/// Guest-physical address of the zero page.
pub(super) const ZERO_PAGE: u64 = 0x7000;

/// `type_of_loader`: one without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page for `kernel`, whose command line stands at `command_line`.
pub(super) fn write(
    memory: &GuestMemoryMmap<()>,
    kernel: &BzImage,
    command_line: u32,
    initrd: Option<&Range<u64>>,
    map: &[Entry],
) -> Result<(), configurator::Error> {
    let mut page = boot_params {
        hdr: *kernel.header(),
        acpi_rsdp_addr: RSDP,
        ..Default::default()
    };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = command_line;
    page.hdr.code32_start = low32(kernel.address());
    if let Some(range) = initrd {
        page.hdr.ramdisk_image = low32(range.start);
        page.hdr.ramdisk_size = low32(range.end - range.start);
    }
    let mut count = 0;
    for (slot, entry) in page.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: entry.range.start,
            size: entry.range.end - entry.range.start,
            r#type: entry.kind as u32,
        };
        count += 1;
    }
    page.e820_entries = count;
    let params = BootParams::new(&page, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, memory)
}

/// Of an address below 4 GiB, which kernel and initrd have.
fn low32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::memory_map::memory_map;
    use crate::boot::testing::{BzFile, bzimage, image, memory};
    use vm_memory::Bytes;

    #[test]
    fn the_zero_page_leads_to_everything() {
        let memory = memory(4);
        let kernel = BzImage::parse(&image(&bzimage(&BzFile::default()))).unwrap();
        let initrd = 0x3f_f000..0x3f_f123;
        let map = memory_map(&memory);
        write(&memory, &kernel, 0x2_0000, Some(&initrd), &map).unwrap();
        let page: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let header = page.hdr;
        assert_eq!({ header.header }, 0x5372_6448);
        assert_eq!({ header.boot_flag }, 0xaa55);
        assert_eq!({ header.type_of_loader }, 0xff);
        assert_eq!({ header.cmd_line_ptr }, 0x2_0000);
        assert_eq!({ header.code32_start }, 0x20_0000);
        assert_eq!({ header.ramdisk_image }, 0x3f_f000);
        assert_eq!({ header.ramdisk_size }, 0x123);
        assert_eq!({ page.acpi_rsdp_addr }, 0xe_0000);
        assert_eq!(page.e820_entries, 5);
        let third = page.e820_table[2];
        let third = (third.addr, third.size, third.r#type);
        assert_eq!(third, (0x10_0000, 0x30_0000, 1));
    }
}
