//! The ACPI tables: what the guest learns of processors, interrupts, PCI and power.
//!
//! All tables stand behind the root pointer at [`crate::layout::RSDP`], which the guest
//! finds by a scan, from the zero page, or from PVH's start info:
//!
//! ```text
//! RSDP → XSDT ─→ FADT ─→ DSDT   devices: PCI root, serial port, clock, processors
//!             │      └→ FACS   the global lock, which nobody else takes
//!             ├→ MADT          local APICs, I/O APIC, overrides
//!             └→ MCFG          PCI configuration space
//! ```
//!
//! The machine has ACPI's *fixed hardware* ([`crate::platform::PowerManagement`]): it is
//! always in ACPI mode, with a power button and soft-off, without PM timer, general
//! purpose events and sleep states other than S5. There is no `_PRT`: no PCI device has
//! an interrupt pin.

mod dsdt;
mod fixed;
mod loader;
mod madt;

use std::ops::Range;

use acpi_tables::facs::FACS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, sdt::Sdt};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout::{ECAM, HIGH_MEMORY, RSDP};

pub use self::loader::FirmwareTables;

const OEM_ID: [u8; 6] = *b"GODWIT";
const OEM_TABLE_ID: [u8; 8] = *b"GODWITPC";
const OEM_REVISION: u32 = 1;

/// Tables start at multiples of this; the FACS must.
const ALIGNMENT: usize = 64;

/// The FACS is the first table behind the root pointer.
const FACS_ADDRESS: u32 = field32(RSDP + ALIGNMENT as u64);

/// `SLP_TYP` of the `\_S5` object: what a guest writes to PM1 control to power off.
pub const SLEEP_TYPE_S5: u8 = 0;

/// I/O APIC input to which the interrupt of the 8254 timer (ISA IRQ 0) goes, as on any
/// PC: interrupt routes have to lead GSI 0 there.
pub const TIMER_PIN: u32 = 2;

/// Processor devices have three hexadecimal digits in their names.
const MAX_CPUS: usize = 0x1000;

/// Why tables could not be made.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// There is no name for so many.
    #[error("ACPI tables cannot have {cpus} vCPUs, {MAX_CPUS} at most")]
    TooManyCpus {
        /// How many vCPUs they were to be for.
        cpus: usize,
    },
    /// They have no place below 1 MiB.
    #[error("ACPI tables for {cpus} vCPUs need {size:#x} bytes, of which {room:#x} are there")]
    TooBig {
        /// How many vCPUs they are for.
        cpus: usize,
        /// Their size in bytes.
        size: usize,
        /// What there is room for in bytes.
        room: u64,
    },
    /// An empty window, or one that wraps.
    #[error("the 64-bit PCI window {start:#x}..{end:#x} is empty")]
    Window {
        /// Its first address.
        start: u64,
        /// Its end.
        end: u64,
    },
    /// There is no RAM where they go.
    #[error("ACPI tables cannot be written")]
    Memory(#[from] GuestMemoryError),
}

/// What of the tables differs between machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// APIC id of each vCPU; the first one boots.
    pub apic_ids: Vec<u32>,
    /// Guest-physical addresses from which 64-bit BARs are given.
    pub mmio64: Option<Range<u64>>,
}

impl AcpiConfig {
    /// Writes the tables to [`crate::layout::RSDP`] and behind.
    ///
    /// # Errors
    /// The 64-bit window is empty, or the tables reach to 1 MiB.
    pub fn write(&self, memory: &GuestMemoryMmap<()>) -> Result<(), AcpiError> {
        let tables = self.tables()?;
        memory.write_slice(&tables.image, GuestAddress(RSDP))?;
        Ok(())
    }

