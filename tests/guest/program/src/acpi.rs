//! The ACPI tables: CPUs (MADT), PCI configuration space (MCFG), power (FADT).
//!
//! No AML is interpreted; what only AML says comes by the command line (`slp_typ`).

use crate::mmio;
use alloc::vec::Vec;

const MAX_TABLE: u64 = 1 << 20;

/// The tables that the root table names.
pub struct Tables(Vec<Table>);

#[derive(Clone, Copy)]
struct Table {
    signature: [u8; 4],
    address: u64,
    length: u64,
}

/// A register wherever ACPI puts it (Generic Address Structure).
#[derive(Clone, Copy, Debug)]
pub enum Register {
    Memory(u64),
    Port(u16),
}

/// The fixed hardware that turns the machine off or resets it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Power {
    /// PM1a control: sleep type in bits 10–12, enable in bit 13.
    pub pm1a_control: Option<Register>,
    /// Sleep control of hardware-reduced machines: type in bits 2–4, enable in bit 5.
    pub sleep_control: Option<Register>,
    /// Reset register and the value to write.
    pub reset: Option<(Register, u8)>,
}

/// PCI Express configuration space in memory.
#[derive(Clone, Copy, Debug)]
pub struct Ecam {
    /// Address of bus 0, even if the first bus is another.
    pub base: u64,
    pub first_bus: u8,
    pub last_bus: u8,
}

impl Tables {
    /// Follows the root pointer, or looks for it where a BIOS leaves it. No root: no tables.
    pub fn find(rsdp: Option<u64>) -> Self {
        let mut tables = Vec::new();
        if let Some(rsdp) = rsdp.filter(|&at| is_rsdp(at)).or_else(search_rsdp) {
            let (root, entry_size) =
                if mmio::read::<u8>(rsdp + 15) >= 2 && mmio::read::<u64>(rsdp + 24) != 0 {
                    (mmio::read::<u64>(rsdp + 24), 8)
                } else {
                    (mmio::read::<u32>(rsdp + 16).into(), 4)
                };
            let root = Table::at(root);
            for entry in (root.address + 36..root.address + root.length).step_by(entry_size) {
                let address = if entry_size == 8 {
                    mmio::read::<u64>(entry)
                } else {
                    mmio::read::<u32>(entry).into()
                };
                if address != 0 {
                    tables.push(Table::at(address));
                }
            }
        }
        Self(tables)
    }

    fn get(&self, signature: &[u8; 4]) -> Option<Table> {
        self.0
            .iter()
            .find(|table| &table.signature == signature)
            .copied()
    }

    /// APIC ids of all usable CPUs, in the MADT's order.
    pub fn apic_ids(&self) -> Vec<u32> {
        const ENABLED: u32 = 1;
        let mut ids = Vec::new();
        let Some(madt) = self.get(b"APIC") else {
            return ids;
        };
        let mut entry = madt.address + 44;
        while entry + 2 <= madt.address + madt.length {
            let (kind, length) = (mmio::read::<u8>(entry), mmio::read::<u8>(entry + 1));
            match kind {
                0 if mmio::read::<u32>(entry + 4) & ENABLED != 0 => {
                    ids.push(mmio::read::<u8>(entry + 3).into())
                }
                9 if mmio::read::<u32>(entry + 8) & ENABLED != 0 => ids.push(mmio::read(entry + 4)),
                _ => {}
            }
            entry += u64::from(length.max(2));
        }
        ids
    }

    /// Configuration space of segment 0.
    pub fn ecam(&self) -> Option<Ecam> {
        let mcfg = self.get(b"MCFG")?;
        (mcfg.address + 44..mcfg.address + mcfg.length)
            .step_by(16)
            .find(|&entry| mmio::read::<u16>(entry + 8) == 0)
            .map(|entry| Ecam {
                base: mmio::read(entry),
                first_bus: mmio::read(entry + 10),
                last_bus: mmio::read(entry + 11),
            })
    }

    /// Where power is controlled.
    pub fn power(&self) -> Power {
        const RESET_REG_SUP: u32 = 1 << 10;
        const HW_REDUCED_ACPI: u32 = 1 << 20;
        let Some(fadt) = self.get(b"FACP") else {
            return Power::default();
        };
        let flags: u32 = fadt.field(112).unwrap_or(0);
        let pm1a = fadt.register(172).or_else(|| {
            let port: u32 = fadt.field(64)?;
            Some(Register::Port(
                u16::try_from(port).ok().filter(|&port| port != 0)?,
            ))
        });
        Power {
            pm1a_control: pm1a.filter(|_| flags & HW_REDUCED_ACPI == 0),
            sleep_control: fadt.register(244),
            reset: fadt
                .register(116)
                .filter(|_| flags & RESET_REG_SUP != 0)
                .zip(fadt.field(128)),
        }
    }
}

impl Table {
    fn at(address: u64) -> Self {
        Self {
            signature: mmio::read::<u32>(address).to_le_bytes(),
            address,
            length: u64::from(mmio::read::<u32>(address + 4)).min(MAX_TABLE),
        }
    }

    fn field<T: mmio::Word>(&self, offset: u64) -> Option<T> {
        (offset + size_of::<T>() as u64 <= self.length).then(|| mmio::read(self.address + offset))
    }

    /// A Generic Address Structure; `None` if it is empty or in a space that is not handled.
    fn register(&self, offset: u64) -> Option<Register> {
        let address: u64 = self.field(offset + 4)?;
        match self.field::<u8>(offset)? {
            0 if address != 0 => Some(Register::Memory(address)),
            1 if address != 0 => Some(Register::Port(u16::try_from(address).ok()?)),
            _ => None,
        }
    }
}

fn is_rsdp(address: u64) -> bool {
    mmio::read::<u64>(address).to_le_bytes() == *b"RSD PTR "
}

fn search_rsdp() -> Option<u64> {
    (0xe_0000..0x10_0000)
        .step_by(16)
        .find(|&address| is_rsdp(address))
}
