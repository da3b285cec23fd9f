//! `godwit-balloon` as a subject, and what is tested of it alone.

use anyhow::{Result, ensure};
use test_framework::frontend::{Buffer, DeviceSpec, Machine, PATIENCE};
use vm_memory::GuestAddress;

use crate::subject::Subject;

mod hints;
mod hostile;
mod memory;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// VIRTIO_BALLOON_F_*, by name.
const MUST_TELL_HOST: u64 = 1 << 0;
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const FREE_PAGE_HINT: u64 = 1 << 3;
const PAGE_POISON: u64 = 1 << 4;
const PAGE_REPORTING: u64 = 1 << 5;
/// All but statistics, whose queue answers when it is time and not when it is asked.
const FEATURES: u64 =
    MUST_TELL_HOST | DEFLATE_ON_OOM | FREE_PAGE_HINT | PAGE_POISON | PAGE_REPORTING;

/// Queues with [`FEATURES`].
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const HINTS: usize = 2;
const REPORTS: usize = 3;

/// Offsets in the configuration space.
const TARGET_AT: u32 = 0;
const ACTUAL_AT: u32 = 4;
const COMMAND_AT: u32 = 8;
const POISON_AT: u32 = 12;

/// Requests of one load on each queue.
const LOAD: usize = 12;

/// The device, and the pages that it was given and must have taken.
pub(crate) struct Balloon {
    given: Vec<GuestAddress>,
}

/// `count` pages of guest memory that hold something.
fn used_pages(machine: &mut Machine, count: usize) -> Result<GuestAddress> {
    let len = count * usize::try_from(PAGE)?;
    let start = machine.ram.allocate(len, PAGE)?;
    machine.ram.write(start, &vec![0xa5; len])?;
    Ok(start)
}

/// Makes a request available that names pages by their numbers.
fn name_pages(machine: &mut Machine, queue: usize, numbers: &[u32]) -> Result<u16> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    let address = machine.ram.allocate(bytes.len(), 4)?;
    machine.ram.write(address, &bytes)?;
    let buffer = Buffer {
        address,
        len: u32::try_from(bytes.len())?,
        writable: false,
    };
    let Machine { rings, ram, .. } = machine;
    rings[queue].add(ram, &[buffer])
}

/// The numbers of `count` pages from `start` on.
fn numbers(start: GuestAddress, count: u32) -> Result<Vec<u32>> {
    let first = u32::try_from(start.0 / PAGE)?;
    Ok((first..first + count).collect())
}

/// Makes a request available that lends memory.
fn lend(machine: &mut Machine, queue: usize, address: GuestAddress, len: u32) -> Result<u16> {
    let buffer = Buffer {
        address,
        len,
        writable: true,
    };
    let Machine { rings, ram, .. } = machine;
    rings[queue].add(ram, &[buffer])
}

/// Kicks a queue and waits for all of its requests.
fn finish(machine: &mut Machine, queue: usize) -> Result<()> {
    let Machine { rings, ram, .. } = machine;
    rings[queue].kick()?;
    while rings[queue].in_flight() > 0 {
        rings[queue].wait_used(ram, PATIENCE)?;
    }
    Ok(())
}

/// Whether a page is all zero.
fn is_zero(machine: &Machine, page: GuestAddress) -> Result<bool> {
    let bytes = machine.ram.read(page, usize::try_from(PAGE)?)?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

impl Balloon {
    fn spec_with(option: &str) -> DeviceSpec {
        DeviceSpec {
            program: Self::PROGRAM,
            arguments: vec![option.to_owned()],
        }
    }

    fn verify(&mut self, machine: &Machine) -> Result<()> {
        for page in self.given.drain(..) {
            ensure!(is_zero(machine, page)?, "page {page:?} is still there");
        }
        Ok(())
    }
}

impl Subject for Balloon {
    const PROGRAM: &'static str = "godwit-balloon";
    const KIND: &'static str = "balloon";
    const TYPE: &'static str = "balloon";
    const FEATURES: u64 = FEATURES;
    const QUEUES: usize = 4;

    fn new() -> Result<Self> {
        Ok(Balloon { given: Vec::new() })
    }

    fn spec(&self) -> DeviceSpec {
        Self::spec_with("--statistics-interval=1")
    }

    fn twin_spec(&self) -> DeviceSpec {
        self.spec()
    }

    fn exchange(&mut self, machine: &mut Machine) -> Result<()> {
        self.load(machine)?;
        self.settle(machine)
    }

    fn load(&mut self, machine: &mut Machine) -> Result<()> {
        let len = u32::try_from(PAGE)?;
        for _ in 0..LOAD {
            let page = used_pages(machine, 4)?;
            let [inflated, deflated, reported, hinted] =
                [0, 1, 2, 3].map(|n| GuestAddress(page.0 + n * PAGE));
            name_pages(machine, INFLATE, &numbers(inflated, 1)?)?;
            name_pages(machine, DEFLATE, &numbers(deflated, 1)?)?;
            lend(machine, HINTS, hinted, len)?;
            lend(machine, REPORTS, reported, len)?;
            self.given.extend([inflated, reported]);
            for ring in &machine.rings {
                ring.kick()?;
            }
        }
        Ok(())
    }

    fn settle(&mut self, machine: &mut Machine) -> Result<()> {
        for queue in 0..Self::QUEUES {
            finish(machine, queue)?;
        }
        self.verify(machine)
    }

    /// Pages that come back are zero, and said to be new.
    fn write_to_guest(&mut self, machine: &mut Machine) -> Result<Vec<u64>> {
        let page = used_pages(machine, 2)?;
        let reported = GuestAddress(page.0 + PAGE);
        name_pages(machine, DEFLATE, &numbers(page, 1)?)?;
        lend(machine, REPORTS, reported, u32::try_from(PAGE)?)?;
        self.exchange(machine)?;
        Ok(vec![page.0, reported.0])
    }

    fn change_state(&mut self, machine: &mut Machine) -> Result<()> {
        machine
            .connection
            .set_config(ACTUAL_AT, &77u32.to_le_bytes())
    }

    fn verify_state(&mut self, machine: &mut Machine) -> Result<()> {
        let actual = machine.connection.config(ACTUAL_AT, 4)?;
        ensure!(actual == 77u32.to_le_bytes(), "it holds {actual:?} pages");
        Ok(())
    }
}
