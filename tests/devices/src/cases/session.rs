//! Sessions: negotiation, data, reconnection, memory, reset, termination.

use std::os::unix::net::{UnixDatagram, UnixStream};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use test_framework::frontend::{GuestRam, Machine};
use vhost::VhostBackend;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures as Protocol};

use super::program::connected;
use crate::subject::{Subject, options, running};

pub(crate) fn features_are_offered_and_kept_to<S: Subject>() -> Result<()> {
    let subject = S::new()?;
    let folder = tempfile::tempdir()?;
    let (_process, mut connection) = connected(&subject, folder.path())?;
    let offered = connection.frontend().get_features()?;
    ensure!(offered & S::FEATURES == S::FEATURES, "{offered:#x}");
    let packed = 1 << 34;
    ensure!(offered & packed == 0, "packed rings are offered");
    let protocol = connection.protocol_features()?;
    let needed = Protocol::MQ
        | Protocol::LOG_SHMFD
        | Protocol::REPLY_ACK
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::BACKEND_REQ
        | Protocol::DEVICE_STATE;
    ensure!(protocol.contains(needed), "{protocol:?}");
    ensure!(
        !protocol.contains(Protocol::STATUS),
        "STATUS has no handler"
    );
    let queues = connection.frontend().get_queue_num()?;
    ensure!(queues >= S::QUEUES as u64, "{queues} queues");
    ensure!(connection.frontend().get_max_mem_slots()? >= 32);
    // A feature that was not offered ends the session.
    let refused = connection.frontend().set_features(offered | packed);
    ensure!(refused.is_err(), "packed rings were accepted");
    Ok(())
}

pub(crate) fn back_end_channel_is_taken<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    let (_ours, theirs) = UnixStream::pair()?;
    machine
        .connection
        .frontend()
        .set_backend_request_fd(&theirs)?;
    subject.exchange(&mut machine)?;
    let datagram = UnixDatagram::unbound()?;
    let refused = machine
        .connection
        .frontend()
        .set_backend_request_fd(&datagram);
    ensure!(refused.is_err(), "a datagram socket was accepted");
    Ok(())
}

pub(crate) fn data_moves<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    for _ in 0..20 {
        subject.exchange(&mut machine)?;
    }
    Ok(())
}

pub(crate) fn data_moves_without_event_idx<S: Subject>() -> Result<()> {
    let mut subject = S::new()?;
    let mut options = options(&subject);
    options.event_idx = false;
    options.inflight = false;
    let mut machine = Machine::start(options)?;
    for _ in 0..20 {
        subject.exchange(&mut machine)?;
    }
    Ok(())
}

pub(crate) fn front_end_reconnects<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    for _ in 0..5 {
        subject.exchange(&mut machine)?;
        machine.reconnect()?;
    }
    subject.exchange(&mut machine)
}

pub(crate) fn front_end_vanishes_under_load<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    for _ in 0..5 {
        subject.load(&mut machine)?;
        machine.reconnect_roughly()?;
        subject.settle(&mut machine)?;
    }
    subject.exchange(&mut machine)
}

pub(crate) fn reset_makes_it_new<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.exchange(&mut machine)?;
    machine.reset()?;
    subject.exchange(&mut machine)
}

pub(crate) fn memory_changes_while_running<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    let more = GuestRam::new(0x1_0000_0000, 1 << 20)?;
    for round in 0..10 {
        subject.load(&mut machine)?;
        if round % 2 == 0 {
            machine.connection.set_memory(&[&machine.ram, &more])?;
        } else {
            machine.connection.set_memory(&[&machine.ram])?;
        }
        subject.settle(&mut machine)?;
    }
    subject.exchange(&mut machine)
}

pub(crate) fn memory_slots_come_and_go<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    let ram = GuestRam::new(0x1_0000_0000, 1 << 20)?;
    let more = ram.region()?;
    for _ in 0..5 {
        subject.load(&mut machine)?;
        machine.connection.frontend().add_mem_region(&more)?;
        subject.settle(&mut machine)?;
        subject.load(&mut machine)?;
        machine.connection.frontend().remove_mem_region(&more)?;
        subject.settle(&mut machine)?;
    }
    let gone = machine.connection.frontend().remove_mem_region(&more);
    ensure!(gone.is_err(), "a region was removed twice");
    Ok(())
}

pub(crate) fn sigterm_under_load_ends_it_promptly<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.load(&mut machine)?;
    machine.process.signal(Signal::SIGTERM)?;
    let status = machine.process.wait()?;
    ensure!(status.success(), "{status}: {}", machine.process.log());
    machine.replace_process()?;
    subject.settle(&mut machine)
}
