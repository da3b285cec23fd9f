//! PCI: configuration space, the functions on all buses, and their BARs.
//!
//! Configuration goes through ECAM where ACPI has an MCFG, else through ports 0xcf8/0xcfc. BARs
//! stay where firmware put them; those that nobody placed are placed here, in the hole between
//! low RAM and [`WINDOW_END`].

use crate::acpi::{Ecam, Tables};
use crate::apic::ApicId;
use crate::console::fail;
use crate::interrupts::Vector;
use crate::protocol::Text;
use crate::{mmio, paging, port};
use alloc::vec::Vec;

const WINDOW_START: u64 = 0xc000_0000;
const WINDOW_END: u64 = 0xe000_0000;

mod reg {
    pub const ID: u16 = 0x00;
    pub const COMMAND: u16 = 0x04;
    pub const HEADER_TYPE: u16 = 0x0e;
    pub const BAR0: u16 = 0x10;
    pub const SECONDARY_BUS: u16 = 0x19;
    pub const CAPABILITIES: u16 = 0x34;
}

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTX: u16 = 1 << 10;

#[derive(Clone, Copy)]
enum Access {
    Memory(Ecam),
    Ports,
}

/// One PCI function.
#[derive(Clone, Copy)]
pub struct Function {
    access: Access,
    bus: u8,
    /// Device and function number.
    devfn: u8,
    pub vendor: u16,
    pub device: u16,
}

impl Function {
    fn address(&self, offset: u16) -> Option<u64> {
        match self.access {
            Access::Memory(ecam) => Some(
                ecam.base
                    + (u64::from(self.bus) << 20 | u64::from(self.devfn) << 12 | u64::from(offset)),
            ),
            Access::Ports => {
                let select = 1 << 31
                    | u32::from(self.bus) << 16
                    | u32::from(self.devfn) << 8
                    | u32::from(offset & 0xfc);
                port::write32(0xcf8, select);
                None
            }
        }
    }

    pub fn read8(&self, offset: u16) -> u8 {
        self.address(offset)
            .map_or_else(|| port::read8(0xcfc + (offset & 3)), mmio::read)
    }

    pub fn read16(&self, offset: u16) -> u16 {
        self.address(offset)
            .map_or_else(|| port::read16(0xcfc + (offset & 2)), mmio::read)
    }

    pub fn read32(&self, offset: u16) -> u32 {
        self.address(offset)
            .map_or_else(|| port::read32(0xcfc), mmio::read)
    }

    pub fn write16(&self, offset: u16, value: u16) {
        match self.address(offset) {
            Some(address) => mmio::write(address, value),
            None => port::write16(0xcfc + (offset & 2), value),
        }
    }

    fn write32(&self, offset: u16, value: u32) {
        match self.address(offset) {
            Some(address) => mmio::write(address, value),
            None => port::write32(0xcfc, value),
        }
    }

    /// Lets the function answer in memory and reach memory; legacy interrupts off.
    pub fn enable(&self) {
        self.write16(
            reg::COMMAND,
            COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX,
        );
    }

    /// Offsets of the capabilities, with their ids.
    pub fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut found = Vec::with_capacity(16);
        let mut offset = self.read8(reg::CAPABILITIES) & 0xfc;
        while offset != 0 && found.len() < 48 {
            let header = self.read16(offset.into());
            found.push((header as u8, offset.into()));
            offset = (header >> 8) as u8 & 0xfc;
        }
        found
    }

    /// Where a memory BAR is; it is mapped, and placed first if it was nowhere.
    pub fn bar(&self, index: u8, window: &mut Window<'_>) -> u64 {
        let offset = reg::BAR0 + u16::from(index) * 4;
        let low = self.read32(offset);
        let is_64_bit = low & 0b110 == 0b100;
        if low & 1 != 0 || index > 5 || (is_64_bit && index == 5) {
            fail(
                "not-a-memory-bar",
                index.into(),
                low.into(),
                Text::new("pci"),
            );
        }
        let high = if is_64_bit {
            self.read32(offset + 4)
        } else {
            0
        };
        let mut address = u64::from(high) << 32 | u64::from(low & !0xf);
        let size = self.bar_size(offset, is_64_bit, address);
        if address == 0 {
            address = window.take(size);
            self.write32(offset, address as u32);
            if is_64_bit {
                self.write32(offset + 4, 0);
            }
        }
        paging::map(address, size);
        address
    }

    fn bar_size(&self, offset: u16, is_64_bit: bool, address: u64) -> u64 {
        // Below 4 GiB everything is mapped, so only a BAR that is to be placed or mapped costs
        // these exits. Decoding must be off: it is until `enable`, unless firmware did it.
        if address != 0 && address < 1 << 32 {
            return 0;
        }
        self.write16(reg::COMMAND, 0);
        self.write32(offset, u32::MAX);
        let mut mask = u64::from(self.read32(offset) & !0xf) | 0xffff_ffff_0000_0000;
        self.write32(offset, address as u32);
        if is_64_bit {
            self.write32(offset + 4, u32::MAX);
            mask &= u64::from(self.read32(offset + 4)) << 32 | 0xffff_ffff;
            self.write32(offset + 4, (address >> 32) as u32);
        }
        mask.wrapping_neg()
    }
}

