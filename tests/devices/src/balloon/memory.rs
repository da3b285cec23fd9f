//! Memory that the guest gives really returns to the host, and comes back as zeroes.

use std::io::Read as _;
use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};
use api::balloon1::Balloon1Proxy;
use test_framework::frontend::{Buffer, Machine, MachineOptions, PATIENCE, wait_for};
use vhost::vhost_user::VhostUserFrontend as _;
use vm_memory::GuestAddress;
use zbus::proxy::CacheProperties;

use super::*;
use crate::cases::link::{Core, link, linked_with};
use crate::subject::{options, running};

/// A machine with these features and queues, and the core's end of its link.
pub(super) fn linked(features: u64, queues: usize) -> Result<(Machine, Core)> {
    let options = MachineOptions {
        features,
        queues,
        ..options(&Balloon::new()?)
    };
    let (machine, socket) = linked_with(options)?;
    Ok((machine, Core::new(socket)?))
}

/// Asks the balloon something.
pub(super) fn ask<T>(
    core: &Core,
    question: impl AsyncFnOnce(&Balloon1Proxy<'_>) -> Result<T>,
) -> Result<T> {
    let asked = async {
        let balloon = Balloon1Proxy::builder(&core.connection)
            .cache_properties(CacheProperties::No)
            .build()
            .await?;
        question(&balloon).await
    };
    core.runtime
        .block_on(async { tokio::time::timeout(PATIENCE, asked).await })?
}

/// A word of the configuration space.
pub(super) fn config(machine: &mut Machine, at: u32) -> Result<u32> {
    let bytes = machine.connection.config(at, 4)?;
    Ok(u32::from_le_bytes(bytes.as_slice().try_into()?))
}

#[test]
fn inflated_pages_are_spent_no_more_and_come_back_as_zeroes() -> Result<()> {
    let (_, mut machine) = running::<Balloon>()?;
    let start = used_pages(&mut machine, 1000)?;
    let before = machine.ram.allocated()?;
    // In no order, some twice, in several requests.
    let mut numbers = numbers(start, 1000)?;
    numbers.rotate_left(333);
    numbers.extend_from_within(..100);
    for part in numbers.chunks(256) {
        name_pages(&mut machine, INFLATE, part)?;
    }
    finish(&mut machine, INFLATE)?;
    let after = machine.ram.allocated()?;
    // Requests and rings took a few pages.
    ensure!(
        (before - after) >= 990 * PAGE,
        "{before} bytes before, {after} after"
    );
    name_pages(&mut machine, DEFLATE, &numbers[..10])?;
    finish(&mut machine, DEFLATE)?;
    for page in 0..1000 {
        let page = GuestAddress(start.0 + page * PAGE);
        ensure!(is_zero(&machine, page)?, "{page:?}");
    }
    Ok(())
}

#[test]
fn reported_pages_return_unless_the_guest_relies_on_what_is_in_them() -> Result<()> {
    let (_, mut machine) = running::<Balloon>()?;
    let len = u32::try_from(64 * PAGE)?;
    let start = used_pages(&mut machine, 64)?;
    machine
        .connection
        .set_config(POISON_AT, &0xa5a5_a5a5_u32.to_le_bytes())?;
    // A process that takes over knows what the guest said to another.
    for killed in [false, true] {
        if killed {
            machine.process.kill()?;
            machine.replace_process()?;
        }
        lend(&mut machine, REPORTS, start, len)?;
        finish(&mut machine, REPORTS)?;
        let kept = machine.ram.read(start, len as usize)?;
        ensure!(kept.iter().all(|byte| *byte == 0xa5), "poison is gone");
    }
    machine.connection.set_config(POISON_AT, &[0; 4])?;
    let before = machine.ram.allocated()?;
    lend(&mut machine, REPORTS, start, len)?;
    finish(&mut machine, REPORTS)?;
    ensure!(before - machine.ram.allocated()? >= 62 * PAGE);
    ensure!(is_zero(&machine, start)?);
    Ok(())
}

#[test]
fn parts_of_pages_stay() -> Result<()> {
    let (_, mut machine) = running::<Balloon>()?;
    let start = used_pages(&mut machine, 3)?;
    let len = u32::try_from(2 * PAGE)?;
    lend(&mut machine, REPORTS, GuestAddress(start.0 + 2048), len)?;
    finish(&mut machine, REPORTS)?;
    let found = machine.ram.read(start, 3 * 4096)?;
    let zeroes = |at: usize| (4096..8192).contains(&at);
    let as_expected = |(at, byte): (usize, &u8)| *byte == if zeroes(at) { 0 } else { 0xa5 };
    ensure!(found.iter().enumerate().all(as_expected));
    Ok(())
}

#[test]
fn a_target_is_told_to_the_guest_and_its_answer_to_the_core() -> Result<()> {
    let (mut machine, core) = linked(FEATURES, 4)?;
    let (mut ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(PATIENCE))?;
    machine
        .connection
        .frontend()
        .set_backend_request_fd(&theirs)?;
    let target = 16 << 20;
    ask(&core, async |b| Ok(b.set_target(target).await?))?;
    // CONFIG_CHANGE_MSG, version 1, no body.
    let mut message = [0; 12];
    ours.read_exact(&mut message)?;
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(config(&mut machine, TARGET_AT)?, 4096);
    machine
        .connection
        .set_config(ACTUAL_AT, &4000u32.to_le_bytes())?;
    let told = ask(&core, async |b| Ok((b.target().await?, b.actual().await?)))?;
    assert_eq!(told, (target, 4000 * PAGE));
    // Half a page is none, and a driver cannot say what the host wants.
    let half = ask(&core, async |b| Ok(b.set_target(2048).await?));
    ensure!(half.is_err_and(|e| e.to_string().contains("multiple of 4096")));
    machine.connection.set_config(TARGET_AT, &[1, 0, 0, 0])?;
    assert_eq!(config(&mut machine, TARGET_AT)?, 4096);
    // QEMU's generic front-end writes all words for one.
    let words = [7, 4001, 7, 0xaaaa_aaaa_u32].map(u32::to_le_bytes);
    machine
        .connection
        .set_config(TARGET_AT, words.as_flattened())?;
    for (at, word) in [
        (TARGET_AT, 4096),
        (ACTUAL_AT, 4001),
        (COMMAND_AT, 0),
        (POISON_AT, 0xaaaa_aaaa),
    ] {
        assert_eq!(config(&mut machine, at)?, word, "at {at}");
    }
    // The host still wants it of a guest that starts anew.
    machine.connection.frontend().reset_device()?;
    assert_eq!(
        (
            config(&mut machine, TARGET_AT)?,
            config(&mut machine, ACTUAL_AT)?
        ),
        (4096, 0)
    );
    Ok(())
}

/// The queue of statistics, where they are in force.
const STATISTICS: usize = 2;

/// Makes a report available that says so many bytes are free, and waits until it is read.
fn report_free(machine: &mut Machine, core: &Core, bytes: u64) -> Result<()> {
    let mut report = Vec::new();
    for (tag, value) in [(4u16, bytes), (999, 1)] {
        report.extend(tag.to_le_bytes());
        report.extend(value.to_le_bytes());
    }
    let Machine { rings, ram, .. } = machine;
    let address = ram.allocate(report.len(), 8)?;
    ram.write(address, &report)?;
    let buffer = Buffer {
        address,
        len: u32::try_from(report.len())?,
        writable: false,
    };
    rings[STATISTICS].add(ram, &[buffer])?;
    rings[STATISTICS].kick()?;
    wait_for("the report is read", || {
        let known = ask(core, async |b| Ok(b.guest_statistics().await?)).ok()?;
        let expected = [("free_bytes".to_owned(), bytes)].into();
        (known == expected).then_some(())
    })
}

#[test]
fn statistics_are_asked_for_again_and_again() -> Result<()> {
    let (mut machine, core) = linked(FEATURES | STATS_VQ, 5)?;
    for round in 1..4u64 {
        report_free(&mut machine, &core, round << 20)?;
        // It hangs in the queue, and neither a stop nor a move waits for it.
        machine.stop_rings()?;
        machine.start_rings()?;
        let Machine { rings, ram, .. } = &mut machine;
        rings[STATISTICS].wait_used(ram, PATIENCE)?;
    }
    Ok(())
}

#[test]
fn what_the_guest_said_last_is_known_where_it_moves() -> Result<()> {
    let (mut machine, core) = linked(FEATURES | STATS_VQ, 5)?;
    report_free(&mut machine, &core, 5 << 20)?;
    // It owes the next report from now on.
    let Machine { rings, ram, .. } = &mut machine;
    rings[STATISTICS].wait_used(ram, PATIENCE)?;
    let mut twin = Balloon::new()?.twin_spec();
    let (socket, _theirs) = link(&mut twin)?;
    machine.move_to(twin)?;
    let known = ask(&Core::new(socket)?, async |b| {
        Ok(b.guest_statistics().await?)
    })?;
    assert_eq!(known, [("free_bytes".to_owned(), 5 << 20)].into());
    Ok(())
}

#[test]
fn who_is_asked_seldom_can_be_asked_often() -> Result<()> {
    let (mut machine, core) = linked(FEATURES | STATS_VQ, 5)?;
    let interval = |seconds| {
        ask(&core, async |b| {
            Ok(b.set_statistics_interval(seconds).await?)
        })
    };
    let told = || ask(&core, async |b| Ok(b.statistics_interval().await?));
    assert_eq!(told()?, 1);
    for (seconds, bytes) in [(3600, 1 << 20), (0, 2 << 20)] {
        interval(seconds)?;
        assert_eq!(told()?, seconds);
        report_free(&mut machine, &core, bytes)?;
        interval(1)?;
        let Machine { rings, ram, .. } = &mut machine;
        rings[STATISTICS].wait_used(ram, PATIENCE)?;
    }
    let refused = interval(3601).map_err(|error| error.to_string());
    ensure!(refused.is_err_and(|why| why.contains("give 0 to 3600")));
    // A guest that starts anew is asked as often.
    interval(2)?;
    machine.connection.frontend().reset_device()?;
    assert_eq!(told()?, 2);
    Ok(())
}

#[test]
fn what_is_in_the_balloon_moves_and_stays_given() -> Result<()> {
    let (subject, mut machine) = running::<Balloon>()?;
    let start = used_pages(&mut machine, 64)?;
    name_pages(&mut machine, INFLATE, &numbers(start, 64)?)?;
    finish(&mut machine, INFLATE)?;
    // As if these had been sent before they were given up.
    machine.ram.write(start, &vec![1; 32 * 4096])?;
    machine.move_to(subject.twin_spec())?;
    wait_for("it is given again", || {
        let first = is_zero(&machine, start).ok()?;
        let last = is_zero(&machine, GuestAddress(start.0 + 31 * PAGE)).ok()?;
        (first && last).then_some(())
    })
}
