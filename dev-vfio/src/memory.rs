//! Memory that a front-end hands over, mapped into this process.

use std::fs::File;
use std::os::fd::OwnedFd;

use libc::{PROT_READ, PROT_WRITE};
use vfio_user::{DmaRegion, Errno};
use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

/// Maps a region of a file, with the protection that it is to have.
///
/// # Errors
/// Its file ends before it, or it cannot be mapped.
pub(crate) fn map(region: &DmaRegion, file: OwnedFd) -> Result<MmapRegion, Errno> {
    let file = File::from(file);
    let len = file.metadata().map_err(|_| Errno::EBADF)?.len();
    let end = region.offset.checked_add(region.size);
    // An access past the end of a file would kill this process.
    if end.is_none_or(|end| end > len) {
        return Err(Errno::EINVAL);
    }
    let when = |condition, bit| if condition { bit } else { 0 };
    let size = usize::try_from(region.size).map_err(|_| Errno::EINVAL)?;
    MmapRegionBuilder::new(size)
        .with_file_offset(FileOffset::new(file, region.offset))
        .with_mmap_prot(when(region.readable, PROT_READ) | when(region.writable, PROT_WRITE))
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(|_| Errno::ENOMEM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_past_the_end_of_its_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let mapped = |offset| {
            let region = DmaRegion {
                address: 0x10_0000,
                size: 4096,
                offset,
                readable: true,
                writable: true,
            };
            map(&region, file.try_clone().unwrap().into()).map(|region| region.size())
        };
        assert_eq!(mapped(0), Ok(4096));
        for offset in [1, 4096, u64::MAX] {
            assert_eq!(mapped(offset), Err(Errno::EINVAL), "{offset:#x}");
        }
    }
}
