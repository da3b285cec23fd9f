//! The life of a device: stop and resume, loss and recovery, dirty log, a move.

use std::time::Duration;

use anyhow::{Result, ensure};
use test_framework::frontend::{DirtyBitmap, Machine};
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::GuestAddress;

use crate::subject::{Subject, options, running};

pub(crate) fn rings_stop_and_go_on<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    for _ in 0..10 {
        subject.load(&mut machine)?;
        machine.stop_rings()?;
        // Drained: what was taken is answered, and the base says where to go on.
        for (ring, base) in machine.rings.iter().zip(machine.bases()) {
            let used = ring.used_index(&machine.ram)?;
            ensure!(used == *base, "base {base}, but {used} are answered");
        }
        machine.start_rings()?;
        subject.settle(&mut machine)?;
    }
    Ok(())
}

pub(crate) fn stopping_twice_is_fine<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.exchange(&mut machine)?;
    machine.stop_rings()?;
    let first = machine.bases().to_vec();
    machine.stop_rings()?;
    assert_eq!(machine.bases(), first);
    machine.start_rings()?;
    subject.exchange(&mut machine)
}

pub(crate) fn a_kick_while_stopped_is_not_lost<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    machine.stop_rings()?;
    subject.load(&mut machine)?;
    for ring in &machine.rings {
        // Not even the eventfd knows of it any more.
        ring.kick.read()?;
    }
    machine.start_rings()?;
    subject.settle(&mut machine)
}

pub(crate) fn disabled_rings_rest<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    for at in 0..machine.rings.len() {
        machine.connection.frontend().set_vring_enable(at, false)?;
    }
    subject.load(&mut machine)?;
    let Machine { rings, ram, .. } = &mut machine;
    for ring in rings.iter_mut() {
        let answered = ring.wait_used(ram, Duration::from_millis(20));
        ensure!(answered.is_err(), "a disabled ring was served");
    }
    for at in 0..machine.rings.len() {
        machine.connection.frontend().set_vring_enable(at, true)?;
    }
    subject.settle(&mut machine)
}

pub(crate) fn killed_under_load_loses_nothing<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    for round in 0..16 {
        subject.load(&mut machine)?;
        // At another point of its work each time.
        std::thread::sleep(Duration::from_micros(50 * round));
        machine.process.kill()?;
        machine.replace_process()?;
        // Each request is answered once: an answer too many is an error of the ring.
        subject.settle(&mut machine)?;
    }
    subject.exchange(&mut machine)
}

/// Pages that must be marked when the device writes to the guest, and are.
fn verify_log<S: Subject>(subject: &mut S, machine: &mut Machine, log: &DirtyBitmap) -> Result<()> {
    let mut pages = subject.write_to_guest(machine)?;
    pages.extend(machine.rings.iter().map(|ring| ring.used_ring().0));
    for page in pages {
        ensure!(
            log.is_dirty(GuestAddress(page))?,
            "page {page:#x} is not marked"
        );
    }
    Ok(())
}

pub(crate) fn dirty_pages_are_logged<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    let log = DirtyBitmap::new(0x1_0000_0000)?;
    subject.exchange(&mut machine)?;
    ensure!(log.dirty_pages()?.is_empty());
    machine.connection.start_logging(&log)?;
    verify_log(&mut subject, &mut machine, &log)?;
    machine.connection.stop_logging()?;
    log.clear()?;
    subject.exchange(&mut machine)?;
    let marked = log.dirty_pages()?;
    ensure!(marked.is_empty(), "marked without logging: {marked:x?}");
    machine.connection.start_logging(&log)?;
    verify_log(&mut subject, &mut machine, &log)
}

pub(crate) fn log_survives_a_new_memory_table<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    let log = DirtyBitmap::new(0x1_0000_0000)?;
    machine.connection.start_logging(&log)?;
    machine.connection.set_memory(&[&machine.ram])?;
    verify_log(&mut subject, &mut machine, &log)
}

pub(crate) fn state_moves_to_another_process<S: Subject>() -> Result<()> {
    let mut subject = S::new()?;
    let mut options = options(&subject);
    options.inflight = false;
    let mut machine = Machine::start(options)?;
    subject.change_state(&mut machine)?;
    for _ in 0..3 {
        subject.load(&mut machine)?;
        let log = DirtyBitmap::new(0x1_0000_0000)?;
        machine.connection.start_logging(&log)?;
        machine.move_to(subject.twin_spec())?;
        subject.settle(&mut machine)?;
        subject.verify_state(&mut machine)?;
        subject.exchange(&mut machine)?;
    }
    Ok(())
}
