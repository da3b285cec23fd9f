//! The tables for a firmware, by QEMU's linker and loader: files with the tables, and a script by
//! which the firmware allocates memory for them, adds the addresses where they came to lie to the
//! offsets in them, and makes their checksums right (QEMU's `bios-linker-loader.c`).

use super::{ALIGNMENT, Tables};
use crate::layout::RSDP;

/// Names of the files, which the script refers to.
const ROOT: &str = "etc/acpi/rsdp";
const TABLES: &str = "etc/acpi/tables";
const SCRIPT: &str = "etc/table-loader";

const COMMAND_SIZE: usize = 128;
const NAME_SIZE: usize = 56;

const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;

/// Anywhere, or where a guest looks for the root pointer.
const ZONE_HIGH: u8 = 1;
const ZONE_FSEG: u8 = 2;
/// Of the root pointer (ACPI 6.5, 5.2.5.1).
const ROOT_ALIGNMENT: u32 = 16;

/// What a firmware is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirmwareTables {
    /// Names and contents of files.
    pub files: [(&'static str, Vec<u8>); 3],
}

/// A place in the image, in the file that has it.
fn place(at: usize) -> (&'static str, u32) {
    match at.checked_sub(ALIGNMENT) {
        Some(offset) => (TABLES, offset32(offset)),
        None => (ROOT, offset32(at)),
    }
}

/// The image is below 1 MiB.
fn offset32(offset: usize) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}

#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    fn command(&mut self, code: u32, names: &[&str], rest: &[&[u8]]) {
        let end = self.0.len() + COMMAND_SIZE;
        self.0.extend(code.to_le_bytes());
        for name in names {
            let name_end = self.0.len() + NAME_SIZE;
            self.0.extend(name.bytes());
            self.0.resize(name_end, 0);
        }
        for bytes in rest {
            self.0.extend(*bytes);
        }
        self.0.resize(end, 0);
    }

    fn allocate(&mut self, file: &str, alignment: u32, zone: u8) {
        self.command(ALLOCATE, &[file], &[&alignment.to_le_bytes(), &[zone]]);
    }
}

/// Takes them apart. All addresses are of tables, none of the root pointer.
pub(super) fn split(tables: &Tables) -> FirmwareTables {
    let mut image = tables.image.clone();
    let mut script = Script::default();
    script.allocate(TABLES, offset32(ALIGNMENT), ZONE_HIGH);
    script.allocate(ROOT, ROOT_ALIGNMENT, ZONE_FSEG);
    for table in &tables.addressed {
        for &(at, size) in &table.addresses {
            let field = &mut image[at..at + usize::from(size)];
            let mut address = [0; 8];
            address[..field.len()].copy_from_slice(field);
            let offset = u64::from_le_bytes(address) - FIRST_TABLE;
            field.copy_from_slice(&offset.to_le_bytes()[..field.len()]);
            let (file, offset) = place(at);
            let names = [file, TABLES];
            script.command(ADD_POINTER, &names, &[&offset.to_le_bytes(), &[size]]);
        }
    }
    for table in &tables.addressed {
        // It is what makes the sum zero.
        image[table.checksum] = 0;
        let (file, start) = place(table.table.start);
        let (_, at) = place(table.checksum);
        let length = offset32(table.table.len());
        let numbers = [at, start, length].map(u32::to_le_bytes);
        script.command(ADD_CHECKSUM, &[file], &numbers.each_ref().map(|n| &n[..]));
    }
    let rest = image.split_off(ALIGNMENT);
    FirmwareTables {
        files: [(ROOT, image), (TABLES, rest), (SCRIPT, script.0)],
    }
}

/// Address of the first byte behind the root pointer.
const FIRST_TABLE: u64 = RSDP + ALIGNMENT as u64;

#[cfg(test)]
mod tests {
    use super::super::AcpiConfig;
    use super::*;

    fn word(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn name(bytes: &[u8]) -> String {
        let text = bytes[..NAME_SIZE].split(|byte| *byte == 0).next().unwrap();
        String::from_utf8(text.to_vec()).unwrap()
    }

    /// A firmware that finds places for both files, as one image that begins at [`RSDP`] would
    /// have been made.
    fn load(given: &FirmwareTables, root_at: u64, tables_at: u64) -> (Vec<u8>, Vec<u8>) {
        let [(_, root), (_, tables), (_, script)] = given.files.clone();
        let mut files = [(ROOT, root, root_at), (TABLES, tables, tables_at)];
        let find = |wanted: String| [ROOT, TABLES].iter().position(|n| *n == wanted).unwrap();
        for command in script.chunks(COMMAND_SIZE) {
            let args = &command[4..];
            let file = find(name(args));
            match u32::from(command[0]) {
                ALLOCATE => {
                    let at = usize::try_from(files[file].2).unwrap();
                    assert_eq!(at % word(args, NAME_SIZE), 0);
                }
                ADD_POINTER => {
                    let base = files[find(name(&args[NAME_SIZE..]))].2;
                    let at = word(args, 2 * NAME_SIZE);
                    let size = usize::from(args[2 * NAME_SIZE + 4]);
                    let field = &mut files[file].1[at..at + size];
                    let mut value = [0; 8];
                    value[..size].copy_from_slice(field);
                    let value = u64::from_le_bytes(value) + base;
                    field.copy_from_slice(&value.to_le_bytes()[..size]);
                }
                ADD_CHECKSUM => {
                    let [at, start, length] = [0, 4, 8].map(|i| word(args, NAME_SIZE + i));
                    let bytes = &mut files[file].1;
                    let sum = bytes[start..start + length]
                        .iter()
                        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
                    bytes[at] = bytes[at].wrapping_sub(sum);
                }
                other => panic!("command {other}"),
            }
        }
        let [(_, root, _), (_, tables, _)] = files;
        (root, tables)
    }

    #[test]
    fn a_firmware_gets_what_a_kernel_gets() {
        let config = AcpiConfig {
            apic_ids: vec![0, 1, 2],
            mmio64: None,
        };
        let given = config.for_firmware().unwrap();
        let (root, tables) = load(&given, RSDP, FIRST_TABLE);
        assert_eq!([root, tables].concat(), config.tables().unwrap().image);
        // And elsewhere it is right as well.
        let (root, tables) = load(&given, 0xf_5000, 0x7fe_0000);
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b));
        assert_eq!((sum(&root[..20]), sum(&root[..36])), (0, 0));
        let xsdt = word(&root, 24) - 0x7fe_0000;
        for entry in (xsdt + 36..xsdt + word(&tables, xsdt + 4)).step_by(8) {
            let table = word(&tables, entry) - 0x7fe_0000;
            assert_eq!(sum(&tables[table..table + word(&tables, table + 4)]), 0);
        }
    }
}
