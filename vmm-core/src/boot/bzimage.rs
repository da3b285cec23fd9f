//! Linux bzImages, entered in 64-bit mode (Linux's Documentation/arch/x86/boot.rst).

use linux_loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::image::Image;
use super::kernel::KernelProblem;
use crate::layout::{HIGH_MEMORY, LOW_RAM_END};

/// Where the setup header stands in the file, and in the zero page.
const HEADER: u64 = 0x1f1;
/// "HdrS", 0x11 bytes into the header.
const MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// The first version with `xloadflags`.
const VERSION_2_12: u16 = 0x020c;
/// `loadflags`: the protected-mode code is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: there is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// From the start of the protected-mode code to its 64-bit entry.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

/// A checked bzImage.
#[derive(Debug)]
pub(super) struct BzImage {
    header: setup_header,
    /// Protected-mode code in the file.
    offset: u64,
    size: u64,
    address: u64,
    end: u64,
}

impl BzImage {
    /// Whether the file has the marks of a bzImage.
    pub(super) fn is_one(image: &Image) -> Result<bool, KernelProblem> {
        let end = HEADER + size_of::<setup_header>() as u64;
        if image.size() < end {
            // Too short for the marks, or truncated right there.
            return Ok(false);
        }
        let header = read_header(image)?;
        Ok(header.boot_flag == BOOT_FLAG && header.header == MAGIC)
    }

    pub(super) fn parse(image: &Image) -> Result<Self, KernelProblem> {
        let header = read_header(image)?;
        let wrong = |field, value: u64, wanted| {
            Err(KernelProblem::SetupHeader {
                field,
                value,
                wanted,
            })
        };
        if header.version < VERSION_2_12 {
            return wrong("version", header.version.into(), "0x20c or later");
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return wrong("loadflags", header.loadflags.into(), "bit 0 (LOADED_HIGH)");
        }
        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return wrong(
                "xloadflags",
                header.xloadflags.into(),
                "bit 0 (XLF_KERNEL_64): a kernel for x86-64",
            );
        }
        let sectors = match header.setup_sects {
            0 => 4,
            n => u64::from(n),
        };
        let offset = (1 + sectors) * SECTOR;
        let code = u64::from(header.syssize) * 16;
        image.check("the protected-mode code", offset, code.max(ENTRY_64 + 1))?;
        let size = image.size() - offset;
        let address = header.pref_address;
        if address < HIGH_MEMORY {
            return wrong("pref_address", address, "0x100000 or above");
        }
        // The kernel unpacks itself within init_size from where it is loaded.
        let needed = size.max(header.init_size.into());
        let Some(end) = address
            .checked_add(needed)
            .filter(|&end| end <= LOW_RAM_END)
        else {
            return wrong(
                "pref_address",
                address,
                "low enough to end below 0xc0000000 with init_size",
            );
        };
        Ok(Self {
            header,
            offset,
            size,
            address,
            end,
        })
    }

    /// The header as it is in the file.
    pub(super) fn header(&self) -> &setup_header {
        &self.header
    }

    /// Guest-physical address of the protected-mode code.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Guest-physical address of the 64-bit entry.
    pub(super) fn entry(&self) -> u64 {
        self.address + ENTRY_64
    }

    /// End of what the kernel uses before it has read its memory map.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    pub(super) fn load(
        &self,
        image: &Image,
        memory: &GuestMemoryMmap<()>,
        ram_end: u64,
    ) -> Result<(), KernelProblem> {
        if self.end > ram_end {
            return Err(KernelProblem::TooBig {
                start: self.address,
                end: self.end.into(),
                ram_end,
            });
        }
        image.copy(memory, "the kernel", self.offset, self.size, self.address)?;
        Ok(())
    }
}

fn read_header(image: &Image) -> Result<setup_header, KernelProblem> {
    let mut header = setup_header::default();
    image.read("the setup header", HEADER, header.as_mut_slice())?;
    // The real header's length is in its jump instruction; fields beyond it are code.
    let known = (0x202 + u64::from(header.jump >> 8))
        .saturating_sub(HEADER)
        .min(size_of::<setup_header>() as u64);
    let known = usize::try_from(known).unwrap_or(0);
    if header.header == MAGIC
        && let Some(beyond) = header.as_mut_slice().get_mut(known..)
    {
        beyond.fill(0);
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{BzFile, bzimage, image, memory, refusal};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn a_minimal_image_is_taken_and_loaded() {
        let bytes = bzimage(&BzFile::default());
        let image = image(&bytes);
        assert!(BzImage::is_one(&image).unwrap());
        let kernel = BzImage::parse(&image).unwrap();
        assert_eq!(kernel.address(), 0x20_0000);
        assert_eq!(kernel.entry(), 0x20_0200);
        assert_eq!(kernel.end(), 0x28_0000);
        let memory = memory(4);
        kernel.load(&image, &memory, 4 << 20).unwrap();
        let mut loaded = vec![0; bytes.len() - 1024];
        memory
            .read_slice(&mut loaded, GuestAddress(0x20_0000))
            .unwrap();
        assert!(loaded == bytes[1024..]);
    }

    #[test]
    fn wrong_fields_are_named_with_their_value() {
        for (file, want) in [
            (
                BzFile {
                    version: 0x020b,
                    ..BzFile::default()
                },
                "version is 0x20b; wanted is 0x20c",
            ),
            (
                BzFile {
                    loadflags: 0,
                    ..BzFile::default()
                },
                "loadflags is 0x0",
            ),
            (
                BzFile {
                    xloadflags: 2,
                    ..BzFile::default()
                },
                "xloadflags is 0x2",
            ),
            (
                BzFile {
                    pref_address: 0xf_0000,
                    ..BzFile::default()
                },
                "pref_address is 0xf0000",
            ),
            (
                BzFile {
                    pref_address: u64::MAX,
                    ..BzFile::default()
                },
                "pref_address is 0xffffffffffffffff",
            ),
            (
                BzFile {
                    init_size: u32::MAX,
                    ..BzFile::default()
                },
                "pref_address is 0x200000",
            ),
        ] {
            let said = refusal(&bzimage(&file));
            assert!(said.contains(want), "{said}");
        }
    }

    #[test]
    fn a_truncated_image_says_where() {
        let bytes = bzimage(&BzFile::default());
        let said = refusal(&bytes[..bytes.len() - 1]);
        assert!(
            said.contains("is truncated: the protected-mode code ends at byte 0x1400"),
            "{said}"
        );
    }

    #[test]
    fn a_kernel_bigger_than_ram_says_both_sizes() {
        let image = image(&bzimage(&BzFile {
            init_size: 8 << 20,
            ..BzFile::default()
        }));
        let kernel = BzImage::parse(&image).unwrap();
        let error = kernel.load(&image, &memory(4), 4 << 20).unwrap_err();
        assert_eq!(
            error.to_string(),
            "needs RAM at 0x200000..0xa00000, but RAM below 4 GiB ends at 0x400000"
        );
    }

    #[test]
    fn what_follows_a_short_header_is_not_taken_for_fields() {
        let mut bytes = bzimage(&BzFile::default());
        let end = 0x202 + usize::from(bytes[0x201]);
        bytes[end..0x26c].fill(0xcc);
        let kernel = BzImage::parse(&image(&bytes)).unwrap();
        let offset = kernel.header().kernel_info_offset;
        assert_eq!(offset, 0);
    }
}
