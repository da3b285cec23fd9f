//! The memory balloon (Virtio 1.3, section 5.5).

use super::Setup;
use super::queue::{Buffer, Queue};
use super::transport::Transport;
use crate::console::fail;
use crate::memory::{self, PAGE};
use crate::pci::{Function, Window};
use crate::protocol::Text;
use crate::work::Spread;
use crate::{clock, mmio};
use alloc::vec::Vec;

const F_MUST_TELL_HOST: u64 = 1 << 0;
const F_STATS_VQ: u64 = 1 << 1;
const F_FREE_PAGE_HINT: u64 = 1 << 3;
const F_PAGE_POISON: u64 = 1 << 4;
const F_PAGE_REPORTING: u64 = 1 << 5;
const CONFIG_TARGET: u64 = 0;
const CONFIG_ACTUAL: u64 = 4;
const CONFIG_COMMAND: u64 = 8;
const CONFIG_POISON: u64 = 12;
/// The statistic that is given: memory that is free, in bytes.
const FREE: u16 = 4;
/// What free memory is filled with, when it is poisoned.
const POISON: u32 = 0xaaaa_aaaa;
/// The same as a word of memory.
pub const POISONED: u64 = POISON as u64 | (POISON as u64) << 32;
/// Most pages of one request to inflate or deflate.
pub const MAX_PAGES: usize = 256;
/// The lowest number of a round of hints.
pub const FIRST_ROUND: u32 = 2;
/// Ends the hints of a round.
pub const STOP: u32 = 0;
/// Says that all pages that were named may be used again.
pub const DONE: u32 = 1;

/// A balloon that runs.
pub struct Balloon {
    device: Transport,
    inflate: Queue,
    deflate: Queue,
    statistics: Queue,
    hints: Queue,
    reports: Queue,
    /// A page for the numbers of pages.
    numbers: u64,
    /// Before eight bytes of value lie two of what it is.
    statistic: u64,
    /// How often statistics were given.
    told: u64,
    /// A command for each entry of the hint queue.
    commands: u64,
    /// Entries of the hint queue that are not in flight.
    free: Vec<u16>,
    timeout_us: u64,
    /// The CPU that interrupts go to.
    pub cpu: usize,
}

impl Balloon {
    /// Sets up the device. When the guest `poisons`, free memory keeps what it is filled with.
    pub fn start(
        function: &Function,
        window: &mut Window<'_>,
        setup: Setup,
        spread: &mut Spread,
        poisons: bool,
    ) -> Self {
        let poison = if poisons { F_PAGE_POISON } else { 0 };
        let needed = F_STATS_VQ | F_FREE_PAGE_HINT | F_PAGE_REPORTING | poison;
        let wanted = F_MUST_TELL_HOST | needed;
        let device = Transport::start(function, window, wanted, setup);
        if !device.has(needed) {
            fail("balloon-features", needed, 0, Text::new(""));
        }
        let place = spread.next();
        let [inflate, deflate, statistics, hints, reports] =
            [0, 1, 2, 3, 4].map(|index| device.queue(index, place.vector, place.apic_id()));
        if poisons {
            device.set_config(CONFIG_POISON, POISON);
        }
        device.driver_ok();
        let free = (0..hints.size()).rev().collect();
        Self {
            device,
            inflate,
            deflate,
            statistics,
            hints,
            reports,
            numbers: memory::dma(PAGE as usize),
            statistic: memory::dma(16),
            told: 0,
            commands: memory::dma(PAGE as usize),
            free,
            timeout_us: setup.timeout_us,
            cpu: place.cpu,
        }
    }

    /// Pages that the host wants.
    pub fn target(&self) -> u64 {
        self.device.config::<u32>(CONFIG_TARGET).into()
    }

    /// Tells the host how many pages it has.
    pub fn set_actual(&self, pages: u64) {
        self.device.set_config(CONFIG_ACTUAL, pages as u32);
    }

    /// Gives statistics, at first and whenever the host asks: as the memory that is free, how
    /// often they were given.
    pub fn tell(&mut self) {
        if self.told == 0 || self.statistics.completion().is_some() {
            self.told += 1;
            mmio::write(self.statistic + 6, FREE);
            mmio::write(self.statistic + 8, self.told);
            self.statistics
                .submit(0, &[Buffer::readable(self.statistic + 6, 10)]);
            self.statistics.kick();
        }
    }

    /// The round of hints that the host wants, or that it wants none.
    pub fn command(&self) -> u32 {
        self.device.config(CONFIG_COMMAND)
    }

    /// Gives pages, by their addresses; they are not this program's when it returns.
    pub fn inflate(&mut self, pages: impl Iterator<Item = u64>) {
        let names = self.name(pages);
        run(&mut self.inflate, names, self.timeout_us);
    }

    /// Takes pages back.
    pub fn deflate(&mut self, pages: impl Iterator<Item = u64>) {
        let names = self.name(pages);
        run(&mut self.deflate, names, self.timeout_us);
    }

    fn name(&self, pages: impl Iterator<Item = u64>) -> Buffer {
        let mut count = 0;
        for (at, page) in (self.numbers..).step_by(4).zip(pages.take(MAX_PAGES)) {
            mmio::write(at, (page / PAGE) as u32);
            count += 1;
        }
        Buffer::readable(self.numbers, count * 4)
    }

    /// Reports memory as free; what is in it when this returns is anything.
    pub fn report(&mut self, address: u64, length: u32) {
        let lent = Buffer::writable(address, length);
        run(&mut self.reports, lent, self.timeout_us);
    }

    /// Says of which round the hints are that follow. `false` when the queue is full.
    pub fn say(&mut self, command: u32) -> bool {
        let Some(slot) = self.free.pop() else {
            return false;
        };
        let cell = self.commands + u64::from(slot) * 4;
        mmio::write(cell, command);
        self.hints.submit(slot, &[Buffer::readable(cell, 4)]);
        self.hints.kick();
        true
    }

    /// Names memory that is free. `false` when the queue is full.
    pub fn hint(&mut self, address: u64, length: u32) -> bool {
        let Some(slot) = self.free.pop() else {
            return false;
        };
        self.hints
            .submit(slot, &[Buffer::writable(address, length)]);
        self.hints.kick();
        true
    }

    /// Takes note of hints that the device has seen.
    pub fn reap(&mut self) {
        while let Some(completion) = self.hints.completion() {
            let slot = completion.head as u16;
            if self.free.contains(&slot) || slot >= self.hints.size() {
                fail("hint-completion", slot.into(), 0, Text::new(""));
            }
            self.free.push(slot);
        }
    }

    /// Whether the device has seen all hints.
    pub fn is_quiet(&self) -> bool {
        self.free.len() == usize::from(self.hints.size())
    }
}

fn run(queue: &mut Queue, buffer: Buffer, timeout_us: u64) {
    queue.submit(0, &[buffer]);
    queue.kick();
    let deadline = clock::Deadline::after_us(timeout_us);
    while queue.completion().is_none() {
        if deadline.passed() {
            fail("balloon-timeout", buffer.length.into(), 0, Text::new(""));
        }
        core::hint::spin_loop();
    }
}
