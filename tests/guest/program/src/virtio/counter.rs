//! The counting device, which only these tests have: type 63, `godwit-fault`.
//!
//! A request is a token of 8 bytes and room for an answer, which holds again and again the token
//! and a number: the queue's in the highest 16 bits, and below it how many requests of this queue
//! came before.

use super::Setup;
use super::queue::{Buffer, Queue};
use super::transport::Transport;
use crate::pci::{Function, Window};
use crate::work::Spread;
use crate::{memory, mmio};
use alloc::vec::Vec;

/// Bytes of an answer.
const ANSWER: u64 = 512;
/// Bytes of a token's place.
const TOKEN: u64 = 8;
/// Descriptors of a request.
const CHAIN: u16 = 2;

/// A counting device that runs.
pub struct Counter {
    pub queues: Vec<CounterQueue>,
}

impl Counter {
    /// Sets up the device with all its queues, spread over the CPUs.
    pub fn start(
        function: &Function,
        window: &mut Window<'_>,
        setup: Setup,
        spread: &mut Spread,
    ) -> Self {
        let device = Transport::start(function, window, 0, setup);
        let count = device.queue_count().min(setup.queues);
        let queues = (0..count).map(|index| {
            let place = spread.next();
            let queue = device.queue(index, place.vector, place.apic_id());
            let slots = u64::from(queue.size() / CHAIN);
            CounterQueue {
                index,
                cpu: place.cpu,
                tokens: memory::dma((slots * TOKEN) as usize),
                answers: memory::dma((slots * ANSWER) as usize),
                queue,
            }
        });
        let queues = queues.collect();
        device.driver_ok();
        Self { queues }
    }
}

/// What an answer says.
pub struct Answer {
    pub slot: u16,
    /// `None` if it is not the same word again and again, or that of another queue.
    pub content: Option<(u64, u64)>,
}

/// A virtqueue with a token and room for an answer for each slot.
pub struct CounterQueue {
    pub index: u16,
    /// The CPU that its interrupts go to.
    pub cpu: usize,
    queue: Queue,
    tokens: u64,
    answers: u64,
}

impl CounterQueue {
    /// Request slots.
    pub fn slots(&self) -> u16 {
        self.queue.size() / CHAIN
    }

    /// Submits a request. See [`CounterQueue::kick`].
    pub fn submit(&mut self, slot: u16, token: u64) {
        let place = self.tokens + u64::from(slot) * TOKEN;
        let answer = self.answer_at(slot);
        mmio::write(place, token);
        (0..ANSWER / 8).for_each(|n| mmio::write(answer + n * 8, !0u64));
        let buffers = [
            Buffer::readable(place, TOKEN as u32),
            Buffer::writable(answer, ANSWER as u32),
        ];
        self.queue.submit(slot * CHAIN, &buffers);
    }

    /// Tells the device.
    pub fn kick(&mut self) {
        self.queue.kick();
    }

    /// The next answer; its slot may be none that was in use.
    pub fn answer(&mut self) -> Option<Answer> {
        let completion = self.queue.completion()?;
        let slot = (completion.head / u32::from(CHAIN)) as u16;
        let whole = completion.length == ANSWER as u32 && slot < self.slots();
        Some(Answer {
            slot,
            content: whole.then(|| self.content(slot)).flatten(),
        })
    }

    fn answer_at(&self, slot: u16) -> u64 {
        self.answers + u64::from(slot) * ANSWER
    }

    /// Token and number.
    fn content(&self, slot: u16) -> Option<(u64, u64)> {
        let at = self.answer_at(slot);
        let word = |n: u64| mmio::read::<u64>(at + n * 8);
        let (token, number) = (word(0), word(1));
        let same = (0..ANSWER / 16).all(|n| (word(2 * n), word(2 * n + 1)) == (token, number));
        (same && number >> 48 == u64::from(self.index)).then_some((token, number & !(0xffff << 48)))
    }
}
