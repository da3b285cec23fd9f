//! Guests that name what is not there, or too much of it.

use anyhow::{Context as _, Result, ensure};
use test_framework::frontend::{Machine, MachineOptions, PATIENCE};

use super::memory::linked;
use super::*;
use crate::subject::{options, running};

#[test]
fn pages_that_are_none_are_passed_over() -> Result<()> {
    let (mut machine, core) = linked(FEATURES, 4)?;
    let page = used_pages(&mut machine, 1)?;
    for queue in [INFLATE, DEFLATE] {
        // Below memory, above it, at its end, and one that is there, in the middle of them.
        let there = u32::try_from(page.0 / PAGE)?;
        let end = u32::try_from((0x10_0000 + (64 << 20)) / PAGE)?;
        name_pages(&mut machine, queue, &[0, 255, there, end, u32::MAX])?;
        finish(&mut machine, queue)?;
    }
    ensure!(is_zero(&machine, page)?);
    let statistics = core.statistics()?;
    assert_eq!(statistics["no_memory_pages"], 8);
    assert_eq!(
        (statistics["inflated_pages"], statistics["deflated_pages"]),
        (1, 1)
    );
    Ok(())
}

/// Sends a request that breaks its ring, and nothing else.
fn broken(queue: usize, request: impl FnOnce(&mut Machine) -> Result<()>) -> Result<()> {
    // Without a record of what is in flight, which outlives the reset.
    let mut subject = Balloon::new()?;
    let mut machine = Machine::start(MachineOptions {
        inflight: false,
        ..options(&subject)
    })?;
    request(&mut machine)?;
    machine.rings[queue].kick()?;
    machine.rings[queue].wait_broken(PATIENCE)?;
    machine.reset()?;
    subject.exchange(&mut machine)
}

#[test]
fn requests_that_are_none_break_their_ring_only() -> Result<()> {
    let add = |machine: &mut Machine, queue: usize, len, writable| -> Result<()> {
        let address = machine.ram.allocate(512 << 10, PAGE)?;
        let buffer = Buffer {
            address,
            len,
            writable,
        };
        let Machine { rings, ram, .. } = machine;
        rings[queue].add(ram, &[buffer])?;
        Ok(())
    };
    // Numbers of three bytes, no number, more numbers than any guest has in one request.
    for (len, writable) in [(7, false), (4, true), (4 * 65537, false)] {
        broken(INFLATE, |machine| add(machine, INFLATE, len, writable))?;
        broken(DEFLATE, |machine| add(machine, DEFLATE, len, writable))?;
    }
    // A command of another length.
    for len in [3, 5, 4096] {
        broken(HINTS, |machine| add(machine, HINTS, len, false))?;
    }
    Ok(())
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Descriptors of a chain that a device takes, in an indirect table.
const LONGEST: u16 = 1024;
/// Queues with statistics, which are the third of five.
const WITH_STATISTICS: usize = 5;

/// Chains that never end, or not where they may: what is written to the ring and to memory, and
/// what the device says of it.
#[derive(Clone, Copy, Debug)]
enum Endless {
    /// A descriptor that is its own next one.
    OnItself,
    /// Through every descriptor of the table, and from the last one to the first.
    Around,
    /// In an indirect table, from the last entry to the first.
    InATable,
    /// An indirect table that is an entry of itself.
    TableInATable,
    /// An indirect table with more entries than a device takes.
    LongTable,
}

impl Endless {
    const ALL: [Self; 5] = [
        Self::OnItself,
        Self::Around,
        Self::InATable,
        Self::TableInATable,
        Self::LongTable,
    ];

    fn reason(self) -> &'static str {
        match self {
            Self::OnItself | Self::Around | Self::InATable | Self::LongTable => {
                "is a loop or longer than"
            }
            Self::TableInATable => "indirect",
        }
    }

    /// Writes it into a ring's table, of buffers that the queue would take, and makes it available.
    fn publish(self, machine: &mut Machine, queue: usize) -> Result<()> {
        let page = used_pages(machine, 1)?;
        let writes = if queue >= WITH_STATISTICS - 2 {
            WRITE
        } else {
            0
        };
        let size = machine.rings[queue].size();
        let entries = match self {
            Self::LongTable => LONGEST + 1,
            _ => 4,
        };
        let table = machine.ram.allocate(usize::from(entries) * 16, 16)?;
        let Machine { rings, ram, .. } = machine;
        let ring = &mut rings[queue];
        let len = u32::from(entries) * 16;
        match self {
            Self::OnItself => ring.set_descriptor(ram, 0, (page.0, 4), NEXT | writes, 0)?,
            Self::Around => {
                for at in 0..size {
                    let place = (page.0 + u64::from(at) * 4, 4);
                    ring.set_descriptor(ram, at, place, NEXT | writes, (at + 1) % size)?;
                }
            }
            Self::InATable | Self::TableInATable | Self::LongTable => {
                for at in 0..entries {
                    let is_last = at + 1 == entries;
                    let (place, flags, next) = match self {
                        Self::TableInATable => ((table.0, len), INDIRECT, 0),
                        Self::LongTable if is_last => ((page.0, 4), writes, 0),
                        _ => ((page.0, 4), NEXT | writes, (at + 1) % entries),
                    };
                    let mut entry = [0; 16];
                    entry[..8].copy_from_slice(&u64::to_le_bytes(place.0));
                    entry[8..12].copy_from_slice(&u32::to_le_bytes(place.1));
                    entry[12..14].copy_from_slice(&u16::to_le_bytes(flags));
                    entry[14..].copy_from_slice(&u16::to_le_bytes(next));
                    ram.write(GuestAddress(table.0 + u64::from(at) * 16), &entry)?;
                }
                ring.set_descriptor(ram, 0, (table.0, len), INDIRECT, 0)?;
            }
        }
        ring.publish(ram, 0)
    }
}

