//! The work of copying devices: each copies random pieces of memory, which must then be equal, and
//! tells the end by an interrupt; its own memory keeps what is written there from the start to the end.

use super::devices::Account;
use super::pattern::{Random, mix};
use super::{Step, Task, wrong};
use crate::clock;
use crate::console::report;
use crate::copier::{Copier, MEMORY, Order, VECTORS};
use crate::protocol::{Report, Workload};
use crate::{memory, mmio};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes of the longest copy.
const LONGEST: usize = 64 << 10;
const WORDS: u64 = LONGEST as u64 / 8;
/// Where there is no memory.
const NOWHERE: u64 = 1 << 45;

#[derive(Default)]
struct Total {
    number: u32,
    copies: AtomicU64,
    bytes: AtomicU64,
    irqs: AtomicU64,
    errors: AtomicU64,
    ended: AtomicBool,
}

impl Account for Total {
    fn report(&self) -> Report {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Report::Copy {
            dev: self.number,
            copies: read(&self.copies),
            bytes: read(&self.bytes),
            irqs: read(&self.irqs),
            errors: read(&self.errors),
            end: self.ended.load(Ordering::Relaxed),
        }
    }
}

/// Hands out the work of a device.
pub fn assign(number: u32, device: Copier, workload: &Workload) -> Arc<dyn Account> {
    let total = Arc::new(Total {
        number,
        ..Total::default()
    });
    let task = Copying {
        total: total.clone(),
        source: memory::dma(LONGEST),
        destination: memory::dma(LONGEST),
        left: workload.copies,
        done: 0,
        awaited: None,
        random: Random::new(number.into()),
        device,
    };
    task.begin();
    super::assign(task.device.cpu, Box::new(task));
    total
}

/// An interrupt that is to come.
#[derive(Clone, Copy)]
struct Awaited {
    vector: u32,
    /// How many there were before.
    before: u32,
    until: u64,
}

struct Copying {
    total: Arc<Total>,
    device: Copier,
    source: u64,
    destination: u64,
    left: u32,
    done: u64,
    awaited: Option<Awaited>,
    random: Random,
}

impl Copying {
    fn check(&self, is_right: bool) {
        if !is_right {
            wrong(1);
            self.total.errors.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A device after a reset has forgotten everything.
    fn begin(&self) {
        self.check(self.device.counted() == (0, 0));
        self.check(self.device.keeps(0x1234_5678) && self.device.keeps(0));
        let words = 0..MEMORY / 8;
        self.check(words.clone().all(|n| self.device.word(n) == 0));
        words.for_each(|n| self.device.set_word(n, mix(n)));
    }

    fn copy(&mut self) {
        let words = self.random.below(WORDS as usize) as u64 + 1;
        let seed = mix(self.done + 1);
        for n in 0..words {
            mmio::write(self.source + n * 8, seed.wrapping_add(n));
        }
        let vector = (self.done % VECTORS as u64) as u32;
        let before = self.device.interrupts_of(vector);
        let error = self.device.copy(Order {
            source: self.source,
            destination: self.destination,
            length: (words * 8) as u32,
            vector,
        });
        let word = |n: u64| mmio::read::<u64>(self.destination + n * 8);
        let is_right = error == 0 && (0..words).all(|n| word(n) == seed.wrapping_add(n));
        self.check(is_right);
        if is_right {
            self.total.copies.fetch_add(1, Ordering::Relaxed);
            self.total.bytes.fetch_add(words * 8, Ordering::Relaxed);
        }
        self.done += 1;
        self.awaited = self.device.interrupts.then(|| Awaited {
            vector,
            before,
            until: clock::now() + clock::ticks(self.device.timeout_us),
        });
    }

    /// What is wrong has its error.
    fn refuses(&self) {
        let right = Order {
            source: self.source,
            destination: self.destination,
            length: 8,
            vector: 0,
        };
        let [mut length, mut source, mut destination, mut vector] = [right; 4];
        length.length = 0;
        source.source = NOWHERE;
        destination.destination = NOWHERE;
        vector.vector = VECTORS as u32;
        for (order, error) in [(length, 1), (source, 2), (destination, 3), (vector, 5)] {
            self.check(self.device.copy(order) == error);
        }
        self.check(self.device.command(99, right) == 6);
    }

    fn end(&self) {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counted = (read(&self.total.copies), read(&self.total.bytes));
        self.check(self.device.counted() == counted);
        self.refuses();
        self.check((0..MEMORY / 8).all(|n| self.device.word(n) == mix(n)));
        self.total.ended.store(true, Ordering::Relaxed);
        report(&self.total.report());
    }
}

impl Task for Copying {
    fn poll(&mut self) -> Step {
        if let Some(awaited) = self.awaited {
            let came = self.device.interrupts_of(awaited.vector) != awaited.before;
            if !came && clock::now() < awaited.until {
                return Step::Idle {
                    until: awaited.until,
                };
            }
            self.check(came);
            self.total.irqs.fetch_add(came.into(), Ordering::Relaxed);
            self.awaited = None;
        }
        if self.left == 0 {
            self.end();
            return Step::Finished;
        }
        self.left -= 1;
        self.copy();
        Step::Busy
    }
}
