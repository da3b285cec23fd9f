//! Guest memory as the front-end hands it over.
//!
//! A [`Memory`] is one immutable state of the memory table. A change makes a new one, which shares
//! the regions that stay, and queue threads take it over between two turns. Whoever still uses the
//! old one, such as a request that the kernel is working on, holds it by its `Arc`: a region is
//! unmapped when its last user is done, and never under one.

mod dirty_log;
mod discard;
mod mapping;
mod prefault;

use std::fs::File;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionCollectionError,
    GuestRegionMmap,
};

pub use self::dirty_log::{DirtyLog, LOG_PAGE, LogBitmap, LogSlice};
pub use self::mapping::SharedMapping;
pub use self::prefault::PrefaultMode;
pub(crate) use self::prefault::Prefaulter;

/// `vm-memory`'s view of guest memory, with this process's dirty log.
pub type GuestMemory = GuestMemoryMmap<LogBitmap>;

/// Most regions in a table; as many as KVM has memory slots for one guest in practice, and what
/// GET_MAX_MEM_SLOTS answers.
pub const MAX_REGIONS: usize = 509;

/// One region of the memory table, as the front-end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionDescription {
    /// Guest address of its first byte.
    pub guest_address: u64,
    /// Length in bytes.
    pub size: u64,
    /// The front-end's own address of its first byte, which ring addresses are given in.
    pub user_address: u64,
    /// Where it begins in the file that came with it.
    pub file_offset: u64,
}

/// One state of guest memory.
#[derive(Debug)]
pub struct Memory {
    guest: GuestMemory,
    descriptions: Vec<RegionDescription>,
    log: Arc<DirtyLog>,
}

/// A memory table that cannot be used.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// More regions than this process keeps.
    #[error("{count} memory regions, at most {MAX_REGIONS} are possible")]
    TooMany {
        /// Regions asked for.
        count: usize,
    },
    /// A region that cannot exist.
    #[error(
        "memory region of {size:#x} bytes at guest address {address:#x}, user address {user:#x}, \
         file offset {offset:#x} is empty or wraps around"
    )]
    Impossible {
        /// Its guest address.
        address: u64,
        /// Its size in bytes.
        size: u64,
        /// Its address in the front-end.
        user: u64,
        /// Its offset in its file.
        offset: u64,
    },
    /// The front-end's own addresses of two regions overlap.
    #[error("user addresses of the memory regions at {first:#x} and {second:#x} overlap")]
    UserOverlap {
        /// Guest address of one.
        first: u64,
        /// Guest address of the other.
        second: u64,
    },
    /// Its file ends before it does: an access there would kill this process.
    #[error(
        "memory region of {size:#x} bytes at guest address {address:#x} ends past its file of \
         {file_len:#x} bytes"
    )]
    PastEnd {
        /// Its guest address.
        address: u64,
        /// Its size in bytes.
        size: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// Its file cannot be examined.
    #[error("file of the memory region at guest address {address:#x} cannot be examined")]
    File {
        /// Its guest address.
        address: u64,
        /// Why.
        source: io::Error,
    },
    /// It cannot be mapped.
    #[error("memory region of {size:#x} bytes at guest address {address:#x} cannot be mapped")]
    Map {
        /// Its guest address.
        address: u64,
        /// Its size in bytes.
        size: u64,
        /// Why.
        source: MmapRegionError,
    },
    /// Regions overlap in guest addresses.
    #[error("memory regions do not fit together")]
    Table(#[source] GuestRegionCollectionError),
    /// A region to be removed is not there.
    #[error(
        "no memory region of {size:#x} bytes at guest address {address:#x}, user address {user:#x}"
    )]
    NoSuchRegion {
        /// Its guest address.
        address: u64,
        /// Its size in bytes.
        size: u64,
        /// Its address in the front-end.
        user: u64,
    },
}

impl Memory {
    /// Memory without a region.
    pub(crate) fn empty(log: Arc<DirtyLog>) -> Self {
        Memory {
            guest: GuestMemory::new(),
            descriptions: Vec::new(),
            log,
        }
    }

    /// Maps a whole table.
    pub(crate) fn new(
        regions: impl IntoIterator<Item = (RegionDescription, File)>,
        log: Arc<DirtyLog>,
    ) -> Result<Self, MemoryError> {
        regions
            .into_iter()
            .try_fold(Memory::empty(log), |memory, (description, file)| {
                memory.with(description, file)
            })
    }