/// On each queue: its ring is broken for a reason that is named, and the others are served on.
#[test]
fn endless_chains_break_their_ring_only() -> Result<()> {
    let subject = Balloon::new()?;
    for queue in 0..WITH_STATISTICS {
        for endless in Endless::ALL {
            let mut machine = Machine::start(MachineOptions {
                features: FEATURES | STATS_VQ,
                queues: WITH_STATISTICS,
                inflight: false,
                ..options(&subject)
            })?;
            let what = || format!("{endless:?} on queue {queue}");
            endless.publish(&mut machine, queue)?;
            machine.rings[queue].kick()?;
            let broken = machine.rings[queue].wait_broken(PATIENCE);
            broken.with_context(what)?;
            machine
                .process
                .wait_log(endless.reason())
                .with_context(what)?;
            let other = if queue == INFLATE { DEFLATE } else { INFLATE };
            let page = used_pages(&mut machine, 1)?;
            name_pages(&mut machine, other, &numbers(page, 1)?)?;
            finish(&mut machine, other).with_context(what)?;
            ensure!(!machine.process.has_ended(), "{}", what());
        }
    }
    Ok(())
}

#[test]
fn a_guest_may_give_away_all_of_its_memory() -> Result<()> {
    let (mut subject, mut machine) = running::<Balloon>()?;
    used_pages(&mut machine, 1000)?;
    // The rings too: what becomes of them is the guest's own trouble.
    let start = GuestAddress(0x10_0000);
    lend(&mut machine, REPORTS, start, 64 << 20)?;
    machine.rings[REPORTS].kick()?;
    test_framework::frontend::wait_for("the memory is given", || {
        let left = machine.ram.allocated().ok()?;
        (left < 64 * PAGE).then_some(())
    })?;
    machine.reconnect_roughly()?;
    machine.reset()?;
    subject.exchange(&mut machine)?;
    ensure!(!machine.process.has_ended());
    Ok(())
}
