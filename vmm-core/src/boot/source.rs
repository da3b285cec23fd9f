//! All that a machine boots from, and the loading of it.

use linux_loader::configurator;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::acpi::{AcpiConfig, AcpiError};
use super::firmware::FirmwareError;
use super::initrd::{Initrd, InitrdError};
use super::kernel::{Format, Kernel, KernelError};
use super::memory_map::{low_ram_end, memory_map};
use super::pvh::{self, START_INFO};
use super::registers::{BootMode, EntryPoint};
use super::zero_page::{self, ZERO_PAGE};
use crate::layout::HIGH_MEMORY;

/// Guest-physical address of the command line.
const COMMAND_LINE: u32 = 0x2_0000;
/// What there is room for, with the final zero.
const COMMAND_LINE_ROOM: u32 = 0x1_0000;

/// Why a machine cannot boot.
#[derive(Debug, Error)]
pub enum BootError {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initial RAM disk.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// The firmware.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// More than the kernel keeps.
    #[error("the kernel command line has {len} bytes, of which this kernel takes {max}")]
    CommandLineTooLong {
        /// Its length in bytes.
        len: usize,
        /// Longest that this kernel takes.
        max: u32,
    },
    /// The kernel would see only a part of it.
    #[error("the kernel command line has a zero byte at {position}")]
    CommandLineZero {
        /// Offset of that byte.
        position: usize,
    },
    /// Not even room for the tables.
    #[error("RAM below 4 GiB ends at {ram_end:#x}: give the machine more than 1 MiB")]
    TooLittleRam {
        /// End of the RAM that starts at 0.
        ram_end: u64,
    },
    /// The tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The structure that the boot protocol hands over.
    #[error("boot parameters cannot be written")]
    Parameters(#[source] configurator::Error),
    /// Another structure below 1 MiB.
    #[error("boot tables cannot be written")]
    Memory(#[from] GuestMemoryError),
}

/// A kernel with its command line and initrd, to be loaded as often as the machine starts.
#[derive(Debug)]
pub struct BootSource {
    kernel: Kernel,
    initrd: Option<Initrd>,
    command_line: String,
}

impl BootSource {
    /// Puts together what a machine boots from.
    ///
    /// # Errors
    /// The command line is longer than the kernel takes, or has a zero byte in it.
    pub fn new(
        kernel: Kernel,
        initrd: Option<Initrd>,
        command_line: &str,
    ) -> Result<Self, BootError> {
        let max = kernel.command_line_max().min(COMMAND_LINE_ROOM - 1);
        let len = command_line.len();
        if u32::try_from(len).map_or(true, |len| len > max) {
            return Err(BootError::CommandLineTooLong { len, max });
        }
        if let Some(position) = command_line.bytes().position(|b| b == 0) {
            return Err(BootError::CommandLineZero { position });
        }
        Ok(Self {
            kernel,
            initrd,
            command_line: command_line.to_owned(),
        })
    }

    /// Fills guest memory for a start of the machine, whatever is there now, and says
    /// where its first vCPU begins.
    ///
    /// # Errors
    /// An image does not fit into RAM, or can no longer be read.
    pub fn load(
        &self,
        memory: &GuestMemoryMmap<()>,
        acpi: &AcpiConfig,
    ) -> Result<EntryPoint, BootError> {
        let ram_end = low_ram_end(memory);
        if ram_end <= HIGH_MEMORY {
            return Err(BootError::TooLittleRam { ram_end });
        }
        self.kernel.load(memory, ram_end)?;
        let initrd = match &self.initrd {
            Some(initrd) => {
                let high = ram_end.min(self.kernel.initrd_address_max().saturating_add(1));
                Some(initrd.load(memory, self.kernel.end()..high)?)
            }
            None => None,
        };
        self.write_command_line(memory)?;
        acpi.write(memory)?;
        let map = memory_map(memory);
        let entry = match self.kernel.format() {
            Format::Elf(kernel) => {
                pvh::write(memory, COMMAND_LINE.into(), initrd.as_ref(), &map)
                    .map_err(BootError::Parameters)?;
                EntryPoint {
                    rip: kernel.entry(),
                    mode: BootMode::Pvh32,
                    parameters: START_INFO,
                }
            }
            Format::BzImage(kernel) => {
                zero_page::write(memory, kernel, COMMAND_LINE, initrd.as_ref(), &map)
                    .map_err(BootError::Parameters)?;
                EntryPoint {
                    rip: kernel.entry(),
                    mode: BootMode::Long64,
                    parameters: ZERO_PAGE,
                }
            }
        };
        entry.write_tables(memory)?;
        Ok(entry)
    }

    fn write_command_line(&self, memory: &GuestMemoryMmap<()>) -> Result<(), GuestMemoryError> {
        let mut bytes = self.command_line.clone().into_bytes();
        bytes.push(0);
        memory.write_slice(&bytes, GuestAddress(COMMAND_LINE.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{BzFile, ElfImage, bzimage, elf, file, memory};

    fn acpi() -> AcpiConfig {
        AcpiConfig {
            apic_ids: vec![0, 1],
            mmio64: None,
        }
    }

    fn source(kernel: &[u8], initrd: Option<&[u8]>, command_line: &str) -> BootSource {
        let kernel = Kernel::from_file("k", file(kernel)).unwrap();
        let initrd = initrd.map(|bytes| Initrd::from_file("i", file(bytes)).unwrap());
        BootSource::new(kernel, initrd, command_line).unwrap()
    }

    fn text(memory: &GuestMemoryMmap<()>, address: u64, len: usize) -> String {
        let mut bytes = vec![0; len];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn an_elf_kernel_starts_by_pvh() {
        let memory = memory(4);
        let source = source(&elf(&ElfImage::default()), Some(b"cpio"), "a=b");
        // Twice, as a reset does, over what the guest has left.
        for _ in 0..2 {
            let entry = source.load(&memory, &acpi()).unwrap();
            assert_eq!(entry.rip, 0x10_0010);
            assert_eq!(entry.mode, BootMode::Pvh32);
            assert_eq!(text(&memory, 0x2_0000, 4), "a=b\0");
            assert_eq!(text(&memory, 0x3f_f000, 4), "cpio");
            assert_eq!(text(&memory, 0xe_0000, 8), "RSD PTR ");
            memory
                .write_slice(&vec![0xee; 4 << 20], GuestAddress(0))
                .unwrap();
        }
    }

    #[test]
    fn a_bzimage_starts_in_64_bit_mode() {
        let memory = memory(4);
        let file = BzFile {
            initrd_addr_max: 0x30_0fff,
            ..BzFile::default()
        };
        let source = source(&bzimage(&file), Some(b"cpio"), "a=b");
        let entry = source.load(&memory, &acpi()).unwrap();
        assert_eq!(entry.rip, 0x20_0200);
        assert_eq!(entry.mode, BootMode::Long64);
        // As high as the kernel allows.
        assert_eq!(text(&memory, 0x30_0000, 4), "cpio");
    }

    #[test]
    fn an_image_that_shrank_is_an_error_at_the_next_start() {
        let memory = memory(4);
        for bytes in [elf(&ElfImage::default()), bzimage(&BzFile::default())] {
            let image = file(&bytes);
            let kernel = Kernel::from_file("k", image.try_clone().unwrap()).unwrap();
            let source = BootSource::new(kernel, None, "").unwrap();
            source.load(&memory, &acpi()).unwrap();
            image.set_len(bytes.len() as u64 - 1).unwrap();
            let error = source.load(&memory, &acpi()).unwrap_err();
            let said = error.to_string();
            assert!(
                said.starts_with("kernel k cannot be read at byte"),
                "{said}"
            );
            assert!(std::error::Error::source(&error).is_some());
        }
    }

    #[test]
    fn an_initrd_that_meets_the_kernel_is_refused() {
        let memory = memory(4);
        let big = vec![1; 0x18_1000];
        let source = source(&bzimage(&BzFile::default()), Some(&big), "");
        let error = source.load(&memory, &acpi()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "initrd i of 0x181000 bytes does not fit between the kernel's end at 0x280000 and 0x400000"
        );
    }

    #[test]
    fn command_lines_are_bounded_by_the_kernel() {
        let file_of = |cmdline_size| {
            bzimage(&BzFile {
                cmdline_size,
                ..BzFile::default()
            })
        };
        for (kernel, len, max) in [
            (file_of(7), 8, 7),
            (file_of(u32::MAX), 0x1_0000, 0xffff),
            (elf(&ElfImage::default()), 2048, 2047),
        ] {
            let open = || Kernel::from_file("k", file(&kernel)).unwrap();
            let error = BootSource::new(open(), None, &"x".repeat(len)).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "the kernel command line has {len} bytes, of which this kernel takes {max}"
                )
            );
            BootSource::new(open(), None, &"x".repeat(len - 1)).unwrap();
        }
        let kernel = Kernel::from_file("k", file(&elf(&ElfImage::default()))).unwrap();
        let error = BootSource::new(kernel, None, "a\0b").unwrap_err();
        assert!(error.to_string().ends_with("zero byte at 1"), "{error}");
    }

    #[test]
    fn a_machine_without_high_memory_is_refused() {
        let memory = memory(1);
        let error = source(&elf(&ElfImage::default()), None, "")
            .load(&memory, &acpi())
            .unwrap_err();
        assert!(error.to_string().contains("ends at 0x100000:"), "{error}");
    }
}
