//! Block I/O that is compared byte for byte.
//!
//! Each queue has blocks of its own (those whose number is its own, modulo the queues), so queues
//! need to know nothing of each other and can be on different CPUs.
//!
//! ```text
//! verify:  Fill ─► Flush ─► Check ─► End
//! loop:    Fill ─► Flush ─► Check ─► Random ─(stop)─► Flush ─► Check ─► End
//! read:                     Check of one block ─► End
//! ```

use super::devices::Account;
use super::pattern::{Content, Random};
use super::{Spread, Step, Task, stopping, wrong};
use crate::console::{fail, report};
use crate::pci::{Function, Window};
use crate::protocol::{BlkMode, Report, Text, Workload};
use crate::virtio::Setup;
use crate::virtio::blk::{Disk, Operation, RequestQueue, SECTOR, status};
use crate::{clock, memory, mmio};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Wrong blocks that are described one by one, of each disk.
const MAX_DESCRIBED: u64 = 8;

/// What one disk's queues did together.
#[derive(Default)]
struct Total {
    disk: u32,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    duplicates: AtomicU64,
    lost: AtomicU64,
    unfinished: AtomicUsize,
}

impl Account for Total {
    fn report(&self) -> Report {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Report::Blk {
            dev: self.disk,
            reads: read(&self.reads),
            writes: read(&self.writes),
            flushes: read(&self.flushes),
            bytes: read(&self.bytes),
            errors: read(&self.errors),
            dup: read(&self.duplicates),
            lost: read(&self.lost),
            end: self.unfinished.load(Ordering::Acquire) == 0,
        }
    }
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// Sets up a disk; the first one is read at once, as a system would look for its root.
pub fn start(
    function: &Function,
    window: &mut Window<'_>,
    setup: Setup,
    spread: &mut Spread,
    workload: &Workload,
    first: bool,
) -> Disk {
    let mut disk = Disk::start(function, window, setup, spread);
    if first && workload.blk != BlkMode::Off {
        let status = disk.queues[0].run(
            Operation::Read,
            0,
            memory::dma(SECTOR as usize),
            SECTOR as u32,
        );
        if status != status::OK {
            fail("first-read", status.into(), 0, Text::new("blk"));
        }
        report(&Report::FirstRead {
            t_us: clock::since_start_us(),
        });
    }
    disk
}

/// Describes a disk and hands out its work, if it has any.
pub fn assign(number: u32, mut disk: Disk, workload: &Workload) -> Option<Arc<dyn Account>> {
    let id = disk.id();
    report(&Report::Disk {
        dev: number,
        queues: disk.queues.len() as u16,
        offered: disk.offered,
        sectors: disk.sectors,
        read_only: disk.read_only,
        id,
    });
    let total = Arc::new(Total {
        disk: number,
        unfinished: AtomicUsize::new(disk.queues.len()),
        ..Total::default()
    });
    match workload.blk {
        BlkMode::Off => return None,
        BlkMode::Errors => {
            provoke_errors(&mut disk, &total);
            return Some(total);
        }
        BlkMode::Read | BlkMode::Verify | BlkMode::Loop => {}
    }
    let plan = Plan::new(&disk, workload);
    let queues = disk.queues.len();
    for (index, queue) in disk.queues.into_iter().enumerate() {
        let cpu = queue.cpu;
        super::assign(
            cpu,
            Box::new(Exerciser::new(total.clone(), plan, queue, index, queues)),
        );
    }
    Some(total)
}

/// Requests that a device must refuse, one after the other.
fn provoke_errors(disk: &mut Disk, total: &Total) {
    let data = memory::dma(SECTOR as usize);
    let cases = [
        (Operation::Read, disk.sectors, status::IO_ERROR),
        (Operation::Write, disk.sectors, status::IO_ERROR),
        (Operation::Read, u64::MAX, status::IO_ERROR),
        (Operation::Unknown, 0, status::UNSUPPORTED),
    ];
    for queue in &mut disk.queues {
        for (operation, sector, want) in cases {
            let got = queue.run(operation, sector, data, SECTOR as u32);
            count(&total.reads, 1);
            if got != want {
                wrong(1);
                count(&total.errors, 1);
                report(&Report::BadBlock {
                    dev: total.disk,
                    sector,
                    offset: operation as u64,
                    want: want.into(),
                    got: got.into(),
                });
            }
        }
        total.unfinished.fetch_sub(1, Ordering::AcqRel);
    }
    report(&total.report());
}

/// What all queues of a disk do.
#[derive(Clone, Copy)]
struct Plan {
    mode: BlkMode,
    writes: bool,
    flushes: bool,
    block_bytes: u64,
    blocks: u64,
    depth: u16,
    /// Ticks between two random requests of a queue; 0: none.
    pace: u64,
    timeout: u64,
}

impl Plan {
    fn new(disk: &Disk, workload: &Workload) -> Self {
        let kib = u64::from(workload.blk_kib);
        if !kib.is_power_of_two() || kib > 64 {
            fail("blk-kib", kib, 0, Text::new("power-of-two-up-to-64"));
        }
        let block_bytes = kib << 10;
        let region = (u64::from(workload.blk_mib) << 20).min(disk.sectors.saturating_mul(SECTOR));
        Self {
            mode: workload.blk,
            writes: workload.blk != BlkMode::Read && !disk.read_only,
            flushes: disk.can_flush,
            block_bytes,
            blocks: region / block_bytes,
            depth: workload.depth.max(1),
            pace: clock::ticks(1_000_000)
                .checked_div(workload.blk_rate.into())
                .unwrap_or(0),
            timeout: clock::ticks(u64::from(workload.timeout) * 1000),
        }
    }
}

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
struct Exerciser {
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
    fn new(
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
            let until = if self.phase == Phase::Random {
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
