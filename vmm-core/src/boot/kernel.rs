//! A kernel image of either format.

use std::fs::File;
use std::path::Path;

use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use super::bzimage::BzImage;
use super::elf::ElfKernel;
use super::image::{FileError, Image, ImageError};

/// Longest command line, without its final zero, that a Linux kernel keeps
/// (`COMMAND_LINE_SIZE` of x86); PVH has no field for it.
const PVH_COMMAND_LINE: u32 = 2047;

/// Why a file is no kernel that can be started, or not in this machine.
pub type KernelError = FileError<KernelProblem>;

/// What is wrong with a kernel.
#[derive(Debug, Error)]
pub enum KernelProblem {
    /// The file itself.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Neither format.
    #[error(
        "is {found}: give a bzImage (vmlinuz), or an ELF file with a PVH entry \
         (vmlinux built with CONFIG_PVH)"
    )]
    NotAKernel {
        /// What it looks like.
        found: String,
    },
    /// An ELF header field that no x86-64 executable has.
    #[error("is an ELF file whose {field} is {value:#x}; wanted is {wanted}")]
    ElfHeader {
        /// The field's name in the ELF specification.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it should be.
        wanted: &'static str,
    },
    /// An ELF segment that cannot be what it says.
    #[error("has a segment {index} whose {field} {value:#x} is wrong: {wanted}")]
    ElfSegment {
        /// Number of the program header.
        index: usize,
        /// The field's name in the ELF specification.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it should be.
        wanted: &'static str,
    },
    /// An ELF file without an entry for us.
    #[error(
        "is an ELF file without a PVH entry note (Xen, type 18): \
         build it with CONFIG_PVH, or give its bzImage"
    )]
    NoPvhEntry,
    /// The PVH entry is not in what is loaded.
    #[error("has its PVH entry at {entry:#x}, where it loads nothing")]
    PvhEntry {
        /// Guest-physical address.
        entry: u64,
    },
    /// The note's address has a size that no address has.
    #[error("has a PVH entry note of {size} bytes; wanted are 4 or 8")]
    PvhNote {
        /// Size of the descriptor in bytes.
        size: u32,
    },
    /// A bzImage that cannot be started in 64-bit mode, or not at all.
    #[error("is a bzImage whose {field} is {value:#x}; wanted is {wanted}")]
    SetupHeader {
        /// The field's name in Linux's boot protocol.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it should be.
        wanted: &'static str,
    },
    /// The machine has too little RAM.
    #[error("needs RAM at {start:#x}..{end:#x}, but RAM below 4 GiB ends at {ram_end:#x}")]
    TooBig {
        /// First address needed.
        start: u64,
        /// First address no longer needed.
        end: u128,
        /// End of the RAM that starts at 0.
        ram_end: u64,
    },
}

#[derive(Debug)]
pub(super) enum Format {
    Elf(ElfKernel),
    BzImage(BzImage),
}

/// A checked kernel image, to be loaded as often as the machine starts.
#[derive(Debug)]
pub struct Kernel {
    name: String,
    image: Image,
    format: Format,
}

