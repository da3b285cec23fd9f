//! A split virtqueue as its driver sees it.

use std::collections::BTreeMap;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsRawFd, BorrowedFd};
use vhost::VringConfigData;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ram::GuestRam;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One buffer of a request.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Where it is.
    pub address: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// A request that the device has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head that [`Ring::add`] returned.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// The ring and its eventfds.
#[derive(Debug)]
pub struct Ring {
    size: u16,
    descriptors: GuestAddress,
    available: GuestAddress,
    used: GuestAddress,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    free: Vec<u16>,
    /// By head: the descriptors of a request in flight.
    pending: BTreeMap<u16, Vec<u16>>,
    event_idx: bool,
    /// The guest kicks the device.
    pub kick: EventFd,
    /// The device calls the guest.
    pub call: EventFd,
    /// The device says that the ring is broken.
    pub error: EventFd,
}

impl Ring {
    /// An empty ring of `size` entries.
    pub fn new(ram: &mut GuestRam, size: u16, event_idx: bool) -> Result<Self> {
        let entries = usize::from(size);
        let event = || EventFd::new(EFD_NONBLOCK);
        Ok(Ring {
            size,
            descriptors: ram.allocate(16 * entries, 4096)?,
            available: ram.allocate(6 + 2 * entries, 4096)?,
            used: ram.allocate(6 + 8 * entries, 4096)?,
            next_available: Wrapping(0),
            next_used: Wrapping(0),
            free: (0..size).rev().collect(),
            pending: BTreeMap::new(),
            event_idx,
            kick: event()?,
            call: event()?,
            error: event()?,
        })
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest address of the used ring.
    pub fn used_ring(&self) -> GuestAddress {
        self.used
    }

    /// What SET_VRING_ADDR says of it.
    pub fn config(&self, ram: &GuestRam, log: bool) -> Result<VringConfigData> {
        Ok(VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: u32::from(log),
            desc_table_addr: ram.user_address(self.descriptors)?,
            used_ring_addr: ram.user_address(self.used)?,
            avail_ring_addr: ram.user_address(self.available)?,
            log_addr: log.then_some(self.used.0),
        })
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// The head of one of the requests in flight, or 0.
    pub fn any_head(&self) -> u16 {
        self.pending.keys().next().copied().unwrap_or(0)
    }

    /// Makes a request available and returns its head; the device is not kicked.
    pub fn add(&mut self, ram: &GuestRam, buffers: &[Buffer]) -> Result<u16> {
        ensure!(
            !buffers.is_empty() && buffers.len() <= self.free.len(),
            "no free descriptors"
        );
        let taken: Vec<u16> = self.free.split_off(self.free.len() - buffers.len());
        for (at, buffer) in buffers.iter().enumerate() {
            let next = taken.get(at + 1).copied();
            let mut flags = if buffer.writable { WRITE } else { 0 };
            flags |= if next.is_some() { NEXT } else { 0 };
            let place = (buffer.address.0, buffer.len);
            self.set_descriptor(ram, taken[at], place, flags, next.unwrap_or(0))?;
        }
        let head = taken[0];
        self.pending.insert(head, taken);
        self.publish(ram, head)?;
        Ok(head)
    }

    /// The same request through an indirect table at `table`.
    pub fn add_indirect(
        &mut self,
        ram: &GuestRam,
        table: GuestAddress,
        buffers: &[Buffer],
    ) -> Result<u16> {
        for (at, buffer) in (0u16..).zip(buffers) {
            let last = usize::from(at) + 1 == buffers.len();
            let mut flags = if buffer.writable { WRITE } else { 0 };
            flags |= if last { 0 } else { NEXT };
            let place = (buffer.address.0, buffer.len);
            write_descriptor(ram, table, at, place, flags, at + 1)?;
        }
        let head = self.free.pop().context("no free descriptors")?;
        let len = u32::try_from(buffers.len() * 16)?;
        self.set_descriptor(ram, head, (table.0, len), INDIRECT, 0)?;
        self.pending.insert(head, vec![head]);
        self.publish(ram, head)?;
        Ok(head)
    }

    /// Writes a descriptor as it is told, however wrong: address and length, flags, next.
    pub fn set_descriptor(
        &self,
        ram: &GuestRam,
        index: u16,
        place: (u64, u32),
        flags: u16,
        next: u16,
    ) -> Result<()> {
        write_descriptor(ram, self.descriptors, index, place, flags, next)
    }

    /// Makes a head available, whatever its descriptors say.
    pub fn publish(&mut self, ram: &GuestRam, head: u16) -> Result<()> {
        let slot = u64::from(self.next_available.0 % self.size);
        let entry = GuestAddress(self.available.0 + 4 + 2 * slot);
        ram.memory().write_obj(head.to_le(), entry)?;
        self.set_available_index(ram, self.next_available.0.wrapping_add(1))
    }

    /// Sets the available index, however wrong.
    pub fn set_available_index(&mut self, ram: &GuestRam, index: u16) -> Result<()> {
        self.next_available = Wrapping(index);
        let at = GuestAddress(self.available.0 + 2);
        ram.memory().store(index.to_le(), at, Ordering::Release)?;
        Ok(())
    }

    /// Kicks the device, as the ring's rules demand.
    pub fn kick(&self) -> Result<()> {
        Ok(self.kick.write(1)?)
    }

    /// Takes an answered request, if there is one; one that was not in flight is an error.
    pub fn take_used(&mut self, ram: &GuestRam) -> Result<Option<Used>> {
        let index: u16 = ram
            .memory()
            .load(GuestAddress(self.used.0 + 2), Ordering::Acquire)?;
        if Wrapping(u16::from_le(index)) == self.next_used {
            return Ok(None);
        }
        let slot = u64::from(self.next_used.0 % self.size);
        let entry = self.used.0 + 4 + 8 * slot;
        let id: u32 = ram.memory().read_obj(GuestAddress(entry))?;
        let len: u32 = ram.memory().read_obj(GuestAddress(entry + 4))?;
        let head = u16::try_from(u32::from_le(id))?;
        let freed = self
            .pending
            .remove(&head)
            .with_context(|| format!("request {head} was answered twice or never made"))?;
        self.free.extend(freed);
        self.next_used += 1;
        let len = u32::from_le(len);
        Ok(Some(Used { head, len }))
    }

    /// Waits for the next answered request; only a call counts as news of one.
    pub fn wait_used(&mut self, ram: &GuestRam, patience: Duration) -> Result<Used> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(used) = self.take_used(ram)? {
                return Ok(used);
            }
            if self.event_idx {
                // Asks for a call at the next answer, then looks again.
                let used_event = self.available.0 + 4 + 2 * u64::from(self.size);
                ram.memory().store(
                    self.next_used.0.to_le(),
                    GuestAddress(used_event),
                    Ordering::Release,
                )?;
                fence(Ordering::SeqCst);
                if let Some(used) = self.take_used(ram)? {
                    return Ok(used);
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                wait_readable(&self.call, left)?,
                "{} requests were not answered within {patience:?}",
                self.pending.len()
            );
            self.call.read()?;
        }
    }

    /// Waits until the device says that the ring is broken.
    pub fn wait_broken(&self, patience: Duration) -> Result<()> {
        ensure!(
            wait_readable(&self.error, patience)?,
            "the ring was not found broken"
        );
        self.error.read()?;
        Ok(())
    }

    /// The used index in memory: what a driver, or a front-end without better knowledge, goes by.
    pub fn used_index(&self, ram: &GuestRam) -> Result<u16> {
        let index: u16 = ram.memory().read_obj(GuestAddress(self.used.0 + 2))?;
        Ok(u16::from_le(index))
    }
}

fn write_descriptor(
    ram: &GuestRam,
    table: GuestAddress,
    index: u16,
    (address, len): (u64, u32),
    flags: u16,
    next: u16,
) -> Result<()> {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    ram.write(GuestAddress(table.0 + 16 * u64::from(index)), &bytes)
}

fn wait_readable(event: &EventFd, patience: Duration) -> Result<bool> {
    #[expect(
        unsafe_code,
        reason = "the eventfd type lends its descriptor only by number"
    )]
    // SAFETY: the descriptor is open as long as `event` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut fds, timeout)? > 0)
}