    /// This memory and one more region.
    pub(crate) fn with(
        &self,
        description: RegionDescription,
        file: File,
    ) -> Result<Self, MemoryError> {
        let count = self.descriptions.len() + 1;
        if count > MAX_REGIONS {
            return Err(MemoryError::TooMany { count });
        }
        self.check(&description)?;
        let region = map(&description, file, &self.log)?;
        let guest = self
            .guest
            .insert_region(Arc::new(region))
            .map_err(MemoryError::Table)?;
        let mut descriptions = self.descriptions.clone();
        descriptions.push(description);
        Ok(Memory {
            guest,
            descriptions,
            log: Arc::clone(&self.log),
        })
    }

    /// This memory without the region that has this guest address, size and user address.
    pub(crate) fn without(&self, gone: &RegionDescription) -> Result<Self, MemoryError> {
        let no_such = || MemoryError::NoSuchRegion {
            address: gone.guest_address,
            size: gone.size,
            user: gone.user_address,
        };
        let at = self
            .descriptions
            .iter()
            .position(|known| {
                (known.guest_address, known.size, known.user_address)
                    == (gone.guest_address, gone.size, gone.user_address)
            })
            .ok_or_else(no_such)?;
        let (guest, _) = self
            .guest
            .remove_region(GuestAddress(gone.guest_address), gone.size)
            .map_err(MemoryError::Table)?;
        let mut descriptions = self.descriptions.clone();
        descriptions.remove(at);
        Ok(Memory {
            guest,
            descriptions,
            log: Arc::clone(&self.log),
        })
    }

    fn check(&self, new: &RegionDescription) -> Result<(), MemoryError> {
        let wraps = |start: u64| start.checked_add(new.size).is_none();
        if new.size == 0
            || wraps(new.guest_address)
            || wraps(new.user_address)
            || wraps(new.file_offset)
        {
            return Err(MemoryError::Impossible {
                address: new.guest_address,
                size: new.size,
                user: new.user_address,
                offset: new.file_offset,
            });
        }
        let overlaps = |old: &&RegionDescription| {
            new.user_address < old.user_address + old.size
                && old.user_address < new.user_address + new.size
        };
        match self.descriptions.iter().find(overlaps) {
            Some(old) => Err(MemoryError::UserOverlap {
                first: old.guest_address,
                second: new.guest_address,
            }),
            None => Ok(()),
        }
    }

    /// Guest memory, for `vm-memory`'s methods; what they write is logged.
    pub fn guest(&self) -> &GuestMemory {
        &self.guest
    }

    /// Bytes of guest memory mapped.
    pub fn size(&self) -> u64 {
        self.descriptions.iter().map(|region| region.size).sum()
    }

    /// The guest address of the front-end's own address `user`.
    pub(crate) fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.descriptions.iter().find_map(|region| {
            let offset = user.checked_sub(region.user_address)?;
            (offset < region.size).then(|| GuestAddress(region.guest_address + offset))
        })
    }

    /// Marks pages that were written past `vm-memory`, by the kernel or through a raw pointer.
    /// To be called after the write.
    pub fn mark_dirty(&self, start: GuestAddress, len: usize) {
        self.log.mark(start.0, len as u64);
    }

    /// The mapped regions with the offset of each in its file.
    pub(crate) fn regions(&self) -> impl Iterator<Item = &GuestRegionMmap<LogBitmap>> {
        self.guest.iter()
    }
}

fn map(
    description: &RegionDescription,
    file: File,
    log: &Arc<DirtyLog>,
) -> Result<GuestRegionMmap<LogBitmap>, MemoryError> {
    let RegionDescription {
        guest_address,
        size,
        user_address,
        file_offset,
    } = *description;
    let impossible = || MemoryError::Impossible {
        address: guest_address,
        size,
        user: user_address,
        offset: file_offset,
    };
    let len = usize::try_from(size).map_err(|_| impossible())?;
    let file_len = file
        .metadata()
        .map_err(|source| MemoryError::File {
            address: guest_address,
            source,
        })?
        .len();
    if file_offset.saturating_add(size) > file_len {
        return Err(MemoryError::PastEnd {
            address: guest_address,
            size,
            file_len,
        });
    }
    let bitmap = LogBitmap::new(Arc::clone(log), guest_address);
    let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap)
        .with_file_offset(FileOffset::new(file, file_offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(|source| MemoryError::Map {
            address: guest_address,
            size,
            source,
        })?;
    GuestRegionMmap::new(mapping, GuestAddress(guest_address)).ok_or_else(impossible)
}

#[cfg(test)]
mod tests;