impl Kernel {
    /// Opens and checks the kernel at `path`.
    ///
    /// # Errors
    /// The file cannot be read, is neither a bzImage with a 64-bit entry (boot protocol
    /// 2.12 or later) nor an x86-64 ELF file with a PVH entry, or contradicts itself.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        Self::new(path.display().to_string(), Image::open(path))
    }

    /// Checks the kernel in an open file; `name` stands for it in errors.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_file(name: &str, file: File) -> Result<Self, KernelError> {
        Self::new(name.to_owned(), Image::from_file(file))
    }

    fn new(name: String, image: Result<Image, ImageError>) -> Result<Self, KernelError> {
        let check = || -> Result<(Image, Format), KernelProblem> {
            let image = image?;
            let format = detect(&image)?;
            Ok((image, format))
        };
        match check() {
            Ok((image, format)) => Ok(Self {
                name,
                image,
                format,
            }),
            Err(problem) => Err(FileError::new("kernel", name, problem)),
        }
    }

    pub(super) fn format(&self) -> &Format {
        &self.format
    }

    /// Longest command line in bytes, without a final zero.
    pub(super) fn command_line_max(&self) -> u32 {
        match &self.format {
            Format::Elf(_) => PVH_COMMAND_LINE,
            Format::BzImage(kernel) => kernel.header().cmdline_size,
        }
    }

    /// Highest address that a byte of the initrd may have.
    pub(super) fn initrd_address_max(&self) -> u64 {
        match &self.format {
            Format::Elf(_) => u64::from(u32::MAX),
            Format::BzImage(kernel) => kernel.header().initrd_addr_max.into(),
        }
    }

    /// End of the memory that the kernel occupies before it has read its memory map.
    pub(super) fn end(&self) -> u64 {
        match &self.format {
            Format::Elf(kernel) => kernel.end(),
            Format::BzImage(kernel) => kernel.end(),
        }
    }

    /// Copies the kernel into RAM, which reaches from 0 to `ram_end`.
    pub(super) fn load(
        &self,
        memory: &GuestMemoryMmap<()>,
        ram_end: u64,
    ) -> Result<(), KernelError> {
        let loaded = match &self.format {
            Format::Elf(kernel) => kernel.load(&self.image, memory, ram_end),
            Format::BzImage(kernel) => kernel.load(&self.image, memory, ram_end),
        };
        loaded.map_err(|problem| FileError::new("kernel", self.name.clone(), problem))
    }
}

fn detect(image: &Image) -> Result<Format, KernelProblem> {
    let mut start = [0; 4];
    let known = usize::try_from(image.size()).map_or(4, |size| size.min(4));
    image.read("its first bytes", 0, &mut start[..known])?;
    if &start == b"\x7fELF" {
        return ElfKernel::parse(image).map(Format::Elf);
    }
    if BzImage::is_one(image)? {
        return BzImage::parse(image).map(Format::BzImage);
    }
    let found = match start {
        _ if image.size() == 0 => "empty".to_owned(),
        [0x1f, 0x8b, ..] => "a gzip file".to_owned(),
        [0xfd, b'7', b'z', b'X'] => "an xz file".to_owned(),
        [0x28, 0xb5, 0x2f, 0xfd] => "a zstd file".to_owned(),
        [b'Q', b'F', b'I', 0xfb] => "a qcow2 disk image".to_owned(),
        [b'M', b'Z', ..] => "a PE program without Linux's setup header".to_owned(),
        [b'#', b'!', ..] => "a script".to_owned(),
        [a, b, c, d] => format!("no kernel (it starts with {a:02x} {b:02x} {c:02x} {d:02x})"),
    };
    Err(KernelProblem::NotAKernel { found })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{file, refusal};

    #[test]
    fn what_is_no_kernel_is_named() {
        for (bytes, found) in [
            (&b""[..], "is empty:"),
            (b"\x1f\x8b\x08", "is a gzip file:"),
            (b"QFI\xfb....", "is a qcow2 disk image:"),
            (b"\xde\xad", "is no kernel (it starts with de ad 00 00):"),
            (&[0; 4096], "is no kernel (it starts with 00 00 00 00):"),
        ] {
            let said = refusal(bytes);
            assert!(said.starts_with("kernel k "), "{said}");
            assert!(said.contains(found), "{said}");
            assert!(said.contains("give a bzImage"), "{said}");
        }
    }

    #[test]
    fn a_missing_file_is_named_with_its_cause() {
        let error = Kernel::open(Path::new("/nowhere/vmlinuz")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "kernel /nowhere/vmlinuz cannot be opened"
        );
        let cause = std::error::Error::source(&error).unwrap();
        assert!(cause.to_string().contains("No such file"), "{cause}");
    }

    #[test]
    fn a_script_is_no_kernel() {
        let error = Kernel::from_file("k", file(b"#!/bin/sh\n")).unwrap_err();
        assert!(error.to_string().contains("is a script:"), "{error}");
    }
}
