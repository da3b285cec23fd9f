//! The one-to-one map: entry.s maps the first 4 GiB, this adds what lies above.
//!
//! Entries only ever go from not present to present, so nothing has to be flushed. All entries
//! are user entries; pages are 2 MiB (1 GiB pages may be missing).

use crate::console::fail;
use crate::protocol::Text;
use crate::pvh::StartInfo;
use crate::{memory, mmio};

const HUGE: u64 = 2 << 20;
const BOOT_MAPPED: u64 = 4 << 30;
const PRESENT_WRITE_USER: u64 = 7;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Canonical lower half with four levels.
const LIMIT: u64 = 1 << 47;

unsafe extern "C" {
    static boot_pml4: u8;
}

/// Maps all RAM.
pub fn map_ram(info: &StartInfo) {
    for range in info.ram() {
        map(range.start, range.end - range.start);
    }
}

/// Makes `length` bytes from `start` accessible, in whole 2 MiB pages.
pub fn map(start: u64, length: u64) {
    let end = start.saturating_add(length);
    if end > LIMIT {
        fail("address-too-high", start, length, Text::new("map"));
    }
    let mut page = start.max(BOOT_MAPPED) & !(HUGE - 1);
    while page < end {
        let pdpt = table(&raw const boot_pml4 as u64, page >> 39);
        let directory = table(pdpt, page >> 30);
        let entry = directory + (page >> 21 & 511) * 8;
        mmio::write(entry, page | PRESENT_WRITE_USER | LARGE);
        page += HUGE;
    }
}

/// The table that an entry points to, made if it is not there.
fn table(parent: u64, index: u64) -> u64 {
    let entry = parent + (index & 511) * 8;
    let value = mmio::read::<u64>(entry);
    if value & 1 != 0 {
        return value & ADDRESS;
    }
    let new = memory::dma(memory::PAGE as usize);
    mmio::write(entry, new | PRESENT_WRITE_USER);
    new
}
