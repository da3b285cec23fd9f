//! Guests that name what is not there, or too much of it.

use anyhow::{Result, ensure};
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
