//! Guests and front-ends that do what they must not. A broken ring costs the guest that ring, a
//! broken message costs the front-end its session, and nothing else happens.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use test_framework::frontend::{Machine, PATIENCE, wait_for};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use crate::subject::{Subject, options, running};

const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

/// Breaks ring 0 and kicks; the device must say so, and serve everything again after a reset.
fn broken<S: Subject>(damage: impl FnOnce(&mut Machine) -> Result<()>) -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.exchange(&mut machine)?;
    damage(&mut machine)?;
    machine.rings[0].kick()?;
    machine.rings[0].wait_broken(PATIENCE)?;
    // A guest that kicks on is not served, and not harmful.
    for _ in 0..100 {
        machine.rings[0].kick()?;
    }
    machine.connection.stop_ring(0)?;
    machine.reset()?;
    subject.exchange(&mut machine)?;
    machine.process.wait_log("ring is broken")?;
    let log = machine.process.log();
    ensure!(!log.contains("panicked"), "{log}");
    Ok(())
}

pub(crate) fn descriptor_loop_breaks_the_queue_only<S: Subject>() -> Result<()> {
    broken::<S>(|machine| {
        let Machine { rings, ram, .. } = machine;
        rings[0].set_descriptor(ram, 0, (0x10_0000, 16), NEXT, 1)?;
        rings[0].set_descriptor(ram, 1, (0x10_0000, 16), NEXT, 0)?;
        rings[0].publish(ram, 0)
    })
}

pub(crate) fn address_outside_memory_breaks_the_queue_only<S: Subject>() -> Result<()> {
    for place in [
        (0, 16),
        (u64::MAX - 4, 16),
        (0x10_0000, u32::MAX),
        (0x10_0000, 0),
    ] {
        broken::<S>(|machine| {
            let Machine { rings, ram, .. } = machine;
            rings[0].set_descriptor(ram, 0, place, 0, 0)?;
            rings[0].publish(ram, 0)
        })?;
    }
    Ok(())
}

pub(crate) fn wild_available_index_breaks_the_queue_only<S: Subject>() -> Result<()> {
    broken::<S>(|machine| {
        let Machine { rings, ram, .. } = machine;
        let beyond = rings[0].used_index(ram)?.wrapping_add(rings[0].size() + 1);
        rings[0].set_available_index(ram, beyond)
    })
}

pub(crate) fn head_outside_the_table_breaks_the_queue_only<S: Subject>() -> Result<()> {
    broken::<S>(|machine| {
        let Machine { rings, ram, .. } = machine;
        let size = rings[0].size();
        rings[0].publish(ram, size)
    })
}

pub(crate) fn nested_indirect_table_breaks_the_queue_only<S: Subject>() -> Result<()> {
    broken::<S>(|machine| {
        let Machine { rings, ram, .. } = machine;
        let table = ram.allocate(16, 16)?;
        let mut inner = [0; 16];
        inner[..8].copy_from_slice(&table.0.to_le_bytes());
        inner[8..12].copy_from_slice(&16u32.to_le_bytes());
        inner[12..14].copy_from_slice(&INDIRECT.to_le_bytes());
        ram.write(table, &inner)?;
        rings[0].set_descriptor(ram, 0, (table.0, 16), INDIRECT, 0)?;
        rings[0].publish(ram, 0)
    })
}

pub(crate) fn head_made_available_twice_breaks_the_queue_only<S: Subject>() -> Result<()> {
    // Both are there when the device first looks, so that the first is still in flight.
    let mut subject = S::new()?;
    let mut machine = Machine::connect(options(&subject))?;
    subject.load(&mut machine)?;
    let Machine { rings, ram, .. } = &mut machine;
    let head = rings[0].any_head();
    rings[0].publish(ram, head)?;
    machine.start_rings()?;
    machine.rings[0].wait_broken(PATIENCE)?;
    machine.stop_rings()?;
    machine
        .process
        .wait_log("was made available again before it was used")
}

