//! One contiguous range of guest memory and the file behind it.

use std::fs::File;
use std::io;
use std::ptr;
use std::sync::Arc;

use vm_memory::mmap::MmapRegion;
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap};

/// What a region is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// RAM, which devices reach as well.
    Ram,
    /// Memory that the guest can only read, and that is none of the devices' business.
    Rom,
    /// Memory of a device. Nobody but the guest reaches it: its file is in the hands of the
    /// device's process, which may cut it off at any time.
    Device,
}

/// A range of guest-physical addresses backed by a range of a file, mapped here.
///
/// Cloning is cheap; the mapping goes when the last clone does.
#[derive(Clone, Debug)]
pub struct Region {
    mapping: Arc<GuestRegionMmap<()>>,
    file: FileOffset,
    kind: RegionKind,
}

impl Region {
    /// Maps `size` bytes at `offset` of `file` for guest-physical address `gpa`, as RAM.
    pub fn map(gpa: u64, size: u64, file: Arc<File>, offset: u64) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let file = FileOffset::from_arc(file, offset);
        let length = usize::try_from(size).map_err(|_| invalid())?;
        let mapping = MmapRegion::from_file(file.clone(), length).map_err(io::Error::other)?;
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(gpa)).ok_or_else(invalid)?;
        Ok(Self {
            mapping: Arc::new(mapping),
            file,
            kind: RegionKind::Ram,
        })
    }

    /// The same as something else.
    #[must_use]
    pub fn of_kind(self, kind: RegionKind) -> Self {
        Self { kind, ..self }
    }

    /// What it is to the guest.
    pub fn kind(&self) -> RegionKind {
        self.kind
    }

    /// Whether devices reach it.
    pub fn is_ram(&self) -> bool {
        self.kind == RegionKind::Ram
    }

    /// First guest-physical address.
    pub fn gpa(&self) -> u64 {
        self.mapping.start_addr().raw_value()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.mapping.len()
    }

    /// The file that holds the bytes.
    pub fn file(&self) -> &Arc<File> {
        self.file.arc()
    }

    /// Where in the file they start, in bytes.
    pub fn offset(&self) -> u64 {
        self.file.start()
    }

    /// Where the region is mapped in this process.
    pub fn host(&self) -> u64 {
        self.mapping.get_mmap().as_ptr() as u64
    }

    /// The bytes of the mapping. The guest changes them at any time.
    pub(super) fn bytes(&self) -> *mut [u8] {
        let mapping = self.mapping.get_mmap();
        ptr::slice_from_raw_parts_mut(mapping.as_ptr(), mapping.size())
    }

    /// The mapping, for a [`super::GuestMemory`].
    pub(super) fn mapping(&self) -> Arc<GuestRegionMmap<()>> {
        Arc::clone(&self.mapping)
    }

    /// Whether both share an address.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.gpa() < other.gpa() + other.size() && other.gpa() < self.gpa() + self.size()
    }
}

/// Regions are the same when the guest sees the same bytes through the same mapping.
impl PartialEq for Region {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.mapping, &other.mapping)
    }
}

impl Eq for Region {}
