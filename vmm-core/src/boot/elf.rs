//! ELF kernels with a PVH entry (Xen's "x86/HVM direct boot ABI").

use linux_loader::elf::{Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::image::{Image, clear};
use super::kernel::KernelProblem;
use crate::layout::{HIGH_MEMORY, LOW_RAM_END};

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
/// No kernel has more; a header that says so is damaged.
const MAX_SEGMENTS: u16 = 256;
/// Upper bound of what is read of a note segment.
const MAX_NOTES: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;

/// A part of the file and where it goes; inside of the file, and below 4 GiB.
#[derive(Debug)]
struct Segment {
    offset: u64,
    file_size: u64,
    address: u64,
    memory_size: u64,
}

/// A checked ELF kernel.
#[derive(Debug)]
pub(super) struct ElfKernel {
    segments: Vec<Segment>,
    entry: u64,
    end: u64,
}

impl ElfKernel {
    pub(super) fn parse(image: &Image) -> Result<Self, KernelProblem> {
        let header = header(image)?;
        let mut segments = Vec::new();
        let mut entry = None;
        for (index, program) in program_headers(image, &header)?.into_iter().enumerate() {
            if program.p_type == PT_LOAD && program.p_memsz > 0 {
                segments.push(segment(image, index, &program)?);
            } else if program.p_type == PT_NOTE && entry.is_none() {
                entry = pvh_entry(image, &program)?;
            }
        }
        let entry = entry.ok_or(KernelProblem::NoPvhEntry)?;
        if !segments
            .iter()
            .any(|s| (s.address..s.address + s.file_size).contains(&entry))
        {
            return Err(KernelProblem::PvhEntry { entry });
        }
        let end = segments
            .iter()
            .map(|s| s.address + s.memory_size)
            .max()
            .unwrap_or(HIGH_MEMORY);
        Ok(Self {
            segments,
            entry,
            end,
        })
    }

    /// Guest-physical address of the 32-bit entry.
    pub(super) fn entry(&self) -> u64 {
        self.entry
    }

    /// End of the last segment in memory.
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
                start: self.segments.iter().map(|s| s.address).min().unwrap_or(0),
                end: self.end.into(),
                ram_end,
            });
        }
        // All clearing first: the rest of one segment may lie over another.
        for s in &self.segments {
            clear(memory, s.address + s.file_size, s.memory_size - s.file_size)?;
        }
        for s in &self.segments {
            image.copy(memory, "a segment", s.offset, s.file_size, s.address)?;
        }
        Ok(())
    }
}

fn header(image: &Image) -> Result<Elf64_Ehdr, KernelProblem> {
    let mut header = Elf64_Ehdr::default();
    image.read("the ELF header", 0, header.as_mut_slice())?;
    let wrong = |field, value: u64, wanted| {
        Err(KernelProblem::ElfHeader {
            field,
            value,
            wanted,
        })
    };
    let [_, _, _, _, class, data, ..] = header.e_ident;
    if class != CLASS_64 {
        return wrong("class", class.into(), "2 (64-bit)");
    }
    if data != LITTLE_ENDIAN {
        return wrong("byte order", data.into(), "1 (little-endian)");
    }
    if header.e_machine != MACHINE_X86_64 {
        return wrong("e_machine", header.e_machine.into(), "0x3e (x86-64)");
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return wrong("e_phentsize", header.e_phentsize.into(), "0x38");
    }
    if header.e_phnum == 0 || header.e_phnum > MAX_SEGMENTS {
        return wrong("e_phnum", header.e_phnum.into(), "1 to 0x100");
    }
    Ok(header)
}

