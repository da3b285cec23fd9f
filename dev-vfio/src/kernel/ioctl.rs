//! The kernel's VFIO interface (`include/uapi/linux/vfio.h`), on descriptors that were handed over.
//!
//! The crate `vfio-ioctls` opens containers and groups by their names only, and does not say why an
//! access failed; a process that opens nothing needs the calls themselves.
#![expect(unsafe_code, reason = "ioctls of the kernel's VFIO interface")]

use std::ffi::CString;
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use libc::c_ulong;
use nix::errno::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    vfio_device_info, vfio_group_status, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
    vfio_irq_info, vfio_irq_set, vfio_region_info,
};
use vfio_user::{Area, DmaRegion};

/// `_IO(VFIO_TYPE, VFIO_BASE + number)`.
const fn code(number: u32) -> u32 {
    (b';' as u32) << 8 | (100 + number)
}

const CHECK_EXTENSION: u32 = code(1);
const SET_IOMMU: u32 = code(2);
const GROUP_GET_STATUS: u32 = code(3);
const GROUP_SET_CONTAINER: u32 = code(4);
const GROUP_GET_DEVICE_FD: u32 = code(6);
const DEVICE_GET_INFO: u32 = code(7);
const DEVICE_GET_REGION_INFO: u32 = code(8);
const DEVICE_GET_IRQ_INFO: u32 = code(9);
const DEVICE_SET_IRQS: u32 = code(10);
const DEVICE_RESET: u32 = code(11);
const IOMMU_MAP_DMA: u32 = code(13);
const IOMMU_UNMAP_DMA: u32 = code(14);

/// What is called while a device is served.
pub(crate) const AT_WORK: &[u32] = &[
    DEVICE_SET_IRQS,
    DEVICE_RESET,
    IOMMU_MAP_DMA,
    IOMMU_UNMAP_DMA,
];

/// Most bytes that the description of a region may have: it says itself how many.
const MAX_REGION_INFO: usize = 64 << 10;

mod raw {
    use super::*;

    nix::ioctl_write_int_bad!(check_extension, CHECK_EXTENSION as c_ulong);
    nix::ioctl_write_int_bad!(set_iommu, SET_IOMMU as c_ulong);
    nix::ioctl_read_bad!(
        group_get_status,
        GROUP_GET_STATUS as c_ulong,
        vfio_group_status
    );
    nix::ioctl_write_ptr_bad!(group_set_container, GROUP_SET_CONTAINER as c_ulong, RawFd);
    nix::ioctl_write_ptr_bad!(
        group_get_device_fd,
        GROUP_GET_DEVICE_FD as c_ulong,
        libc::c_char
    );
    nix::ioctl_read_bad!(
        device_get_info,
        DEVICE_GET_INFO as c_ulong,
        vfio_device_info
    );
    nix::ioctl_read_bad!(
        device_get_region_info,
        DEVICE_GET_REGION_INFO as c_ulong,
        vfio_region_info
    );
    nix::ioctl_read_bad!(
        device_get_irq_info,
        DEVICE_GET_IRQ_INFO as c_ulong,
        vfio_irq_info
    );
    nix::ioctl_write_ptr_bad!(device_set_irqs, DEVICE_SET_IRQS as c_ulong, vfio_irq_set);
    nix::ioctl_none_bad!(device_reset, DEVICE_RESET as c_ulong);
    nix::ioctl_write_ptr_bad!(map_dma, IOMMU_MAP_DMA as c_ulong, vfio_iommu_type1_dma_map);
    nix::ioctl_read_bad!(
        unmap_dma,
        IOMMU_UNMAP_DMA as c_ulong,
        vfio_iommu_type1_dma_unmap
    );
}

/// The size of a structure, for its `argsz`.
fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

/// Whether a container knows an IOMMU model.
pub(super) fn has_extension(container: BorrowedFd<'_>, extension: u32) -> Result<bool, Errno> {
    // SAFETY: the kernel takes a number.
    let answer = unsafe { raw::check_extension(container.as_raw_fd(), number(extension)) }?;
    Ok(answer > 0)
}

