//! Kernel images made by hand, and hostile variants of them.

use std::fs::File;
use std::io::Write;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::acpi::AcpiConfig;
use super::elf::ElfKernel;
use super::image::Image;
use super::initrd::Initrd;
use super::kernel::Kernel;
use super::source::BootSource;

pub(super) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

pub(super) fn image(bytes: &[u8]) -> Image {
    Image::from_file(file(bytes)).unwrap()
}

/// RAM of so many MiB at 0.
pub(super) fn memory(mib: usize) -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
}

pub(super) fn parsed(elf: &[u8]) -> ElfKernel {
    ElfKernel::parse(&image(elf)).unwrap()
}

/// What is said of bytes that are no kernel.
pub(super) fn refusal(bytes: &[u8]) -> String {
    Kernel::from_file("k", file(bytes)).unwrap_err().to_string()
}

/// An ELF file of one loaded segment and one of notes.
pub(super) struct ElfImage {
    pub(super) address: u64,
    pub(super) memory_size: u64,
    pub(super) code: Vec<u8>,
    pub(super) note_name: Vec<u8>,
    pub(super) note: Vec<u8>,
    /// Name, type and descriptor of notes before the PVH note.
    pub(super) other_notes: Vec<(Vec<u8>, u32, Vec<u8>)>,
}

impl Default for ElfImage {
    fn default() -> Self {
        Self {
            address: 0x10_0000,
            memory_size: 0x3000,
            code: (0..0x800_u16).map(|i| i.to_le_bytes()[0] | 1).collect(),
            note_name: b"Xen\0".to_vec(),
            note: 0x10_0010_u64.to_le_bytes().to_vec(),
            other_notes: Vec::new(),
        }
    }
}

fn note(name: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_le_bytes();
    let mut note = [len(name), len(descriptor), kind.to_le_bytes()].concat();
    for field in [name, descriptor] {
        note.extend(field);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

pub(super) fn elf(image: &ElfImage) -> Vec<u8> {
    let mut notes: Vec<u8> = Vec::new();
    for (name, kind, descriptor) in &image.other_notes {
        notes.extend(note(name, *kind, descriptor));
    }
    notes.extend(note(&image.note_name, 18, &image.note));
    let notes_at = 64 + 2 * 56_u64;
    let code_at = notes_at + notes.len() as u64;
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend([2_u16, 62].iter().flat_map(|v| v.to_le_bytes()));
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend([0x10_0000_u64, 64, 0].iter().flat_map(|v| v.to_le_bytes()));
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(
        [64_u16, 56, 2, 64, 0, 0]
            .iter()
            .flat_map(|v| v.to_le_bytes()),
    );
    let program = |kind: u32, offset: u64, address: u64, file: u64, memory: u64| {
        let mut p = [kind.to_le_bytes(), 7_u32.to_le_bytes()].concat();
        let fields = [offset, address, address, file, memory, 4];
        p.extend(fields.iter().flat_map(|v| v.to_le_bytes()));
        p
    };
    let code_len = image.code.len() as u64;
    bytes.extend(program(
        1,
        code_at,
        image.address,
        code_len,
        image.memory_size,
    ));
    let notes_len = notes.len() as u64;
    bytes.extend(program(4, notes_at, 0, notes_len, notes_len));
    bytes.extend(notes);
    bytes.extend(&image.code);
    bytes
}

/// A bzImage of one setup sector.
pub(super) struct BzFile {
    pub(super) version: u16,
    pub(super) loadflags: u8,
    pub(super) xloadflags: u16,
    pub(super) pref_address: u64,
    pub(super) init_size: u32,
    pub(super) cmdline_size: u32,
    pub(super) initrd_addr_max: u32,
}

impl Default for BzFile {
    fn default() -> Self {
        Self {
            version: 0x020f,
            loadflags: 1,
            xloadflags: 1,
            pref_address: 0x20_0000,
            init_size: 0x8_0000,
            cmdline_size: 2047,
            initrd_addr_max: 0x7fff_ffff,
        }
    }
}

pub(super) fn bzimage(file: &BzFile) -> Vec<u8> {
    let code: Vec<u8> = (0..0x1000_u16).map(|i| i.to_le_bytes()[0] | 1).collect();
    let mut bytes = vec![0; 1024];
    let mut put = |offset: usize, value: &[u8]| {
        bytes[offset..offset + value.len()].copy_from_slice(value);
    };
    put(0, b"MZ");
    put(0x1f1, &[1]);
    put(
        0x1f4,
        &u32::try_from(code.len() / 16).unwrap().to_le_bytes(),
    );
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &file.version.to_le_bytes());
    put(0x211, &[file.loadflags]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22c, &file.initrd_addr_max.to_le_bytes());
    put(0x236, &file.xloadflags.to_le_bytes());
    put(0x238, &file.cmdline_size.to_le_bytes());
    put(0x258, &file.pref_address.to_le_bytes());
    put(0x260, &file.init_size.to_le_bytes());
    bytes.extend(code);
    bytes
}

/// Xorshift: the same bytes in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }
}