/// Sends bytes that are no message; the session must end, and the next one work.
fn cut_off<S: Subject>(bytes: &[u8], patience: Duration) -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.exchange(&mut machine)?;
    let mut stream: &UnixStream = machine.connection.stream();
    stream.write_all(bytes)?;
    stream.set_read_timeout(Some(patience))?;
    let mut answer = [0; 64];
    match stream.read(&mut answer) {
        Ok(0) => {}
        // What it did not read of our bytes makes the end a reset.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => bail!("the session went on: {other:?}"),
    }
    machine.reconnect_roughly()?;
    subject.exchange(&mut machine)?;
    machine.process.wait_log("session ended by an error")
}

pub(crate) fn garbage_ends_the_session_only<S: Subject>() -> Result<()> {
    cut_off::<S>(&[0xa5; 64], PATIENCE)?;
    // A header that announces more than any message has.
    let mut huge = Vec::new();
    for word in [1u32, 1, u32::MAX] {
        huge.extend_from_slice(&word.to_ne_bytes());
    }
    cut_off::<S>(&huge, PATIENCE)
}

pub(crate) fn half_a_message_ends_the_session_only<S: Subject>() -> Result<()> {
    cut_off::<S>(&[1, 0, 0, 0, 1], PATIENCE)?;
    // A header whose body never comes.
    let mut header = Vec::new();
    for word in [2u32, 1, 8] {
        header.extend_from_slice(&word.to_ne_bytes());
    }
    cut_off::<S>(&header, PATIENCE)
}

pub(crate) fn wild_messages_end_the_session_only<S: Subject>() -> Result<()> {
    type Message = fn(&mut Machine) -> bool;
    let messages: [(&str, Message); 8] = [
        ("queue out of range", |m| {
            m.connection.frontend().set_vring_num(200, 64).is_ok()
        }),
        ("queue size", |m| {
            m.connection.frontend().set_vring_num(0, 63).is_ok()
        }),
        ("queue size while running", |m| {
            m.connection.frontend().set_vring_num(0, 32).is_ok()
        }),
        ("base while running", |m| {
            m.connection.frontend().set_vring_base(0, 1).is_ok()
        }),
        ("address outside", |m| {
            let config = vhost::VringConfigData {
                queue_max_size: 64,
                queue_size: 64,
                desc_table_addr: 0x1000,
                used_ring_addr: 0x2000,
                avail_ring_addr: 0x3000,
                ..Default::default()
            };
            m.connection.frontend().set_vring_addr(0, &config).is_ok()
        }),
        ("in-flight for too many queues", |m| {
            m.connection.make_inflight(1000, 64).is_ok()
        }),
        ("overlapping memory", |m| {
            m.connection.set_memory(&[&m.ram, &m.ram]).is_ok()
        }),
        ("memory past the end of its file", |m| {
            let Ok(mut region) = m.ram.region() else {
                return true;
            };
            region.memory_size *= 2;
            m.connection.frontend().set_mem_table(&[region]).is_ok()
        }),
    ];
    let (mut subject, mut machine) = running::<S>()?;
    for (name, message) in messages {
        ensure!(!message(&mut machine), "accepted: {name}");
        machine.reconnect_roughly()?;
        subject.exchange(&mut machine)?;
    }
    Ok(())
}

pub(crate) fn ring_memory_taken_away_is_survived<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.load(&mut machine)?;
    let region = machine.ram.region()?;
    machine.connection.frontend().remove_mem_region(&region)?;
    for ring in &machine.rings {
        ring.wait_broken(PATIENCE)?;
    }
    machine.stop_rings()?;
    machine.connection.set_memory(&[&machine.ram])?;
    machine.reconnect_roughly()?;
    wait_for("what was in flight is answered", || {
        subject.settle(&mut machine).ok()
    })?;
    Ok(())
}