    /// The tables for a firmware, which finds places for them itself.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn for_firmware(&self) -> Result<FirmwareTables, AcpiError> {
        Ok(loader::split(&self.tables()?))
    }

    /// All tables, as they stand from [`crate::layout::RSDP`] on.
    fn tables(&self) -> Result<Tables, AcpiError> {
        if let Some(Range { start, end }) = self.mmio64
            && start >= end
        {
            return Err(AcpiError::Window { start, end });
        }
        let cpus = self.apic_ids.len();
        if cpus > MAX_CPUS {
            return Err(AcpiError::TooManyCpus { cpus });
        }
        // The root pointer comes last, but stands first.
        let mut image = vec![0; ALIGNMENT];
        // At FACS_ADDRESS.
        append(&mut image, &FACS::new());
        let dsdt = append(&mut image, &dsdt::table(self));
        let fadt_at = image.len().next_multiple_of(ALIGNMENT);
        let fadt = append(&mut image, &fixed::table(FACS_ADDRESS, dsdt));
        let fadt_end = image.len();
        let entries = [
            fadt,
            append(&mut image, &madt::table(&self.apic_ids)),
            append(&mut image, &mcfg()),
        ];
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        for table in entries {
            xsdt.add_entry(table);
        }
        let xsdt_at = image.len().next_multiple_of(ALIGNMENT);
        let xsdt = append(&mut image, &xsdt);
        let mut root = Vec::new();
        Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut root);
        image[..root.len()].copy_from_slice(&root);
        let room = HIGH_MEMORY - RSDP;
        if image.len() as u64 > room {
            return Err(AcpiError::TooBig {
                cpus,
                size: image.len(),
                room,
            });
        }
        let fields = |at: usize, fields: &[(usize, u8)]| -> Vec<(usize, u8)> {
            fields
                .iter()
                .map(|(field, size)| (at + field, *size))
                .collect()
        };
        let xsdt_entries: Vec<_> = (0..entries.len()).map(|i| (HEADER + 8 * i, 8)).collect();
        Ok(Tables {
            addressed: vec![
                Addressed {
                    checksum: RSDP_CHECKSUM,
                    table: 0..root.len(),
                    addresses: vec![(RSDP_XSDT, 8)],
                },
                Addressed {
                    checksum: fadt_at + CHECKSUM,
                    table: fadt_at..fadt_end,
                    addresses: fields(fadt_at, &[(FADT_FACS, 4), (FADT_DSDT, 8)]),
                },
                Addressed {
                    checksum: xsdt_at + CHECKSUM,
                    table: xsdt_at..image.len(),
                    addresses: fields(xsdt_at, &xsdt_entries),
                },
            ],
            image,
        })
    }
}

/// Size of every table's header, and where its checksum is (ACPI 6.5, 5.2.6).
const HEADER: usize = 36;
const CHECKSUM: usize = 9;
/// Of the root pointer: the extended checksum and the XSDT's address (5.2.5.3).
const RSDP_CHECKSUM: usize = 32;
const RSDP_XSDT: usize = 24;
/// Of the FADT: `FIRMWARE_CTRL` and `X_DSDT` (5.2.9).
const FADT_FACS: usize = 36;
const FADT_DSDT: usize = 140;

/// The tables at [`crate::layout::RSDP`].
struct Tables {
    image: Vec<u8>,
    addressed: Vec<Addressed>,
}

/// A table with addresses of others in it; all places are in the image.
struct Addressed {
    table: Range<usize>,
    checksum: usize,
    /// Where addresses are, and their bytes.
    addresses: Vec<(usize, u8)>,
}

/// Appends a table at the next aligned address, which it returns.
fn append(image: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    image.resize(image.len().next_multiple_of(ALIGNMENT), 0);
    let address = RSDP + image.len() as u64;
    table.to_aml_bytes(image);
    address
}

/// PCI configuration space (PCI firmware specification 4.1.2).
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    mcfg
}

/// An address or number of [`crate::layout`] in a field of 32 bits; for constants, so
/// that one that does not fit is found by the compiler.
#[expect(clippy::cast_possible_truncation, reason = "asserted")]
const fn field32(value: u64) -> u32 {
    assert!(value <= u32::MAX as u64);
    value as u32
}

/// The same in 16 bits.
#[expect(clippy::cast_possible_truncation, reason = "asserted")]
const fn field16(value: u64) -> u16 {
    assert!(value <= u16::MAX as u64);
    value as u16
}

/// The same in 8 bits.
#[expect(clippy::cast_possible_truncation, reason = "asserted")]
const fn field8(value: u64) -> u8 {
    assert!(value <= u8::MAX as u64);
    value as u8
}