/// RAM of 2 MiB that is followed by a hole and by RAM where no kernel may be loaded.
fn memory_with_a_tail() -> GuestMemoryMmap<()> {
    let ranges = [(GuestAddress(0), 2 << 20), (GuestAddress(0xc0_0000), 4096)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    memory
        .write_slice(&[0x5a; 4096], GuestAddress(0xc0_0000))
        .unwrap();
    memory
}

/// Opens and loads what may be no kernel; whatever it is, there is no panic, and
/// nothing is written behind the low RAM. Whether it was loaded.
fn survives(bytes: &[u8], memory: &GuestMemoryMmap<()>) -> bool {
    let acpi = AcpiConfig {
        apic_ids: vec![0],
        mmio64: None,
    };
    let load = || {
        let kernel = Kernel::from_file("k", file(bytes)).ok()?;
        let initrd = Initrd::from_file("i", file(b"cpio")).ok()?;
        let source = BootSource::new(kernel, Some(initrd), "x").ok()?;
        source.load(memory, &acpi).ok()
    };
    let loaded = load().is_some();
    let mut tail = [0; 4096];
    memory
        .read_slice(&mut tail, GuestAddress(0xc0_0000))
        .unwrap();
    assert!(tail.iter().all(|&b| b == 0x5a));
    loaded
}

fn small_bzimage() -> Vec<u8> {
    bzimage(&BzFile {
        pref_address: 0x10_0000,
        init_size: 0x1_0000,
        ..BzFile::default()
    })
}

#[test]
fn images_truncated_anywhere_are_refused_when_opened() {
    let memory = memory_with_a_tail();
    for bytes in [elf(&ElfImage::default()), small_bzimage()] {
        assert!(survives(&bytes, &memory));
        for len in 0..bytes.len() {
            assert!(
                Kernel::from_file("k", file(&bytes[..len])).is_err(),
                "{len}"
            );
        }
    }
}

#[test]
fn images_with_flipped_bits_do_no_harm() {
    let memory = memory_with_a_tail();
    let mut random = Random(0x1234_5678_9abc_def1);
    // Where the headers are, so that most flips matter.
    for (bytes, headers) in [
        (elf(&ElfImage::default()), 0..64 + 2 * 56 + 24),
        (small_bzimage(), 0x1f1..0x26c),
    ] {
        let mut loaded = 0;
        for _ in 0..2000 {
            let mut hostile = bytes.clone();
            for _ in 0..=random.below(4) {
                let at = headers.start + random.below(headers.len());
                hostile[at] ^= 1 << random.below(8);
            }
            loaded += usize::from(survives(&hostile, &memory));
        }
        assert!(loaded > 0 && loaded < 2000, "{loaded}");
    }
}

#[test]
fn random_field_values_do_no_harm() {
    let memory = memory_with_a_tail();
    let mut random = Random(0xfeed_beef_0bad_cafe);
    let edges = [
        0,
        1,
        0xfff,
        0xf_ffff,
        0x1f_ffff,
        u64::MAX >> 1,
        u64::MAX - 7,
        u64::MAX,
    ];
    for (bytes, headers) in [
        (elf(&ElfImage::default()), 0..64 + 2 * 56 + 24),
        (small_bzimage(), 0x1f1..0x26c),
    ] {
        for _ in 0..2000 {
            let mut hostile = bytes.clone();
            let at = headers.start + random.below(headers.len() - 8);
            let value = edges[random.below(edges.len())].to_le_bytes();
            let len = 1 << random.below(4);
            hostile[at..at + len].copy_from_slice(&value[..len]);
            survives(&hostile, &memory);
        }
    }
}