/// The MSI-X table of a function (PCI 3.0, section 6.8.2).
pub struct MsixTable {
    address: u64,
    entries: u16,
}

impl MsixTable {
    pub const CAPABILITY: u8 = 0x11;
    const ENABLE: u16 = 1 << 15;

    /// Turns on what the capability at `at` has; `bar` says where a BAR is.
    pub fn enable(function: &Function, at: u16, mut bar: impl FnMut(u8) -> u64) -> Self {
        let control = function.read16(at + 2);
        let table = function.read32(at + 4);
        let table = Self {
            address: bar(table as u8 & 7) + u64::from(table & !7),
            entries: (control & 0x7ff) + 1,
        };
        function.write16(at + 2, Self::ENABLE | control & 0x3fff);
        table
    }

    /// Points an entry at a CPU; returns the entry. Beyond the table its last one is shared.
    pub fn connect(&self, entry: u16, vector: Vector, target: ApicId) -> u16 {
        let entry = entry.min(self.entries - 1);
        let at = self.address + u64::from(entry) * 16;
        mmio::write(at, 0xfee0_0000 | target.0 << 12);
        mmio::write(at + 4, 0u32);
        mmio::write(at + 8, u32::from(vector.0));
        mmio::write(at + 12, 0u32); // not masked
        entry
    }
}

/// Where BARs are placed that have no place.
pub struct Window<'a> {
    functions: &'a [Function],
    low_ram_end: u64,
    /// Not known before the first BAR asks for it: finding out costs six exits a function.
    next: Option<u64>,
}

impl<'a> Window<'a> {
    /// The hole above low RAM.
    pub fn new(functions: &'a [Function], low_ram_end: u64) -> Self {
        Self {
            functions,
            low_ram_end,
            next: None,
        }
    }

    fn take(&mut self, size: u64) -> u64 {
        let next = self.next.unwrap_or_else(|| self.above_firmware());
        let address = next.next_multiple_of(size.max(4096));
        if address + size > WINDOW_END {
            fail("no-room-for-bar", size, address, Text::new("pci"));
        }
        self.next = Some(address + size);
        address
    }

    /// Above the highest BAR that firmware placed in the hole.
    fn above_firmware(&self) -> u64 {
        // A BAR's size is not known without asking; no device here has more than this.
        const LARGEST: u64 = 16 << 20;
        let bars = self.functions.iter().flat_map(|function| {
            (0..6).map(|index| u64::from(function.read32(reg::BAR0 + index * 4) & !0xf))
        });
        bars.filter(|bar| (WINDOW_START..WINDOW_END).contains(bar))
            .map(|bar| bar + LARGEST)
            .fold(WINDOW_START.max(self.low_ram_end), u64::max)
    }
}

/// All functions on bus 0 and behind bridges that have a bus number.
///
/// `given` is the ECAM's address where ACPI does not name one (0: there is none).
pub fn scan(tables: &Tables, given: u64) -> Vec<Function> {
    let given = Ecam {
        base: given,
        first_bus: 0,
        last_bus: 0,
    };
    let ecam = tables.ecam().or((given.base != 0).then_some(given));
    if let Some(ecam) = ecam {
        let buses = u64::from(ecam.last_bus.saturating_sub(ecam.first_bus)) + 1;
        paging::map(ecam.base + (u64::from(ecam.first_bus) << 20), buses << 20);
    }
    let access = ecam.map_or(Access::Ports, Access::Memory);
    let mut functions = Vec::new();
    let mut buses = Vec::from([ecam.map_or(0, |ecam| ecam.first_bus)]);
    let mut next = 0;
    while let Some(&bus) = buses.get(next) {
        next += 1;
        scan_bus(access, bus, &mut functions, &mut buses);
    }
    functions
}

fn scan_bus(access: Access, bus: u8, functions: &mut Vec<Function>, buses: &mut Vec<u8>) {
    const MULTI_FUNCTION: u8 = 0x80;
    const BRIDGE: u8 = 1;
    for device in 0..32 {
        let mut count = 1;
        let mut number = 0;
        while number < count {
            let devfn = device << 3 | number;
            let probe = Function {
                access,
                bus,
                devfn,
                vendor: 0,
                device: 0,
            };
            let id = probe.read32(reg::ID);
            number += 1;
            if id as u16 == 0xffff {
                continue;
            }
            let header = probe.read8(reg::HEADER_TYPE);
            if header & MULTI_FUNCTION != 0 {
                count = 8;
            }
            if header & !MULTI_FUNCTION == BRIDGE {
                let secondary = probe.read8(reg::SECONDARY_BUS);
                if secondary > bus && !buses.contains(&secondary) {
                    buses.push(secondary);
                }
            }
            functions.push(Function {
                vendor: id as u16,
                device: (id >> 16) as u16,
                ..probe
            });
        }
    }
}