/// A table with a header of our own, for those that the library lacks or fixes too much.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(
        signature,
        field32(HEADER as u64),
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(cpus: u32) -> AcpiConfig {
        AcpiConfig {
            apic_ids: (0..cpus).collect(),
            mmio64: Some(0x100_0000_0000..0x200_0000_0000),
        }
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, &b| sum.wrapping_add(b))
    }

    /// The table at a guest-physical address, its checksum verified.
    fn table_at(image: &[u8], address: u64) -> &[u8] {
        let start = usize::try_from(address - RSDP).unwrap();
        let len = usize::try_from(u32_at(image, start + 4)).unwrap();
        let table = &image[start..start + len];
        assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        table
    }

    /// Finds a table as a guest does: from the root pointer by way of the XSDT.
    fn find<'a>(image: &'a [u8], signature: &[u8]) -> &'a [u8] {
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
        let xsdt = table_at(image, u64_at(image, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        xsdt[36..]
            .chunks_exact(8)
            .map(|entry| table_at(image, u64_at(entry, 0)))
            .find(|table| table.starts_with(signature))
            .unwrap()
    }

    #[test]
    fn the_fadt_describes_the_fixed_hardware() {
        let image = config(2).tables().unwrap().image;
        let fadt = find(&image, b"FACP");
        let facs = u64::from(u32_at(fadt, 36));
        assert_eq!(facs % 64, 0);
        let facs = &image[usize::try_from(facs - RSDP).unwrap()..];
        assert_eq!((&facs[..4], u32_at(facs, 4)), (&b"FACS"[..], 64));
        assert_eq!(&table_at(&image, u64_at(fadt, 140))[..4], b"DSDT");
        // SCI_INT, SMI_CMD, PM1a_EVT_BLK, PM1a_CNT_BLK, PM_TMR_BLK, lengths.
        assert_eq!((fadt[46], u32_at(fadt, 48)), (9, 0));
        assert_eq!((u32_at(fadt, 56), u32_at(fadt, 64)), (0x600, 0x604));
        assert_eq!((u32_at(fadt, 76), u32_at(fadt, 80)), (0, 0));
        assert_eq!(fadt[88..94], [4, 2, 0, 0, 0, 0]);
        // X_PM1a_EVT_BLK: I/O, 32 bits; X_PM1a_CNT_BLK: I/O, 16 bits.
        assert_eq!((fadt[148], fadt[149], u64_at(fadt, 152)), (1, 32, 0x600));
        assert_eq!((fadt[172], fadt[173], u64_at(fadt, 176)), (1, 16, 0x604));
        // CENTURY, and boot flags: legacy devices, no 8042, no VGA, no ASPM.
        assert_eq!((fadt[108], fadt[109], fadt[110]), (0x32, 0b1_0101, 0));
        let flags = u32_at(fadt, 112);
        assert_eq!(flags >> 4 & 1, 0, "power button is fixed hardware");
        assert_eq!(flags >> 5 & 1, 1, "there is no sleep button");
        assert_eq!(flags >> 10 & 1, 1, "RESET_REG_SUP");
        assert_eq!(flags >> 20 & 1, 0, "HW_REDUCED_ACPI");
        assert_eq!((fadt[116], fadt[117], u64_at(fadt, 120)), (1, 8, 0xcf9));
        assert_eq!(fadt[128], 6);
    }

    #[test]
    fn the_madt_has_every_processor_and_override() {
        let image = config(32).tables().unwrap().image;
        let madt = find(&image, b"APIC");
        assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
        let mut rest = &madt[44..];
        let mut entries = Vec::new();
        while let [kind, len, ..] = *rest {
            let (entry, after) = rest.split_at(len.into());
            entries.push((kind, entry));
            rest = after;
        }
        let of = |kind| -> Vec<_> {
            entries
                .iter()
                .filter(|e| e.0 == kind)
                .map(|e| e.1)
                .collect()
        };
        let apics: Vec<_> = of(0).iter().map(|e| (e[2], e[3], u32_at(e, 4))).collect();
        assert_eq!(apics, (0..32).map(|i| (i, i, 1)).collect::<Vec<_>>());
        let io: Vec<_> = of(1).iter().map(|e| (u32_at(e, 4), u32_at(e, 8))).collect();
        assert_eq!(io, [(0xfec0_0000, 0)]);
        let overrides: Vec<_> = of(2).iter().map(|e| (e[3], u32_at(e, 4), e[8])).collect();
        assert_eq!(overrides, [(0, 2, 0), (9, 9, 0b1101)]);
        assert_eq!(of(4), [[4, 6, 0xff, 0, 0, 1]]);
    }

    #[test]
    fn processors_beyond_the_local_apic_are_x2apics() {
        let config = AcpiConfig {
            apic_ids: vec![254, 255, 0x1234],
            mmio64: None,
        };
        let image = config.tables().unwrap().image;
        let madt = find(&image, b"APIC");
        assert_eq!(madt[44..52], [0, 8, 0, 254, 1, 0, 0, 0]);
        assert_eq!(
            madt[52..68],
            [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
        );
        assert_eq!(u32_at(madt, 72), 0x1234);
    }

    #[test]
    fn the_mcfg_has_bus_0() {
        let image = config(1).tables().unwrap().image;
        let mcfg = find(&image, b"MCFG");
        assert_eq!(mcfg.len(), 60);
        assert_eq!(u64_at(mcfg, 44), 0xe000_0000);
        assert_eq!(mcfg[52..56], [0, 0, 0, 0]);
    }

    #[test]
    fn tables_stay_below_1_mib() {
        let image = config(32).tables().unwrap().image;
        assert!(image.len() < 0x2_0000);
        for (cpus, want) in [
            (4096, "ACPI tables for 4096 vCPUs need"),
            (4097, "ACPI tables cannot have 4097 vCPUs, 4096 at most"),
        ] {
            let said = config(cpus).tables().map(drop).unwrap_err().to_string();
            assert!(said.starts_with(want), "{said}");
        }
    }

    #[test]
    fn an_empty_window_is_refused() {
        let config = AcpiConfig {
            apic_ids: vec![0],
            mmio64: Some(0x1000..0x1000),
        };
        let error = config.tables().map(drop).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the 64-bit PCI window 0x1000..0x1000 is empty"
        );
    }
}
