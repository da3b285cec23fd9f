//! One request of the guest: the buffers of a descriptor chain, checked and resolved.
//!
//! The chain is walked once, when it is taken from the ring. From then on the descriptors are
//! never read again, so the guest cannot change what was checked. The walk is this crate's own:
//! the one of `virtio-queue` ends silently at a broken descriptor, and a cut chain would pass for
//! a whole one.

use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::error::QueueFault;
use crate::memory::Memory;

/// Most buffers in a chain; what one `readv` takes.
pub const MAX_BUFFERS: u16 = 1024;

const DESCRIPTOR_SIZE: u64 = 16;

/// A run of guest memory that is also a run of this process's memory.
#[derive(Clone, Copy, Debug)]
struct Piece {
    guest: GuestAddress,
    host: *mut u8,
    len: usize,
}

/// The buffers of one request, and the memory that they are in.
///
/// It is made once by [`Chain::default`] and filled again and again by [`super::Queue::pop`], so
/// that taking a request allocates nothing. Between `pop` and completion it keeps the guest's
/// memory mapped, whatever the front-end does to the memory table.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    memory: Option<Arc<Memory>>,
    pieces: Vec<Piece>,
    /// Index of the first writable piece.
    writable_from: usize,
    readable_len: usize,
    writable_len: usize,
}

// SAFETY: `host` points into mappings that `memory` keeps alive; they belong to the process.
#[expect(unsafe_code, reason = "raw addresses of mapped guest memory")]
unsafe impl Send for Chain {}

