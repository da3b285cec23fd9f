//! The network device (Virtio 1.2, section 5.1), without offloads.

use super::Setup;
use super::queue::{Buffer, Queue};
use super::transport::Transport;
use crate::console::fail;
use crate::pci::{Function, Window};
use crate::protocol::Text;
use crate::work::Spread;
use crate::{clock, memory, mmio};
use alloc::vec::Vec;

/// `struct virtio_net_hdr` with `num_buffers`, in front of every frame.
const HEADER: u64 = 12;
/// One buffer: header and frame.
const BUFFER: u64 = 2048;
/// The longest frame that is sent or taken.
pub const MAX_FRAME: usize = 1514;

const F_MAC: u64 = 1 << 5;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;
const CONFIG_MAC: u64 = 0;
const CONFIG_MAX_PAIRS: u64 = 8;
const CLASS_MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;

/// A network device that runs.
pub struct Nic {
    pub mac: [u8; 6],
    /// Queue pairs that the device has.
    pub offered: u16,
    pub pairs: Vec<Pair>,
    /// The CPU that looks after it.
    pub cpu: usize,
}

impl Nic {
    /// Sets up the device with all its queue pairs. One CPU looks after all of them.
    pub fn start(
        function: &Function,
        window: &mut Window<'_>,
        setup: Setup,
        spread: &mut Spread,
    ) -> Self {
        let device = Transport::start(function, window, F_MAC | F_CTRL_VQ | F_MQ, setup);
        let many = device.has(F_MQ) && device.has(F_CTRL_VQ);
        let offered: u16 = if many {
            device.config(CONFIG_MAX_PAIRS)
        } else {
            1
        };
        let count = offered.min(setup.queues);
        let cpu = spread.next_cpu();
        let mut queue = |index| {
            let place = spread.next_on(cpu);
            device.queue(index, place.vector, place.apic_id())
        };
        let mut pairs: Vec<_> = (0..count)
            .map(|pair| Pair::new(queue(2 * pair), queue(2 * pair + 1)))
            .collect();
        // The control queue comes after all the pairs that the device has, not those in use.
        let mut control = device.has(F_CTRL_VQ).then(|| queue(2 * offered));
        device.driver_ok();
        if let Some(control) = control.as_mut().filter(|_| count > 1) {
            set_pairs(control, count, setup.timeout_us);
        }
        pairs.iter_mut().for_each(Pair::offer_all);
        let mac = if device.has(F_MAC) {
            core::array::from_fn(|i| device.config(CONFIG_MAC + i as u64))
        } else {
            [2, 0x47, 0x57, 0, 0, cpu as u8]
        };
        Self {
            mac,
            offered,
            pairs,
            cpu,
        }
    }
}

/// VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (section 5.1.6.5.5).
fn set_pairs(control: &mut Queue, pairs: u16, timeout_us: u64) {
    const NOT_WRITTEN: u8 = 0xee;
    let command = memory::dma(16);
    mmio::write(command, CLASS_MQ);
    mmio::write(command + 1, MQ_PAIRS_SET);
    mmio::write(command + 2, pairs);
    mmio::write(command + 8, NOT_WRITTEN);
    control.submit(
        0,
        &[
            Buffer::readable(command, 2),
            Buffer::readable(command + 2, 2),
            Buffer::writable(command + 8, 1),
        ],
    );
    control.kick();
    let deadline = clock::Deadline::after_us(timeout_us);
    while control.completion().is_none() {
        if deadline.passed() {
            fail("net-control-timeout", pairs.into(), 0, Text::new(""));
        }
        clock::observe();
    }
    let answer = mmio::read::<u8>(command + 8);
    if answer != 0 {
        fail("net-set-pairs", pairs.into(), answer.into(), Text::new(""));
    }
}

/// A receive and a transmit queue, one descriptor a frame.
pub struct Pair {
    receive: Queue,
    transmit: Queue,
    receive_buffers: u64,
    transmit_buffers: u64,
    /// Transmit buffers that the device does not have.
    free: Vec<u16>,
    /// Completions that name no buffer of ours.
    pub stray: u64,
}

impl Pair {
    fn new(receive: Queue, transmit: Queue) -> Self {
        Self {
            receive_buffers: memory::dma(usize::from(receive.size()) * BUFFER as usize),
            transmit_buffers: memory::dma(usize::from(transmit.size()) * BUFFER as usize),
            free: (0..transmit.size()).collect(),
            receive,
            transmit,
            stray: 0,
        }
    }

    fn offer_all(&mut self) {
        for slot in 0..self.receive.size() {
            self.offer(slot);
        }
        self.receive.kick();
    }

    fn offer(&mut self, slot: u16) {
        let address = self.receive_buffers + u64::from(slot) * BUFFER;
        self.receive
            .submit(slot, &[Buffer::writable(address, BUFFER as u32)]);
    }

    /// Copies the next received frame into `frame`; returns its length. Call
    /// [`Pair::kick`] after a batch, to give the buffers back.
    pub fn receive(&mut self, frame: &mut [u8; MAX_FRAME]) -> Option<usize> {
        let completion = self.receive.completion()?;
        let Some(slot) = u16::try_from(completion.head)
            .ok()
            .filter(|&slot| slot < self.receive.size())
        else {
            self.stray += 1;
            return Some(0);
        };
        let length = u64::from(completion.length)
            .saturating_sub(HEADER)
            .min(MAX_FRAME as u64) as usize;
        let from = self.receive_buffers + u64::from(slot) * BUFFER + HEADER;
        for (byte, at) in frame[..length].iter_mut().zip(from..) {
            *byte = mmio::read(at);
        }
        self.offer(slot);
        Some(length)
    }

    /// Queues a frame for transmission; `false` when the ring is full.
    pub fn transmit(&mut self, frame: &[u8]) -> bool {
        self.reclaim();
        let Some(slot) = self.free.pop() else {
            return false;
        };
        let address = self.transmit_buffers + u64::from(slot) * BUFFER;
        mmio::write(address, 0u64);
        mmio::write(address + 8, 0u32);
        let length = frame.len().min(MAX_FRAME);
        for (&byte, at) in frame[..length].iter().zip(address + HEADER..) {
            mmio::write(at, byte);
        }
        self.transmit.submit(
            slot,
            &[Buffer::readable(address, HEADER as u32 + length as u32)],
        );
        true
    }

    fn reclaim(&mut self) {
        while let Some(completion) = self.transmit.completion() {
            match u16::try_from(completion.head) {
                Ok(slot) if slot < self.transmit.size() && !self.free.contains(&slot) => {
                    self.free.push(slot)
                }
                _ => self.stray += 1,
            }
        }
    }

    /// Tells the device of both queues.
    pub fn kick(&mut self) {
        self.receive.kick();
        self.transmit.kick();
    }
}
