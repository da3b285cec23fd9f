//! The machine's RAM: one memfd, on huge pages if asked, laid around the MMIO hole.
#![expect(
    unsafe_code,
    reason = "prefaulting a mapping is a madvise on raw addresses"
)]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MmapAdvise, madvise};
use thiserror::Error;

use super::{Region, RegionKind};
use crate::layout::{HIGH_RAM, LOW_RAM_END, ROM};

/// The size of the pages behind RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl HugePages {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

/// Why there is no RAM.
#[derive(Debug, Error)]
pub enum RamError {
    /// A size that pages cannot make up.
    #[error("memory size {size} is not a multiple of {page} bytes, or is 0")]
    Size {
        /// Bytes asked for.
        size: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// A file that was handed over is not the RAM of such a machine.
    #[error("the file that was handed over is not {size} bytes of guest memory")]
    Adopt {
        /// Bytes that it should have.
        size: u64,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// The kernel has no such memory.
    #[error("{size} bytes of guest memory could not be had{hint}")]
    Allocate {
        /// Bytes asked for.
        size: u64,
        /// What to do about it.
        hint: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

const PAGE: u64 = 4096;
/// Its size stays as it is, and so does that.
const SEALS: SealFlag = SealFlag::F_SEAL_SHRINK
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SEAL);

/// The file that is the machine's RAM.
#[derive(Clone, Debug)]
pub struct Ram {
    file: Arc<File>,
    size: u64,
    /// Bytes of ROM, on pages of their own behind the RAM.
    rom: u64,
}

impl Ram {
    /// Makes `size` bytes of RAM whose size cannot change any more.
    ///
    /// Huge pages are taken at once: a lack of them is an error here, not a SIGBUS of a
    /// running guest.
    pub fn allocate(size: u64, huge: Option<HugePages>) -> Result<Self, RamError> {
        let page = huge.map_or(PAGE, HugePages::bytes);
        if size == 0 || !size.is_multiple_of(page) {
            return Err(RamError::Size { size, page });
        }
        let hint = if huge.is_some() {
            "; see vm.nr_hugepages"
        } else {
            ""
        };
        let failed = |source: io::Error| RamError::Allocate { size, hint, source };

        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        flags |= match huge {
            None => MFdFlags::empty(),
            Some(HugePages::Size2M) => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
            Some(HugePages::Size1G) => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
        };
        let file = File::from(memfd_create("guest-ram", flags).map_err(|e| failed(e.into()))?);
        file.set_len(size).map_err(failed)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS)).map_err(|e| failed(e.into()))?;
        if huge.is_some() {
            let length = i64::try_from(size).map_err(|_| RamError::Size { size, page })?;
            fallocate(&file, FallocateFlags::empty(), 0, length).map_err(|e| failed(e.into()))?;
        }
        Ok(Self {
            file: Arc::new(file),
            size,
            rom: 0,
        })
    }

    /// Takes over the RAM of another machine of the same size, which must be sealed as
    /// [`Self::allocate`] does: nobody can shrink it under the guest.
    pub fn adopt(file: File, size: u64) -> Result<Self, RamError> {
        let failed = |source: io::Error| RamError::Adopt { size, source };
        let found = file.metadata().map_err(failed)?.len();
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map_err(|e| failed(e.into()))?;
        if found != size || SealFlag::from_bits_retain(seals) & SEALS != SEALS {
            let why = format!("it has {found} bytes and seals {seals:#x}");
            return Err(failed(io::Error::other(why)));
        }
        Ok(Self {
            file: Arc::new(file),
            size,
            rom: 0,
        })
    }

    /// Makes a ROM of `rom` bytes of what is behind the first `size` bytes, which stay RAM.
    #[must_use]
    pub fn with_rom(self, size: u64, rom: u64) -> Self {
        Self { size, rom, ..self }
    }

    /// The file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Maps the RAM: below the hole, and above it what does not fit there. A ROM ends where
    /// [`ROM`] does.
    pub fn regions(&self) -> io::Result<Vec<Region>> {
        let low = self.size.min(LOW_RAM_END);
        let mut regions = vec![Region::map(0, low, Arc::clone(&self.file), 0)?];
        if self.size > low {
            let high = Region::map(HIGH_RAM, self.size - low, Arc::clone(&self.file), low)?;
            regions.push(high);
        }
        if self.rom > 0 {
            let file = Arc::clone(&self.file);
            let rom = Region::map(ROM.end - self.rom, self.rom, file, self.size)?;
            regions.push(rom.of_kind(RegionKind::Rom));
        }
        Ok(regions)
    }
}

/// Makes every page of `regions` present and writable, on as many threads as there
/// are processors, so that no guest access has to wait for one.
pub fn prefault(regions: &[Region]) -> io::Result<()> {
    const CHUNK: usize = 4 << 20;
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let populate = |region: &Region, at: usize| -> io::Result<()> {
        let bytes = region.bytes();
        let length = CHUNK.min(bytes.len() - at);
        let Some(chunk) = NonNull::new(bytes.cast::<u8>().wrapping_add(at)) else {
            return Ok(());
        };
        // SAFETY: the chunk lies in a region that the caller holds mapped, and populating
        // pages changes no byte.
        match unsafe { madvise(chunk.cast(), length, MmapAdvise::MADV_POPULATE_WRITE) } {
            // A kernel before 5.14 does not know it: pages come when they are used.
            Ok(()) | Err(Errno::EINVAL) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn(move || {
                    for region in regions {
                        let length = region.bytes().len();
                        for at in (worker * CHUNK..length).step_by(threads * CHUNK) {
                            populate(region, at)?;
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a prefault thread panicked")))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_beyond_the_hole_continues_above_4_gib() {
        let ram = Ram::allocate(LOW_RAM_END + (64 << 20), None).unwrap();
        let regions = ram.regions().unwrap();
        let shape: Vec<_> = regions
            .iter()
            .map(|r| (r.gpa(), r.size(), r.offset()))
            .collect();
        assert_eq!(
            shape,
            [(0, LOW_RAM_END, 0), (HIGH_RAM, 64 << 20, LOW_RAM_END)]
        );
    }

    #[test]
    fn a_rom_is_behind_the_ram_and_ends_at_4_gib() {
        let ram = Ram::allocate(3 << 20, None).unwrap();
        let regions = ram.with_rom(2 << 20, 0x4_0000).regions().unwrap();
        let shape: Vec<_> = regions
            .iter()
            .map(|r| (r.gpa(), r.size(), r.offset(), !r.is_ram()))
            .collect();
        assert_eq!(
            shape,
            [
                (0, 2 << 20, 0, false),
                (0xfffc_0000, 0x4_0000, 2 << 20, true)
            ]
        );
    }

    #[test]
    fn sizes_that_are_no_pages_are_refused() {
        for (size, huge) in [(0, None), (4095, None), (4096, Some(HugePages::Size2M))] {
            assert!(
                matches!(Ram::allocate(size, huge), Err(RamError::Size { .. })),
                "{size}"
            );
        }
    }

    #[test]
    fn more_huge_pages_than_there_are_is_an_error() {
        let error = Ram::allocate(1 << 40, Some(HugePages::Size2M)).unwrap_err();
        let said = "1099511627776 bytes of guest memory could not be had; see vm.nr_hugepages";
        assert_eq!(error.to_string(), said);
    }

    #[test]
    fn nobody_can_shrink_the_ram_under_the_guest() {
        let ram = Ram::allocate(1 << 20, None).unwrap();
        assert!(ram.file.set_len(4096).is_err());
        assert!(ram.file.set_len(2 << 20).is_err());
    }

    #[test]
    fn only_ram_of_the_same_size_is_adopted() {
        let ram = Ram::allocate(1 << 20, None).unwrap();
        let file = || ram.file.try_clone().unwrap();
        assert_eq!(
            Ram::adopt(file(), 1 << 20)
                .unwrap()
                .regions()
                .unwrap()
                .len(),
            1
        );
        assert!(Ram::adopt(file(), 2 << 20).is_err());
        let unsealed = memfd_create("other", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let unsealed = File::from(unsealed);
        unsealed.set_len(1 << 20).unwrap();
        assert!(Ram::adopt(unsealed, 1 << 20).is_err());
    }

    #[test]
    fn prefaulted_pages_are_in_memory() {
        let ram = Ram::allocate(9 << 20, None).unwrap();
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&ram.file.metadata().unwrap());
        assert_eq!(blocks(), 0);
        prefault(&ram.regions().unwrap()).unwrap();
        assert_eq!(blocks() * 512, 9 << 20);
    }
}
