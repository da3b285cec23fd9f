//! What a request asks for (virtio 1.2, 5.2.6), read from its chain and checked against the image.
//!
//! ```text
//! readable:  le32 type, le32 reserved, le64 sector, data to be written or ranges …
//! writable:  … data that is read, u8 status
//! ```

use device_kit::{Chain, QueueFault};

use crate::config::{MAX_RANGE_SECTORS, SECTOR};
use crate::image::Image;
use crate::metrics::Operation;

/// Bytes of the header.
pub(crate) const HEADER_LEN: usize = 16;
/// Bytes of a range in a discard or write-zeroes request.
const RANGE_LEN: usize = 16;
/// The one flag of a range: zeroed blocks may be given back.
const RANGE_UNMAP: u32 = 1;

/// The last byte of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request that can be carried out, or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Read `len` bytes at `offset` of the image into the writable part.
    Read { offset: u64, len: usize },
    /// Write `len` bytes of the readable part, after its header, to `offset` of the image.
    Write { offset: u64, len: usize },
    /// Make all that was written durable.
    Flush,
    /// Give back or zero a range of the image.
    Fallocate { mode: i32, offset: u64, len: u64 },
    /// Tell the serial number.
    GetId,
    /// Nothing to be done but to answer.
    Answer(Status),
}

/// Reads a request.
///
/// # Errors
/// When there is no room for header or status, so that it cannot even be refused.
pub(crate) fn parse(chain: &Chain, image: &Image) -> Result<(Operation, Request), QueueFault> {
    let fault = |reason| QueueFault::Request {
        head: chain.head(),
        reason,
    };
    if chain.readable_len() < HEADER_LEN {
        return Err(fault("it is too short for its header"));
    }
    // One byte of the writable part is the status.
    let Some(room) = chain.writable_len().checked_sub(1) else {
        return Err(fault("it has no room for its status"));
    };
    let mut header = [0; HEADER_LEN];
    chain.read(0, &mut header)?;
    let kind = le32(&header, 0);
    let sector = le64(&header, 8);
    let payload = chain.readable_len() - HEADER_LEN;
    Ok(match kind {
        0 => {
            let place = place(sector, room, image);
            let read = |offset| Request::Read { offset, len: room };
            (Operation::Read, place.map_or(BAD, read))
        }
        1 => {
            let place = place(sector, payload, image).filter(|_| !image.read_only());
            let write = |offset| Request::Write {
                offset,
                len: payload,
            };
            (Operation::Write, place.map_or(BAD, write))
        }
        4 => (Operation::Flush, Request::Flush),
        8 => (Operation::GetId, Request::GetId),
        11 if image.can_discard() => (Operation::Discard, range(chain, payload, image, false)?),
        13 if image.can_write_zeroes() => {
            (Operation::WriteZeroes, range(chain, payload, image, true)?)
        }
        _ => (Operation::Unknown, Request::Answer(Status::Unsupported)),
    })
}

const BAD: Request = Request::Answer(Status::IoError);

/// Where in the image `len` bytes at `sector` are, if they are whole blocks in it.
fn place(sector: u64, len: usize, image: &Image) -> Option<u64> {
    let len = u64::try_from(len).ok()?;
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(len)?;
    let block = u64::from(image.block_size());
    let whole = len.is_multiple_of(block) && offset.is_multiple_of(block);
    (whole && end <= image.sectors() * SECTOR).then_some(offset)
}

/// A discard or write-zeroes request: one range, as the configuration space says.
fn range(
    chain: &Chain,
    payload: usize,
    image: &Image,
    zeroes: bool,
) -> Result<Request, QueueFault> {
    if payload != RANGE_LEN {
        return Ok(BAD);
    }
    let mut range = [0; RANGE_LEN];
    chain.read(HEADER_LEN, &mut range)?;
    let (sector, sectors, flags) = (le64(&range, 0), le32(&range, 8), le32(&range, 12));
    let unmap = flags == RANGE_UNMAP;
    if (flags != 0 && !unmap) || (unmap && !zeroes) {
        return Ok(Request::Answer(Status::Unsupported));
    }
    let len = u64::from(sectors) * SECTOR;
    let fits = usize::try_from(len)
        .ok()
        .and_then(|len| place(sector, len, image));
    let Some(offset) = fits.filter(|_| sectors <= MAX_RANGE_SECTORS) else {
        return Ok(BAD);
    };
    if len == 0 {
        return Ok(Request::Answer(Status::Ok));
    }
    let mode = if zeroes && !unmap {
        libc::FALLOC_FL_ZERO_RANGE
    } else {
        libc::FALLOC_FL_PUNCH_HOLE
    };
    Ok(Request::Fallocate {
        mode: mode | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    })
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}
