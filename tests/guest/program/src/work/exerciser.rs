//! Block I/O on one queue, compared byte for byte.
//!
//! Each queue has blocks of its own (those whose number is its own, modulo the queues), so queues
//! need to know nothing of each other and can be on different CPUs.
//!
//! ```text
//! verify:  Fill ─► Flush ─► Check ─► End
//! loop:    Fill ─► Flush ─► Check ─► Random ─(stop)─► Flush ─► Check ─► End
//! read:                     Check of one block ─► End
//! ```
//!
//! A phase ends when its requests are back. A request that does not come back in time is lost, and
//! its slot with it: its memory still belongs to the device.

use super::block::{Plan, Total, count};
use super::devices::Account;
use super::pattern::{Content, Random};
use super::{Step, Task, naps, stopping, wrong};
use crate::console::report;
use crate::protocol::{BlkMode, Report};
use crate::virtio::blk::{Operation, RequestQueue, SECTOR, status};
use crate::{clock, memory, mmio};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// Wrong blocks that are described one by one, of each disk.
const MAX_DESCRIBED: u64 = 8;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Fill,
    Flush,
    Check,
    Random,
}

#[derive(Clone, Copy)]
struct Request {
    operation: Operation,
    block: usize,
}

enum Slot {
    Free,
    InFlight {
        request: Request,
        deadline: u64,
    },
    /// Never answered: its memory still belongs to the device.
    Lost,
}

/// A block of this queue: how often it was written, and whether a request for it is in flight.
#[derive(Clone, Copy, Default)]
struct Block {
    generation: u32,
    busy: bool,
}

/// One queue's work.
pub struct Exerciser {
    total: Arc<Total>,
    plan: Plan,
    queue: RequestQueue,
    index: usize,
    queues: usize,
    data: u64,
    slots: Vec<Slot>,
    in_flight: usize,
    blocks: Vec<Block>,
    phase: Phase,
    /// The next block of Fill and Check, or whether the one flush was sent.
    cursor: usize,
    /// The random part is over, or there is none.
    last_round: bool,
    random: Random,
    next_random: u64,
}

impl Exerciser {
    /// For queue `index` of `queues`.
    pub fn new(
        total: Arc<Total>,
        plan: Plan,
        queue: RequestQueue,
        index: usize,
        queues: usize,
    ) -> Self {
        let own = (plan.blocks as usize + queues - 1 - index) / queues;
        let slots = plan.depth.min(queue.slots());
        Self {
            data: memory::dma(usize::from(slots) * plan.block_bytes as usize),
            slots: (0..slots).map(|_| Slot::Free).collect(),
            in_flight: 0,
            blocks: alloc::vec![Block::default(); if plan.mode == BlkMode::Read { own.min(1) } else { own }],
            phase: if plan.writes {
                Phase::Fill
            } else {
                Phase::Check
            },
            cursor: 0,
            last_round: plan.mode != BlkMode::Loop,
            random: Random::new(u64::from(total.disk) << 32 | index as u64),
            next_random: 0,
            total,
            plan,
            queue,
            index,
            queues,
        }
    }

    fn sector(&self, block: usize) -> u64 {
        (block * self.queues + self.index) as u64 * (self.plan.block_bytes / SECTOR)
    }

    fn buffer(&self, slot: usize) -> u64 {
        self.data + slot as u64 * self.plan.block_bytes
    }

    fn content(&self, block: usize) -> Content {
        Content::new(
            self.total.disk,
            self.sector(block),
            self.blocks[block].generation,
        )
    }

    /// What to send next; `None` when this phase has nothing more, or nothing now.
    fn next_request(&mut self) -> Option<Request> {
        let block = self.cursor;
        match self.phase {
            Phase::Fill if block < self.blocks.len() => {
                self.cursor += 1;
                Some(Request {
                    operation: Operation::Write,
                    block,
                })
            }
            Phase::Check if block < self.blocks.len() => {
                self.cursor += 1;
                Some(Request {
                    operation: Operation::Read,
                    block,
                })
            }
            Phase::Flush if block == 0 && self.plan.flushes => {
                self.cursor = 1;
                Some(Request {
                    operation: Operation::Flush,
                    block: 0,
                })
            }
            Phase::Random => self.random_request(),
            _ => None,
        }
    }

    fn random_request(&mut self) -> Option<Request> {
        if stopping() || self.blocks.is_empty() || clock::now() < self.next_random {
            return None;
        }
        let block = self.random.below(self.blocks.len());
        if self.blocks[block].busy {
            return None;
        }
        self.next_random = clock::now() + self.plan.pace;
        let write = self.plan.writes && self.random.below(2) == 0;
        Some(Request {
            operation: if write {
                Operation::Write
            } else {
                Operation::Read
            },
            block,
        })
    }

    fn submit_all(&mut self) -> bool {
        let mut submitted = false;
        for slot in 0..self.slots.len() {
            if !matches!(self.slots[slot], Slot::Free) {
                continue;
            }
            let Some(request) = self.next_request() else {
                break;
            };
            self.submit(slot, request);
            submitted = true;
        }
        self.queue.kick();
        submitted
    }

