//! Firmware: an image that a processor starts in after a reset, as a BIOS.
//!
//! The machine has it in ROM, which ends at 4 GiB. Below 1 MiB, where a BIOS runs, there is a copy
//! of its end in RAM: what a chipset calls shadow RAM, already writable. A start makes that copy
//! anew, and takes it from the ROM, not from the file: a machine that came from elsewhere keeps
//! the firmware that it came with, whatever the file is here.

use std::fs::File;
use std::path::Path;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::image::{FileError, Image, ImageError};
use crate::layout::{HIGH_MEMORY, ROM};

const PAGE: u64 = 4096;
/// Bytes that are copied below 1 MiB: the largest BIOS that runs there.
const SHADOW: u64 = 256 << 10;

/// Why a firmware could not be used.
pub type FirmwareError = FileError<FirmwareProblem>;

/// What is wrong with a firmware.
#[derive(Debug, Error)]
pub enum FirmwareProblem {
    /// The file itself.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No ROM has such a size.
    #[error(
        "has {size} bytes: give an image of whole 4 KiB, at most {} MiB, that ends with the \
         processor's first instruction, as a SeaBIOS, U-Boot or OVMF build",
        (ROM.end - ROM.start) >> 20
    )]
    Size {
        /// Its size in bytes.
        size: u64,
    },
    /// The machine's memory.
    #[error("cannot be copied below 1 MiB")]
    Shadow(#[source] GuestMemoryError),
}

/// A firmware image.
#[derive(Debug)]
pub struct Firmware {
    name: String,
    image: Image,
}

impl Firmware {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// The file cannot be read, or is no image by its size.
    pub fn open(path: &Path) -> Result<Self, FirmwareError> {
        Self::new(path.display().to_string(), Image::open(path))
    }

    /// Takes the image in an open file; `name` stands for it in errors.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_file(name: &str, file: File) -> Result<Self, FirmwareError> {
        Self::new(name.to_owned(), Image::from_file(file))
    }

    fn new(name: String, image: Result<Image, ImageError>) -> Result<Self, FirmwareError> {
        let problem = match image {
            Ok(image) => match image.size() {
                size if size == 0 || !size.is_multiple_of(PAGE) || size > ROM.end - ROM.start => {
                    FirmwareProblem::Size { size }
                }
                _ => return Ok(Self { name, image }),
            },
            Err(problem) => problem.into(),
        };
        Err(FileError::new("firmware", name, problem))
    }

    /// Bytes of ROM that it needs.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Puts it into the ROM of a machine that is new.
    ///
    /// # Errors
    /// The file can no longer be read.
    pub fn fill_rom(&self, memory: &GuestMemoryMmap<()>) -> Result<(), FirmwareError> {
        let size = self.size();
        let copied = self.image.copy(memory, "the ROM", 0, size, ROM.end - size);
        copied.map_err(|problem| self.error(problem.into()))
    }

    /// Makes memory ready for a start of the machine, whose first vCPU begins where a processor
    /// does: copies the ROM's end below 1 MiB.
    ///
    /// # Errors
    /// There is no such memory.
    pub fn load(&self, memory: &GuestMemoryMmap<()>) -> Result<(), FirmwareError> {
        let size = self.size().min(SHADOW);
        let copy = || {
            let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
            memory.read_slice(&mut bytes, GuestAddress(ROM.end - size))?;
            memory.write_slice(&bytes, GuestAddress(HIGH_MEMORY - size))
        };
        copy().map_err(|error| self.error(FirmwareProblem::Shadow(error)))
    }

    fn error(&self, problem: FirmwareProblem) -> FirmwareError {
        FileError::new("firmware", self.name.clone(), problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::file;

    fn bytes(memory: &GuestMemoryMmap<()>, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn machine(rom: usize) -> GuestMemoryMmap<()> {
        let rom = (GuestAddress(ROM.end - rom as u64), rom);
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20), rom]).unwrap()
    }

    #[test]
    fn sizes_that_no_rom_has_are_refused() {
        let empty = tempfile::tempfile().unwrap();
        for (size, said) in [(0, "0"), (4095, "4095"), (16 << 20 | 4096, "16781312")] {
            empty.set_len(size).unwrap();
            let error = Firmware::from_file("f", empty.try_clone().unwrap()).unwrap_err();
            let said = format!(
                "firmware f has {said} bytes: give an image of whole 4 KiB, at most 16 MiB,"
            );
            assert!(error.to_string().starts_with(&said), "{error}");
        }
        empty.set_len(16 << 20).unwrap();
        assert_eq!(Firmware::from_file("f", empty).unwrap().size(), 16 << 20);
        let folder = Firmware::open(Path::new("/")).unwrap_err();
        assert_eq!(folder.to_string(), "firmware / is no regular file");
    }

    #[test]
    fn the_end_is_below_1_mib_at_each_start() {
        for (size, shadow) in [(0x1000_usize, 0x1000_usize), (0x5_0000, 0x4_0000)] {
            let image: Vec<u8> = (0..size)
                .map(|i| (i ^ (i / 251)).to_le_bytes()[0])
                .collect();
            let memory = machine(size);
            let firmware = Firmware::from_file("f", file(&image)).unwrap();
            firmware.fill_rom(&memory).unwrap();
            let rom = ROM.end - size as u64;
            assert_eq!(bytes(&memory, rom, size), image);
            for _ in 0..2 {
                firmware.load(&memory).unwrap();
                let low = HIGH_MEMORY - shadow as u64;
                assert_eq!(bytes(&memory, low, shadow), image[size - shadow..]);
                memory
                    .write_slice(&[0xee; 0x1000], GuestAddress(low))
                    .unwrap();
            }
        }
    }

    #[test]
    fn a_start_takes_what_is_in_the_rom() {
        let memory = machine(0x1000);
        let firmware = Firmware::from_file("f", file(&[1; 0x1000])).unwrap();
        memory
            .write_slice(&[2; 0x1000], GuestAddress(ROM.end - 0x1000))
            .unwrap();
        firmware.load(&memory).unwrap();
        assert_eq!(bytes(&memory, HIGH_MEMORY - 0x1000, 0x1000), [2; 0x1000]);
    }
}