impl Chain {
    /// Index of the chain's first descriptor: the name of the request on its ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable_len
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable_len
    }

    /// Reads `data.len()` bytes at `offset` of the readable part.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> Result<(), QueueFault> {
        self.copy_from(Side::Readable, offset, data)
    }

    /// Reads back what was written at `offset` of the writable part. The guest may have changed
    /// it meanwhile.
    pub fn read_back(&self, offset: usize, data: &mut [u8]) -> Result<(), QueueFault> {
        self.copy_from(Side::Writable, offset, data)
    }

    /// The guest memory that the device may write, as it lies: guest addresses and lengths.
    pub fn writable_ranges(&self) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
        let pieces = self.pieces.get(self.writable_from..).unwrap_or_default();
        pieces.iter().map(|piece| (piece.guest, piece.len))
    }

    fn copy_from(&self, side: Side, offset: usize, data: &mut [u8]) -> Result<(), QueueFault> {
        let mut done = 0;
        for piece in self.range(side, offset, data.len())? {
            let part = &mut data[done..done + piece.len];
            self.guest_memory(&piece)?
                .guest()
                .read_slice(part, piece.guest)
                .map_err(|_| outside(&piece))?;
            done += piece.len;
        }
        Ok(())
    }

    /// Writes `data` at `offset` of the writable part; the dirty log is told.
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<(), QueueFault> {
        let mut done = 0;
        for piece in self.range(Side::Writable, offset, data.len())? {
            let part = &data[done..done + piece.len];
            self.guest_memory(&piece)?
                .guest()
                .write_slice(part, piece.guest)
                .map_err(|_| outside(&piece))?;
            done += piece.len;
        }
        Ok(())
    }

    /// Adds the host addresses of `len` bytes at `offset` of the readable part to `vectors`.
    ///
    /// They are valid while this chain is neither dropped nor filled again.
    pub fn readable_vectors(
        &self,
        offset: usize,
        len: usize,
        vectors: &mut Vec<libc::iovec>,
    ) -> Result<(), QueueFault> {
        self.vectors(Side::Readable, offset, len, vectors)
    }

    /// Adds the host addresses of `len` bytes at `offset` of the writable part to `vectors`.
    ///
    /// They are valid while this chain is neither dropped nor filled again. Whoever writes there
    /// calls [`Chain::mark_written`] afterwards.
    pub fn writable_vectors(
        &self,
        offset: usize,
        len: usize,
        vectors: &mut Vec<libc::iovec>,
    ) -> Result<(), QueueFault> {
        self.vectors(Side::Writable, offset, len, vectors)
    }

    /// Tells the dirty log that `len` bytes at `offset` of the writable part were written through
    /// [`Chain::writable_vectors`]. To be called after the write, and also after one that failed
    /// part-way.
    pub fn mark_written(&self, offset: usize, len: usize) -> Result<(), QueueFault> {
        for piece in self.range(Side::Writable, offset, len)? {
            self.guest_memory(&piece)?
                .mark_dirty(piece.guest, piece.len);
        }
        Ok(())
    }

    fn vectors(
        &self,
        side: Side,
        offset: usize,
        len: usize,
        vectors: &mut Vec<libc::iovec>,
    ) -> Result<(), QueueFault> {
        vectors.extend(self.range(side, offset, len)?.map(|piece| libc::iovec {
            iov_base: piece.host.cast(),
            iov_len: piece.len,
        }));
        Ok(())
    }

    fn guest_memory(&self, piece: &Piece) -> Result<&Memory, QueueFault> {
        self.memory.as_deref().ok_or_else(|| outside(piece))
    }

    /// The pieces, cut to size, that hold `len` bytes at `offset` of one side.
    fn range(
        &self,
        side: Side,
        offset: usize,
        len: usize,
    ) -> Result<impl Iterator<Item = Piece> + '_, QueueFault> {
        let (pieces, total) = match side {
            Side::Readable => (&self.pieces[..self.writable_from], self.readable_len),
            Side::Writable => (&self.pieces[self.writable_from..], self.writable_len),
        };
        let end = offset.checked_add(len).filter(|end| *end <= total).ok_or(
            QueueFault::OutsideChain {
                head: self.head,
                side: side.name(),
                offset,
                len,
            },
        )?;
        let mut start = 0;
        Ok(pieces.iter().filter_map(move |piece| {
            let from = offset.max(start) - start;
            let to = end.clamp(start, start + piece.len) - start;
            start += piece.len;
            (from < to).then(|| Piece {
                guest: piece.guest.unchecked_add(from as u64),
                host: piece.host.wrapping_add(from),
                len: to - from,
            })
        }))
    }

    /// Forgets the request, and with it the hold on guest memory.
    pub(super) fn clear(&mut self) {
        self.memory = None;
        self.pieces.clear();
        self.writable_from = 0;
        self.readable_len = 0;
        self.writable_len = 0;
    }

    /// Walks the chain that begins at `head`.
    pub(super) fn fill(
        &mut self,
        memory: &Arc<Memory>,
        table: Table,
        head: u16,
        indirect_allowed: bool,
    ) -> Result<(), QueueFault> {
        self.clear();
        self.head = head;
        let mut table = table;
        let mut indirect = !indirect_allowed;
        let mut index = head;
        let mut visited = 0;
        let mut total: u32 = 0;
        loop {
            if index >= table.size {
                return Err(QueueFault::DescriptorIndex {
                    index,
                    size: table.size,
                });
            }
            let limit = table.size.min(MAX_BUFFERS);
            if visited == limit {
                return Err(QueueFault::ChainTooLong { head, limit });
            }
            visited += 1;
            let descriptor = table.read(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                let bad = QueueFault::Indirect {
                    head,
                    len: descriptor.len(),
                };
                let entries = u64::from(descriptor.len()) / DESCRIPTOR_SIZE;
                let whole = u64::from(descriptor.len()) % DESCRIPTOR_SIZE == 0;
                let (true, Ok(size @ 1..)) = (whole, u16::try_from(entries)) else {
                    return Err(bad);
                };
                if indirect || descriptor.has_next() {
                    return Err(bad);
                }
                indirect = true;
                table = Table {
                    address: descriptor.addr(),
                    size,
                };
                index = 0;
                visited = 0;
                continue;
            }
            total = total
                .checked_add(descriptor.len())
                .ok_or(QueueFault::ChainTooBig { head })?;
            self.add(memory, &descriptor)?;
            if !descriptor.has_next() {
                break;
            }
            index = descriptor.next();
        }
        if self.writable_len == 0 {
            self.writable_from = self.pieces.len();
        }
        self.memory = Some(Arc::clone(memory));
        Ok(())
    }

    fn add(&mut self, memory: &Memory, descriptor: &Descriptor) -> Result<(), QueueFault> {
        let writable = descriptor.is_write_only();
        if !writable && self.writable_len > 0 {
            return Err(QueueFault::Order { head: self.head });
        }
        if writable && self.writable_len == 0 {
            self.writable_from = self.pieces.len();
        }
        let bad = || QueueFault::Buffer {
            address: descriptor.addr().0,
            len: descriptor.len(),
        };
        let len = usize::try_from(descriptor.len()).map_err(|_| bad())?;
        if len == 0 {
            return Err(bad());
        }
        let mut guest = descriptor.addr();
        for slice in GuestMemoryBackend::get_slices(memory.guest(), guest, len) {
            let slice = slice.map_err(|_| bad())?;
            self.pieces.push(Piece {
                guest,
                host: slice.ptr_guard_mut().as_ptr(),
                len: slice.len(),
            });
            guest = guest.unchecked_add(slice.len() as u64);
        }
        if writable {
            self.writable_len += len;
        } else {
            self.readable_len += len;
        }
        Ok(())
    }
}

fn outside(piece: &Piece) -> QueueFault {
    QueueFault::Buffer {
        address: piece.guest.0,
        len: u32::try_from(piece.len).unwrap_or(u32::MAX),
    }
}

#[derive(Clone, Copy)]
enum Side {
    Readable,
    Writable,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Readable => "readable",
            Side::Writable => "writable",
        }
    }
}

/// A descriptor table: the ring's own, or an indirect one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub(super) address: GuestAddress,
    pub(super) size: u16,
}

impl Table {
    fn read(&self, memory: &Memory, index: u16) -> Result<Descriptor, QueueFault> {
        let address = self
            .address
            .0
            .saturating_add(u64::from(index) * DESCRIPTOR_SIZE);
        memory
            .guest()
            .read_obj(GuestAddress(address))
            .map_err(|_| QueueFault::RingMemory { address })
    }
}
