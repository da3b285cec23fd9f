//! What the loader says: `hvm_start_info` (Xen's x86/HVM direct boot ABI, version 1).
//!
//! Copied before anything else is written, for it may lie anywhere.

use crate::console::fail;
use crate::mmio;
use crate::protocol::Text;

const MAGIC: u32 = 0x336e_c578;
const MAX_RANGES: usize = 64;
const MAX_COMMAND_LINE: usize = 1024;
const RAM: u32 = 1;

/// Guest-physical bytes from `start` up to `end`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

/// A copy of the start info.
pub struct StartInfo {
    rsdp: u64,
    ram: [Range; MAX_RANGES],
    ranges: usize,
    command_line: [u8; MAX_COMMAND_LINE],
    command_line_length: usize,
}

impl StartInfo {
    pub fn read(address: u64) -> Self {
        let magic = mmio::read::<u32>(address);
        let version = mmio::read::<u32>(address + 4);
        if magic != MAGIC || version < 1 {
            fail(
                "start-info",
                magic.into(),
                version.into(),
                Text::new("no-pvh-version-1"),
            );
        }
        let mut info = Self {
            rsdp: mmio::read(address + 32),
            ram: [Range::default(); MAX_RANGES],
            ranges: 0,
            command_line: [0; MAX_COMMAND_LINE],
            command_line_length: 0,
        };
        info.copy_command_line(mmio::read(address + 24));
        info.copy_memory_map(mmio::read(address + 40), mmio::read(address + 48));
        info
    }

    fn copy_command_line(&mut self, address: u64) {
        if address == 0 {
            return;
        }
        loop {
            let byte = mmio::read::<u8>(address + self.command_line_length as u64);
            if byte == 0 {
                return;
            }
            let Some(slot) = self.command_line.get_mut(self.command_line_length) else {
                fail(
                    "command-line-too-long",
                    MAX_COMMAND_LINE as u64,
                    0,
                    Text::new(""),
                );
            };
            *slot = byte;
            self.command_line_length += 1;
        }
    }

    fn copy_memory_map(&mut self, table: u64, entries: u32) {
        // struct hvm_memmap_table_entry: addr u64, size u64, type u32, reserved u32
        for entry in (0..u64::from(entries)).map(|i| table + i * 24) {
            let start = mmio::read::<u64>(entry);
            let end = start.saturating_add(mmio::read(entry + 8));
            if mmio::read::<u32>(entry + 16) != RAM || start >= end {
                continue;
            }
            let Some(slot) = self.ram.get_mut(self.ranges) else {
                fail("memory-map-too-long", entries.into(), 0, Text::new(""));
            };
            *slot = Range { start, end };
            self.ranges += 1;
        }
        if self.ranges == 0 {
            fail("no-memory-map", entries.into(), 0, Text::new(""));
        }
    }

    pub fn command_line(&self) -> &str {
        core::str::from_utf8(&self.command_line[..self.command_line_length])
            .unwrap_or_else(|_| fail("command-line-not-utf8", 0, 0, Text::new("")))
    }

    pub fn ram(&self) -> &[Range] {
        &self.ram[..self.ranges]
    }

    pub fn ram_bytes(&self) -> u64 {
        self.ram().iter().map(|range| range.end - range.start).sum()
    }

    /// Where RAM below 4 GiB ends.
    pub fn low_ram_end(&self) -> u64 {
        self.ram()
            .iter()
            .map(|range| range.end)
            .filter(|&end| end <= 1 << 32)
            .max()
            .unwrap_or(0)
    }

    /// Address of the ACPI root pointer, if the loader knows it.
    pub fn rsdp(&self) -> Option<u64> {
        (self.rsdp != 0).then_some(self.rsdp)
    }
}