/// Lets a container use an IOMMU model.
pub(super) fn set_iommu(container: BorrowedFd<'_>, model: u32) -> Result<(), Errno> {
    // SAFETY: the kernel takes a number.
    unsafe { raw::set_iommu(container.as_raw_fd(), number(model)) }.map(drop)
}

fn number(value: u32) -> libc::c_int {
    libc::c_int::try_from(value).unwrap_or(libc::c_int::MAX)
}

/// A group's flags.
pub(super) fn group_flags(group: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut status = vfio_group_status {
        argsz: size::<vfio_group_status>(),
        ..Default::default()
    };
    // SAFETY: the structure has the size that it says.
    unsafe { raw::group_get_status(group.as_raw_fd(), &mut status) }?;
    Ok(status.flags)
}

/// Puts a group into a container.
pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the kernel reads the number of a descriptor that is open.
    unsafe { raw::group_set_container(group.as_raw_fd(), &container.as_raw_fd()) }.map(drop)
}

/// Opens a device of a group.
pub(super) fn device(group: BorrowedFd<'_>, address: &str) -> Result<OwnedFd, Errno> {
    let address = CString::new(address).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the kernel reads a string that ends with a zero.
    let fd = unsafe { raw::group_get_device_fd(group.as_raw_fd(), address.as_ptr()) }?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a device is.
pub(super) fn device_info(device: BorrowedFd<'_>) -> Result<vfio_device_info, Errno> {
    let mut info = vfio_device_info {
        argsz: size::<vfio_device_info>(),
        ..Default::default()
    };
    // SAFETY: the structure has the size that it says.
    unsafe { raw::device_get_info(device.as_raw_fd(), &mut info) }?;
    Ok(info)
}

/// A region, and what of it can be mapped if that is not all.
pub(super) fn region_info(
    device: BorrowedFd<'_>,
    index: u32,
) -> Result<(vfio_region_info, Vec<Area>), Errno> {
    let mut info = vfio_region_info {
        argsz: size::<vfio_region_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: the structure has the size that it says.
    unsafe { raw::device_get_region_info(device.as_raw_fd(), &mut info) }?;
    let whole = usize::try_from(info.argsz).map_err(|_| Errno::EINVAL)?;
    if whole <= size_of::<vfio_region_info>() {
        return Ok((info, Vec::new()));
    }
    if whole > MAX_REGION_INFO {
        return Err(Errno::E2BIG);
    }
    // Of words of eight bytes, so that it is aligned as the structure is.
    let mut words = vec![0u64; whole.div_ceil(8)];
    let start: *mut vfio_region_info = words.as_mut_ptr().cast();
    // SAFETY: the buffer is aligned and large enough for the structure, and what follows it has the
    // size that it says.
    unsafe {
        start.write(info);
        raw::device_get_region_info(device.as_raw_fd(), start)?;
        info = start.read();
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Ok((info, areas(&bytes, info.cap_offset)))
}

/// The areas that a chain of capabilities, which begins at `at`, names.
fn areas(bytes: &[u8], at: u32) -> Vec<Area> {
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let long = |at: usize| Some(u64::from(word(at)?) | u64::from(word(at + 4)?) << 32);
    let mut at = at as usize;
    // A chain that leads back would have no end.
    for _ in 0..bytes.len() / 8 {
        // Id and version are 16 bits each, then comes the next one's place.
        let (Some(head), Some(next)) = (word(at), word(at + 4)) else {
            break;
        };
        if at == 0 {
            break;
        }
        if head & 0xffff == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = word(at + 8).unwrap_or(0) as usize;
            let area = |number: usize| {
                let at = at + 16 + 16 * number;
                Some(Area {
                    offset: long(at)?,
                    size: long(at + 8)?,
                })
            };
            return (0..count).map_while(area).collect();
        }
        at = next as usize;
    }
    Vec::new()
}

/// An index of interrupts.
pub(super) fn irq_info(device: BorrowedFd<'_>, index: u32) -> Result<vfio_irq_info, Errno> {
    let mut info = vfio_irq_info {
        argsz: size::<vfio_irq_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: the structure has the size that it says.
    unsafe { raw::device_get_irq_info(device.as_raw_fd(), &mut info) }?;
    Ok(info)
}

/// Does with `count` interrupts from `start` what `flags` say; `data` is what belongs to them.
pub(super) fn set_irqs(
    device: BorrowedFd<'_>,
    flags: u32,
    index: u32,
    (start, count): (u32, u32),
    data: &[u8],
) -> Result<(), Errno> {
    let size = size_of::<vfio_irq_set>() + data.len();
    let argsz = u32::try_from(size).map_err(|_| Errno::EINVAL)?;
    let mut bytes = Vec::with_capacity(size);
    for word in [argsz, flags, index, start, count] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(data);
    let mut words = vec![0u32; size.div_ceil(4)];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks(4)) {
        let mut whole = [0; 4];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(whole);
    }
    // SAFETY: the buffer is aligned, and as long as it says.
    unsafe { raw::device_set_irqs(device.as_raw_fd(), words.as_ptr().cast()) }.map(drop)
}

/// Resets a device.
pub(super) fn reset(device: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: it takes nothing.
    unsafe { raw::device_reset(device.as_raw_fd()) }.map(drop)
}

/// Pins memory that is mapped at `memory`, and lets devices access it as `region` says.
///
/// # Safety
/// `memory` is a mapping of `region.size` bytes that no reference points into, and that stays until
/// [`unmap_dma`] was called for it.
pub(super) unsafe fn map_dma(
    container: BorrowedFd<'_>,
    region: &DmaRegion,
    memory: *mut u8,
) -> Result<(), Errno> {
    let when = |condition, flag| if condition { flag } else { 0 };
    let map = vfio_iommu_type1_dma_map {
        argsz: size::<vfio_iommu_type1_dma_map>(),
        flags: when(region.readable, VFIO_DMA_MAP_FLAG_READ)
            | when(region.writable, VFIO_DMA_MAP_FLAG_WRITE),
        vaddr: memory.addr() as u64,
        iova: region.address,
        size: region.size,
    };
    // SAFETY: the structure has the size that it says, and the memory is as the caller says.
    unsafe { raw::map_dma(container.as_raw_fd(), &map) }.map(drop)
}

/// Takes memory back.
pub(super) fn unmap_dma(container: BorrowedFd<'_>, iova: u64, bytes: u64) -> Result<(), Errno> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: size::<vfio_iommu_type1_dma_unmap>(),
        iova,
        size: bytes,
        ..Default::default()
    };
    // SAFETY: the structure has the size that it says.
    unsafe { raw::unmap_dma(container.as_raw_fd(), &mut unmap) }?;
    if unmap.size == bytes {
        Ok(())
    } else {
        Err(Errno::ENOENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn numbers_of_calls_are_the_kernels() {
        assert_eq!(code(0), 0x3b64);
        assert_eq!(DEVICE_SET_IRQS, 0x3b6e);
        assert_eq!(IOMMU_UNMAP_DMA, 0x3b72);
    }

    #[test]
    fn areas_are_found_behind_other_capabilities() {
        // At 8 one of another kind, at 16 the areas.
        let bytes = chain(&[
            0, 0, 0x1_0003, 16, 0x1_0001, 0, 2, 0, 0, 0, 0x1000, 0, 0x3000, 0, 0x2000, 1,
        ]);
        let found = areas(&bytes, 8);
        let area = |offset, size| Area { offset, size };
        assert_eq!(found, [area(0, 0x1000), area(0x3000, 0x1_0000_2000)]);
    }

    #[test]
    fn a_chain_that_is_broken_has_an_end() {
        assert_eq!(areas(&chain(&[0, 0, 3, 8]), 8), []);
        assert_eq!(areas(&chain(&[0, 0, 3, 4000]), 8), []);
        assert_eq!(areas(&chain(&[0, 0, 3, 0]), 8), []);
        assert_eq!(areas(&chain(&[0, 0, 1, 0, u32::MAX]), 8), []);
        assert_eq!(areas(&[], 8), []);
    }
}