    fn submit(&mut self, slot: usize, request: Request) {
        let Request { operation, block } = request;
        let buffer = self.buffer(slot);
        let words = self.plan.block_bytes / 8;
        if operation == Operation::Write {
            self.blocks[block].generation += 1;
            let content = self.content(block);
            (0..words).for_each(|n| mmio::write(buffer + n * 8, content.word(n)));
        } else if operation == Operation::Read {
            // What a device leaves unwritten must not look like the last answer.
            (0..words).for_each(|n| mmio::write(buffer + n * 8, !0u64));
        }
        if operation != Operation::Flush {
            self.blocks[block].busy = true;
        }
        let sector = if operation == Operation::Flush {
            0
        } else {
            self.sector(block)
        };
        self.queue.submit(
            slot as u16,
            operation,
            sector,
            buffer,
            self.plan.block_bytes as u32,
        );
        self.slots[slot] = Slot::InFlight {
            request,
            deadline: clock::now() + self.plan.timeout,
        };
        self.in_flight += 1;
    }

    fn complete_all(&mut self) -> bool {
        let mut completed = false;
        while let Some((slot, status)) = self.queue.completion() {
            completed = true;
            let slot = slot
                .map(usize::from)
                .filter(|&slot| slot < self.slots.len());
            let in_flight = slot.and_then(|slot| match self.slots[slot] {
                Slot::InFlight { request, .. } => Some((slot, request)),
                Slot::Free | Slot::Lost => None,
            });
            match in_flight {
                Some((slot, request)) => self.complete(slot, request, status),
                None => {
                    wrong(1);
                    count(&self.total.duplicates, 1);
                }
            }
        }
        completed
    }

    fn complete(&mut self, slot: usize, request: Request, status: u8) {
        self.slots[slot] = Slot::Free;
        self.in_flight -= 1;
        if let Some(block) = self.blocks.get_mut(request.block) {
            block.busy = false;
        }
        if status != status::OK {
            return self.bad_block(request.block, u64::MAX, status::OK.into(), status.into());
        }
        match request.operation {
            Operation::Write => count(&self.total.writes, 1),
            Operation::Flush => return count(&self.total.flushes, 1),
            _ => {
                self.compare(slot, request.block);
                count(&self.total.reads, 1);
            }
        }
        count(&self.total.bytes, self.plan.block_bytes);
    }

    fn compare(&self, slot: usize, block: usize) {
        if self.blocks[block].generation == 0 {
            return; // never written by us: anything may be there
        }
        let content = self.content(block);
        for n in 0..self.plan.block_bytes / 8 {
            let got = mmio::read::<u64>(self.buffer(slot) + n * 8);
            if got != content.word(n) {
                return self.bad_block(block, n * 8, content.word(n), got);
            }
        }
    }

    fn bad_block(&self, block: usize, offset: u64, want: u64, got: u64) {
        wrong(1);
        if self.total.errors.fetch_add(1, Ordering::Relaxed) < MAX_DESCRIBED {
            report(&Report::BadBlock {
                dev: self.total.disk,
                sector: self.sector(block),
                offset,
                want,
                got,
            });
        }
    }

    fn give_up_late_ones(&mut self) {
        let now = clock::now();
        for slot in &mut self.slots {
            if matches!(slot, Slot::InFlight { deadline, .. } if now >= *deadline) {
                *slot = Slot::Lost;
                self.in_flight -= 1;
                wrong(1);
                count(&self.total.lost, 1);
            }
        }
    }

    /// Goes to the next phase once this one's requests are back. `false` at the end.
    fn advance(&mut self) -> bool {
        let phase = match self.phase {
            Phase::Random if !stopping() => return true,
            Phase::Fill => Phase::Flush,
            Phase::Flush => Phase::Check,
            Phase::Check if self.last_round => return false,
            Phase::Check => Phase::Random,
            Phase::Random => {
                self.last_round = true;
                Phase::Flush
            }
        };
        self.phase = phase;
        self.cursor = 0;
        true
    }

    fn all_slots_lost(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot, Slot::Lost))
    }

    fn finish(&self) -> Step {
        if self.total.unfinished.fetch_sub(1, Ordering::AcqRel) == 1 {
            report(&self.total.report());
        }
        Step::Finished
    }
}

impl Task for Exerciser {
    fn poll(&mut self) -> Step {
        let completed = self.complete_all();
        let submitted = self.submit_all();
        if completed || submitted {
            return Step::Busy;
        }
        if self.in_flight > 0 {
            self.give_up_late_ones();
            // A guest that naps is to miss interrupts, and does not look for work that it cannot do.
            let has_room = self.slots.iter().any(|slot| matches!(slot, Slot::Free));
            let looks = !naps() || has_room && !stopping();
            let until = if self.phase == Phase::Random && looks {
                self.next_random
            } else {
                u64::MAX
            };
            return Step::Idle { until };
        }
        if self.all_slots_lost() || !self.advance() {
            return self.finish();
        }
        if self.phase == Phase::Random && !stopping() {
            return Step::Idle {
                until: self.next_random,
            };
        }
        Step::Busy
    }
}