fn program_headers(image: &Image, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, KernelProblem> {
    let what = "the program header table";
    let size = size_of::<Elf64_Phdr>() as u64;
    image.check(what, header.e_phoff, size * u64::from(header.e_phnum))?;
    (0..u64::from(header.e_phnum))
        .map(|i| {
            let mut program = Elf64_Phdr::default();
            image.read(what, header.e_phoff + i * size, program.as_mut_slice())?;
            Ok(program)
        })
        .collect()
}

fn segment(image: &Image, index: usize, p: &Elf64_Phdr) -> Result<Segment, KernelProblem> {
    let wrong = |field, value, wanted| {
        Err(KernelProblem::ElfSegment {
            index,
            field,
            value,
            wanted,
        })
    };
    if p.p_filesz > p.p_memsz {
        return wrong("p_filesz", p.p_filesz, "it is more than p_memsz");
    }
    if p.p_paddr < HIGH_MEMORY {
        return wrong("p_paddr", p.p_paddr, "kernels start at 0x100000 or above");
    }
    if p.p_paddr
        .checked_add(p.p_memsz)
        .is_none_or(|end| end > LOW_RAM_END)
    {
        return wrong(
            "p_paddr",
            p.p_paddr,
            "with p_memsz it ends above 0xc0000000, where RAM ends",
        );
    }
    image.check("a segment", p.p_offset, p.p_filesz)?;
    Ok(Segment {
        offset: p.p_offset,
        file_size: p.p_filesz,
        address: p.p_paddr,
        memory_size: p.p_memsz,
    })
}

/// The entry in a note segment, if it has that note.
///
/// The address is written as 4 or as 8 bytes; it is below 4 GiB in both.
fn pvh_entry(image: &Image, p: &Elf64_Phdr) -> Result<Option<u64>, KernelProblem> {
    let what = "a note segment";
    image.check(what, p.p_offset, p.p_filesz)?;
    let mut notes = vec![0; usize::try_from(p.p_filesz.min(MAX_NOTES)).unwrap_or(0)];
    image.read(what, p.p_offset, &mut notes)?;
    let mut rest = notes.as_slice();
    // Fields are aligned to 4 bytes, whatever p_align says (Linux's elfnote.h).
    while let Some((head, after)) = rest.split_at_checked(size_of::<Elf64_Nhdr>()) {
        let mut note = Elf64_Nhdr::default();
        note.as_mut_slice().copy_from_slice(head);
        let Some((name, after)) = split(after, note.n_namesz) else {
            break;
        };
        let Some((descriptor, after)) = split(after, note.n_descsz) else {
            break;
        };
        if name == b"Xen\0" && note.n_type == PHYS32_ENTRY {
            return match *descriptor {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => {
                    Ok(Some(u32::from_le_bytes([a, b, c, d]).into()))
                }
                [a, b, c, d, e, f, g, h] => Err(KernelProblem::PvhEntry {
                    entry: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
                }),
                _ => Err(KernelProblem::PvhNote {
                    size: note.n_descsz,
                }),
            };
        }
        rest = after;
    }
    Ok(None)
}

/// `len` bytes, and what follows them and their padding.
fn split(bytes: &[u8], len: u32) -> Option<(&[u8], &[u8])> {
    let len = usize::try_from(len).ok()?;
    let (field, _) = bytes.split_at_checked(len)?;
    let padded = len.checked_next_multiple_of(4)?;
    Some((field, bytes.get(padded..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{ElfImage, elf, memory, parsed, refusal};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn both_sizes_of_the_note_give_the_entry() {
        for note in [&[0x10, 0, 0x10, 0][..], &[0x10, 0, 0x10, 0, 0, 0, 0, 0]] {
            let kernel = parsed(&elf(&ElfImage {
                note: note.to_vec(),
                ..ElfImage::default()
            }));
            assert_eq!(kernel.entry(), 0x10_0010);
            assert_eq!(kernel.end(), 0x10_3000);
        }
    }

    #[test]
    fn a_note_after_others_is_found() {
        let kernel = parsed(&elf(&ElfImage {
            other_notes: vec![
                (b"GNU\0".to_vec(), 18, vec![1; 5]),
                (b"Xen\0".to_vec(), 6, vec![]),
            ],
            ..ElfImage::default()
        }));
        assert_eq!(kernel.entry(), 0x10_0010);
    }

    #[test]
    fn wrong_notes_are_refused() {
        for (note, want) in [
            (vec![1; 3], "has a PVH entry note of 3 bytes"),
            (vec![0; 4], "has its PVH entry at 0x0,"),
            (vec![0, 0, 0x10, 0, 1, 0, 0, 0], "entry at 0x100100000,"),
        ] {
            let said = refusal(&elf(&ElfImage {
                note,
                ..ElfImage::default()
            }));
            assert!(said.contains(want), "{said}");
        }
        let said = refusal(&elf(&ElfImage {
            note_name: b"GNU\0".to_vec(),
            ..ElfImage::default()
        }));
        assert!(said.contains("without a PVH entry note"), "{said}");
    }

    #[test]
    fn wrong_header_fields_are_named_with_their_value() {
        for (offset, value, want) in [
            (4, 1, "class is 0x1"),
            (5, 2, "byte order is 0x2"),
            (18, 0xb7, "e_machine is 0xb7"),
            (54, 0x20, "e_phentsize is 0x20"),
            (56, 0, "e_phnum is 0x0"),
        ] {
            let mut bytes = elf(&ElfImage::default());
            bytes[offset] = value;
            let said = refusal(&bytes);
            assert!(said.contains(want), "{said}");
        }
    }

    #[test]
    fn wrong_segments_are_named_with_their_value() {
        for (image, want) in [
            (
                ElfImage {
                    address: 0xf_f000,
                    ..ElfImage::default()
                },
                "segment 0 whose p_paddr 0xff000",
            ),
            (
                ElfImage {
                    memory_size: 1,
                    ..ElfImage::default()
                },
                "segment 0 whose p_filesz",
            ),
            (
                ElfImage {
                    memory_size: u64::MAX,
                    ..ElfImage::default()
                },
                "segment 0 whose p_paddr 0x100000",
            ),
            (
                ElfImage {
                    address: 0xbfff_f000,
                    ..ElfImage::default()
                },
                "segment 0 whose p_paddr 0xbffff000",
            ),
        ] {
            let said = refusal(&elf(&image));
            assert!(said.contains(want), "{said}");
        }
    }

    #[test]
    fn loading_again_clears_what_the_guest_left() {
        let bytes = elf(&ElfImage::default());
        let image = crate::boot::testing::image(&bytes);
        let kernel = ElfKernel::parse(&image).unwrap();
        let memory = memory(4);
        for _ in 0..2 {
            kernel.load(&image, &memory, 4 << 20).unwrap();
            let mut loaded = vec![0; 0x3000];
            memory
                .read_slice(&mut loaded, GuestAddress(0x10_0000))
                .unwrap();
            let code = ElfImage::default().code;
            assert_eq!(loaded[..code.len()], code);
            assert!(loaded[code.len()..].iter().all(|&b| b == 0));
            memory
                .write_slice(&[0xee; 0x3000], GuestAddress(0x10_0000))
                .unwrap();
        }
    }

    #[test]
    fn a_kernel_bigger_than_ram_says_both_sizes() {
        let bytes = elf(&ElfImage {
            memory_size: 4 << 20,
            ..ElfImage::default()
        });
        let image = crate::boot::testing::image(&bytes);
        let kernel = ElfKernel::parse(&image).unwrap();
        let error = kernel.load(&image, &memory(4), 4 << 20).unwrap_err();
        assert_eq!(
            error.to_string(),
            "needs RAM at 0x100000..0x500000, but RAM below 4 GiB ends at 0x400000"
        );
    }
}
