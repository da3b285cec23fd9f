//! The block device (Virtio 1.2, section 5.2).

use super::Setup;
use super::queue::{Buffer, Queue};
use super::transport::Transport;
use crate::console::fail;
use crate::pci::{Function, Window};
use crate::protocol::Text;
use crate::work::Spread;
use crate::{clock, memory, mmio};
use alloc::vec::Vec;

pub const SECTOR: u64 = 512;
/// Descriptors of a request: header, data, status.
pub const CHAIN: u16 = 3;

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const CONFIG_CAPACITY: u64 = 0;
const CONFIG_NUM_QUEUES: u64 = 34;
const ID_BYTES: u32 = 20;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    Read = 0,
    Write = 1,
    Flush = 4,
    GetId = 8,
    /// No type of the specification; the device must say that it does not know it.
    Unknown = 0x4757,
}

/// What the device says at the end of a request.
pub mod status {
    pub const OK: u8 = 0;
    pub const IO_ERROR: u8 = 1;
    pub const UNSUPPORTED: u8 = 2;
    /// Put there by the driver, to see that the device writes it.
    pub const NOT_WRITTEN: u8 = 0xee;
}

/// A block device that runs.
pub struct Disk {
    pub sectors: u64,
    pub read_only: bool,
    pub can_flush: bool,
    /// Queues that the device has.
    pub offered: u16,
    pub queues: Vec<RequestQueue>,
}

impl Disk {
    /// Sets up the device with all its queues, spread over the CPUs.
    pub fn start(
        function: &Function,
        window: &mut Window<'_>,
        setup: Setup,
        spread: &mut Spread,
    ) -> Self {
        let device = Transport::start(function, window, F_RO | F_FLUSH | F_MQ, setup);
        let offered = if device.has(F_MQ) {
            device.config(CONFIG_NUM_QUEUES)
        } else {
            1
        };
        let offered = offered.min(device.queue_count());
        let queues = (0..offered.min(setup.queues)).map(|index| {
            let place = spread.next();
            let queue = device.queue(index, place.vector, place.apic_id());
            RequestQueue {
                queue,
                headers: memory::dma(usize::from(setup.ring) * HEADER_STEP as usize),
                cpu: place.cpu,
                timeout_us: setup.timeout_us,
            }
        });
        let queues = queues.collect();
        device.driver_ok();
        Self {
            sectors: device.config(CONFIG_CAPACITY),
            read_only: device.has(F_RO),
            can_flush: device.has(F_FLUSH),
            offered,
            queues,
        }
    }

    /// The device's serial number.
    pub fn id(&mut self) -> Text {
        let buffer = memory::dma(ID_BYTES as usize);
        let status = self.queues[0].run(Operation::GetId, 0, buffer, ID_BYTES);
        if status != status::OK {
            return Text::new("");
        }
        let mut id = [0; ID_BYTES as usize];
        for (byte, at) in id.iter_mut().zip(buffer..) {
            *byte = mmio::read(at);
        }
        let length = id.iter().position(|&byte| byte == 0).unwrap_or(id.len());
        Text::from_bytes(&id[..length])
    }
}

/// Bytes between two request headers; the status byte is behind the header.
const HEADER_STEP: u64 = 32;
const STATUS: u64 = 16;

/// A virtqueue with a header and a status byte for each request slot.
pub struct RequestQueue {
    queue: Queue,
    headers: u64,
    /// The CPU that its interrupts go to.
    pub cpu: usize,
    timeout_us: u64,
}

impl RequestQueue {
    /// Request slots.
    pub fn slots(&self) -> u16 {
        self.queue.size() / CHAIN
    }

    /// Submits a request; its data is not looked at for a flush. See [`RequestQueue::kick`].
    pub fn submit(&mut self, slot: u16, operation: Operation, sector: u64, data: u64, length: u32) {
        let header = self.headers + u64::from(slot) * HEADER_STEP;
        // struct virtio_blk_req: type u32, reserved u32, sector u64
        mmio::write(header, operation as u32);
        mmio::write(header + 4, 0u32);
        mmio::write(header + 8, sector);
        mmio::write(header + STATUS, status::NOT_WRITTEN);
        let first = Buffer::readable(header, 16);
        let last = Buffer::writable(header + STATUS, 1);
        let data = match operation {
            Operation::Write => Buffer::readable(data, length),
            _ => Buffer::writable(data, length),
        };
        if operation == Operation::Flush {
            self.queue.submit(slot * CHAIN, &[first, last]);
        } else {
            self.queue.submit(slot * CHAIN, &[first, data, last]);
        }
    }

    /// Tells the device.
    pub fn kick(&mut self) {
        self.queue.kick();
    }

    /// A finished request: its slot (`None` if the device names none) and status.
    pub fn completion(&mut self) -> Option<(Option<u16>, u8)> {
        let completion = self.queue.completion()?;
        let slot = u16::try_from(completion.head / u32::from(CHAIN)).ok();
        let slot =
            slot.filter(|&slot| completion.head % u32::from(CHAIN) == 0 && slot < self.slots());
        let status = slot.map_or(status::NOT_WRITTEN, |slot| {
            mmio::read(self.headers + u64::from(slot) * HEADER_STEP + STATUS)
        });
        Some((slot, status))
    }

    /// Does one request and waits for it; nothing else may be in flight. Returns its status.
    pub fn run(&mut self, operation: Operation, sector: u64, data: u64, length: u32) -> u8 {
        self.submit(0, operation, sector, data, length);
        self.kick();
        let deadline = clock::Deadline::after_us(self.timeout_us);
        loop {
            match self.completion() {
                Some((Some(0), status)) => return status,
                Some((slot, status)) => fail(
                    "block-completion",
                    slot.map_or(u64::MAX, u64::from),
                    status.into(),
                    Text::new("run"),
                ),
                None if deadline.passed() => {
                    fail("block-timeout", operation as u64, sector, Text::new("run"))
                }
                None => clock::observe(),
            };
        }
    }
}
