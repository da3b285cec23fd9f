//! DEVICE_GET_REGION_INFO and its capabilities (VFU, «VFIO region capabilities»).

use std::os::fd::{BorrowedFd, OwnedFd};

use super::{Layout, layout};
use crate::description::{Area, RegionFlags, RegionInfo};

layout! {
    /// The message, in both directions; capabilities follow in the reply.
    RegionRequest { argsz: u32, flags: u32, index: u32, cap_offset: u32, size: u64, offset: u64 }
    /// What a capability begins with.
    Capability { id: u16, version: u16, next: u32 }
    /// What comes next in [`SPARSE_MMAP`]; areas follow.
    Sparse { areas: u32, reserved: u32 }
    /// An area.
    SparseArea { offset: u64, size: u64 }
}

/// `VFIO_REGION_INFO_FLAG_CAPS`.
const CAPS: u32 = 1 << 3;
/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
const SPARSE_MMAP: u16 = 1;

/// A server's reply.
#[derive(Debug)]
pub(crate) struct RegionReply {
    /// The message.
    pub(crate) bytes: Vec<u8>,
    /// Whether the region's file goes with it.
    pub(crate) is_whole: bool,
}

impl RegionReply {
    /// What is said of a region to a client that reads `argsz` bytes. One that reads too few learns
    /// how many there are.
    pub(crate) fn new(index: u32, argsz: u32, info: &RegionInfo<BorrowedFd<'_>>) -> Self {
        let mut capabilities = Vec::new();
        if !info.areas.is_empty() {
            let header = Capability {
                id: SPARSE_MMAP,
                version: 1,
                next: 0,
            };
            let sparse = Sparse {
                areas: u32::try_from(info.areas.len()).unwrap_or(u32::MAX),
                reserved: 0,
            };
            capabilities.extend(header.bytes());
            capabilities.extend(sparse.bytes());
            for &Area { offset, size } in &info.areas {
                capabilities.extend(SparseArea { offset, size }.bytes());
            }
        }
        let length = RegionRequest::SIZE + capabilities.len();
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let is_whole = length <= argsz;
        let has_capabilities = is_whole && !capabilities.is_empty();
        let fixed = RegionRequest {
            argsz: length,
            flags: info.flags.bits() | if has_capabilities { CAPS } else { 0 },
            index,
            cap_offset: if has_capabilities {
                RegionRequest::size()
            } else {
                0
            },
            size: info.size,
            offset: info.offset,
        };
        let mut bytes = fixed.bytes();
        if has_capabilities {
            bytes.extend(capabilities);
        }
        Self { bytes, is_whole }
    }

    /// What a server has said of a region, to a client that reads `argsz` bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn read(
        bytes: &[u8],
        argsz: u32,
        index: u32,
        file: Option<OwnedFd>,
    ) -> Result<RegionInfo, String> {
        let (fixed, _) = RegionRequest::split(bytes).ok_or("too few bytes")?;
        if fixed.index != index {
            return Err(format!("region {} in place of {index}", fixed.index));
        }
        if fixed.argsz > argsz {
            return Err(format!("{} bytes about region {index}", fixed.argsz));
        }
        let areas = if fixed.flags & CAPS == 0 {
            Vec::new()
        } else {
            areas(bytes, fixed.cap_offset)?
        };
        let mut flags = RegionFlags::from_bits_truncate(fixed.flags);
        // Servers are in use that say it can be mapped and do not tell what.
        flags.set(
            RegionFlags::MMAP,
            flags.contains(RegionFlags::MMAP) && file.is_some(),
        );
        let is_mapped = flags.contains(RegionFlags::MMAP);
        let end = |offset: u64, size: u64| offset.checked_add(size);
        if is_mapped && end(fixed.offset, fixed.size).is_none_or(|end| i64::try_from(end).is_err())
        {
            return Err(format!(
                "region {index} of {:#x} bytes at {:#x} of its file",
                fixed.size, fixed.offset
            ));
        }
        for area in &areas {
            if area.size == 0 || end(area.offset, area.size).is_none_or(|end| end > fixed.size) {
                return Err(format!(
                    "{:#x} bytes at {:#x} of region {index}, which has {:#x}",
                    area.size, area.offset, fixed.size
                ));
            }
        }
        Ok(RegionInfo {
            flags,
            size: fixed.size,
            offset: fixed.offset,
            areas: if is_mapped { areas } else { Vec::new() },
            file: file.filter(|_| is_mapped),
        })
    }
}

/// Areas of all capabilities, each of which is behind the one before.
fn areas(bytes: &[u8], first: u32) -> Result<Vec<Area>, String> {
    let mut areas = Vec::new();
    let (mut at, mut least) = (first as usize, RegionRequest::SIZE);
    while at != 0 {
        let outside = || format!("a region's capability at {at} of {}", bytes.len());
        if at < least {
            return Err(outside());
        }
        let rest = bytes.get(at..).ok_or_else(outside)?;
        let (header, rest) = Capability::split(rest).ok_or_else(outside)?;
        if header.id == SPARSE_MMAP {
            let (sparse, mut rest) = Sparse::split(rest).ok_or_else(outside)?;
            for _ in 0..sparse.areas {
                let (area, next) = SparseArea::split(rest).ok_or_else(outside)?;
                rest = next;
                areas.push(Area {
                    offset: area.offset,
                    size: area.size,
                });
            }
        }
        (at, least) = (header.next as usize, at + Capability::SIZE);
    }
    Ok(areas)
}
