//! The work of disks: what is to be done, and the sum of what was.
//!
//! One task a queue does it (`exerciser`).

use super::devices::Account;
use super::exerciser::Exerciser;
use super::{Spread, wrong};
use crate::console::{fail, report};
use crate::pci::{Function, Window};
use crate::protocol::{BlkMode, Report, Text, Workload};
use crate::virtio::Setup;
use crate::virtio::blk::{Disk, Operation, SECTOR, status};
use crate::{clock, memory};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// What one disk's queues did together.
#[derive(Default)]
pub struct Total {
    pub disk: u32,
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub bytes: AtomicU64,
    pub errors: AtomicU64,
    pub duplicates: AtomicU64,
    pub lost: AtomicU64,
    pub unfinished: AtomicUsize,
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

/// Counts up.
pub fn count(counter: &AtomicU64, more: u64) {
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
pub struct Plan {
    pub mode: BlkMode,
    pub writes: bool,
    pub flushes: bool,
    pub block_bytes: u64,
    pub blocks: u64,
    pub depth: u16,
    /// Ticks between two random requests of a queue; 0: none.
    pub pace: u64,
    pub timeout: u64,
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
