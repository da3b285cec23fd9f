//! Split virtqueues (Virtio 1.2, section 2.7).
//!
//! Descriptors belong to the driver's request slots, a fixed number each, so nothing is allocated:
//! slot n of a driver with k buffers a request has descriptors n·k … n·k+k-1, and its request is
//! known by the first of them.

use crate::console::fail;
use crate::protocol::Text;
use crate::{memory, mmio};
use core::sync::atomic::{Ordering, fence};

const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// A piece of memory that the device reads or writes.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub length: u32,
    pub device_writes: bool,
}

impl Buffer {
    pub fn readable(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            device_writes: false,
        }
    }

    pub fn writable(address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            device_writes: true,
        }
    }
}

/// A request that the device has finished.
#[derive(Clone, Copy)]
pub struct Completion {
    /// The first descriptor of its chain, as the device says.
    pub head: u32,
    /// Bytes that the device says it wrote.
    pub length: u32,
}

/// One virtqueue.
pub struct Queue {
    index: u16,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    notify: u64,
    event_idx: bool,
    interrupts: bool,
    /// Next available index; published by `kick`.
    next_available: u16,
    /// Available index at the last `kick`.
    kicked: u16,
    next_used: u16,
}

impl Queue {
    pub fn new(index: u16, size: u16, notify: u64, event_idx: bool, interrupts: bool) -> Self {
        let entries = u64::from(size);
        let available = (entries * 16).next_multiple_of(2);
        let used = (available + 6 + entries * 2).next_multiple_of(4);
        let memory = memory::dma((used + 6 + entries * 8) as usize);
        let queue = Self {
            index,
            size,
            descriptors: memory,
            available: memory + available,
            used: memory + used,
            notify,
            event_idx,
            interrupts,
            next_available: 0,
            kicked: 0,
            next_used: 0,
        };
        if !interrupts {
            mmio::write(queue.available, NO_INTERRUPT);
        }
        queue
    }

    /// Addresses of the descriptor table, the driver area and the device area.
    pub fn parts(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// Makes a request of `buffers`, with descriptors from `head` on. The device sees it at the
    /// next [`Queue::kick`].
    pub fn submit(&mut self, head: u16, buffers: &[Buffer]) {
        for (i, buffer) in (0u16..).zip(buffers) {
            let last = usize::from(i) + 1 == buffers.len();
            let at = self.descriptors + u64::from(head + i) * 16;
            let writes = if buffer.device_writes {
                DEVICE_WRITES
            } else {
                0
            };
            mmio::write(at, buffer.address);
            mmio::write(at + 8, buffer.length);
            mmio::write(at + 12, writes | if last { 0 } else { NEXT });
            mmio::write(at + 14, if last { 0 } else { head + i + 1 });
        }
        let slot = self.available + 4 + u64::from(self.next_available % self.size) * 2;
        mmio::write(slot, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Shows all submitted requests to the device, and tells it if it wants to be told.
    pub fn kick(&mut self) {
        let old = self.kicked;
        let new = self.next_available;
        if old == new {
            return;
        }
        self.kicked = new;
        fence(Ordering::Release);
        mmio::write(self.available + 2, new);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = mmio::read::<u16>(self.used + 4 + u64::from(self.size) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            mmio::read::<u16>(self.used) & NO_NOTIFY == 0
        };
        if wanted {
            mmio::write(self.notify, self.index);
        }
    }

    /// The next finished request. When there is none, the device is asked for an interrupt at the
    /// next one (if interrupts are used at all).
    pub fn completion(&mut self) -> Option<Completion> {
        if self.is_empty() {
            if !self.interrupts || !self.event_idx {
                return None;
            }
            mmio::write(
                self.available + 4 + u64::from(self.size) * 2,
                self.next_used,
            );
            fence(Ordering::SeqCst);
            if self.is_empty() {
                return None;
            }
        }
        fence(Ordering::Acquire);
        let at = self.used + 4 + u64::from(self.next_used % self.size) * 8;
        self.next_used = self.next_used.wrapping_add(1);
        Some(Completion {
            head: mmio::read(at),
            length: mmio::read(at + 4),
        })
    }

    fn is_empty(&self) -> bool {
        let index = mmio::read::<u16>(self.used + 2);
        let news = index.wrapping_sub(self.next_used);
        if news > self.size {
            fail(
                "used-index",
                index.into(),
                self.next_used.into(),
                Text::new("virtqueue"),
            );
        }
        news == 0
    }
}
