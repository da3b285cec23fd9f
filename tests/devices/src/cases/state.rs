//! Saved state that is not what it should be.

use std::os::unix::net::UnixStream;

use anyhow::{Result, ensure};
use test_framework::frontend::Machine;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostTransferStateDirection as Direction;

use crate::subject::{Subject, running};

/// A machine whose rings are stopped, and the state of its device.
fn saved<S: Subject>() -> Result<(S, Machine, Vec<u8>)> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.exchange(&mut machine)?;
    machine.stop_rings()?;
    let state = machine.connection.save()?;
    Ok((subject, machine, state))
}

/// Loads a state that must be refused, for a reason that the log gives.
fn refused(machine: &mut Machine, state: &[u8], reason: &str) -> Result<()> {
    ensure!(
        machine.connection.load(state).is_err(),
        "it was accepted: {reason}"
    );
    machine.process.wait_log(reason)?;
    // The device is as it was after a reset, and only after that.
    machine.reset()?;
    machine.stop_rings()
}

pub(crate) fn state_is_refused_while_running<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, state) = saved::<S>()?;
    machine.start_rings()?;
    for direction in [Direction::SAVE, Direction::LOAD] {
        let (ours, theirs) = UnixStream::pair()?;
        let started = machine.connection.begin_transfer(direction, theirs.into());
        ensure!(started.is_err(), "{direction:?} was accepted");
        drop(ours);
    }
    machine.process.wait_log("still runs")?;
    subject.exchange(&mut machine)?;
    machine.stop_rings()?;
    machine.connection.load(&state)?;
    machine.start_rings()?;
    subject.exchange(&mut machine)
}

pub(crate) fn truncated_state_is_refused<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, state) = saved::<S>()?;
    for end in [0, 1, 50, 96, 100, state.len() / 2, state.len() - 1] {
        refused(
            &mut machine,
            &state[..end],
            &format!("truncated after {end} bytes"),
        )?;
    }
    machine.connection.load(&state)?;
    machine.start_rings()?;
    subject.exchange(&mut machine)
}

pub(crate) fn corrupted_state_is_refused<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, state) = saved::<S>()?;
    let mut damaged = state.clone();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    refused(&mut machine, &damaged, "corrupted: trailer says")?;
    let mut longer = state.clone();
    longer.push(0);
    refused(&mut machine, &longer, "data after the end of saved state")?;
    let mut other = state.clone();
    other[0] = b'X';
    refused(&mut machine, &other, "not saved state")?;
    machine.connection.load(&state)?;
    machine.start_rings()?;
    subject.exchange(&mut machine)
}

/// Bytes before the structured part: the frame's header, and its chunk's.
const STRUCTURED: usize = 96 + 8;
/// Bytes of a trailer, with its chunk's header.
const TRAILER: usize = 8 + 12;

/// A state that is whole and was never saved: refused or taken, the device lives on.
pub(crate) fn mutated_states_do_no_harm<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, state) = saved::<S>()?;
    let end = state.len() - TRAILER;
    // What is special is at the beginning.
    for at in STRUCTURED..end.min(STRUCTURED + 150) {
        for byte in [0, 0x7f, 0xff, state[at] ^ 1, state[at] ^ 0x80] {
            let mut mutant = state.clone();
            mutant[at] = byte;
            let crc = crc32c::crc32c(&mutant[..end]);
            mutant[end + 16..].copy_from_slice(&crc.to_le_bytes());
            // Either is right: some bytes are free to be others.
            let loaded = machine.connection.load(&mutant);
            let frontend = machine.connection.frontend();
            let lives = frontend.reset_device();
            ensure!(lives.is_ok(), "byte {at} = {byte:#x}: {loaded:?}");
        }
    }
    ensure!(!machine.process.has_ended(), "it has ended");
    machine.reset()?;
    machine.stop_rings()?;
    machine.connection.load(&state)?;
    machine.start_rings()?;
    subject.exchange(&mut machine)
}

pub(crate) fn unknown_schema_is_refused_by_name<S: Subject>() -> Result<()> {
    let (_subject, mut machine, state) = saved::<S>()?;
    let mut newer = state;
    newer[12..16].copy_from_slice(&999u32.to_le_bytes());
    let reason = format!("schema 999 of {} is unknown here", S::KIND);
    refused(&mut machine, &newer, &reason)
}

pub(crate) fn state_of_another_device_is_refused<S: Subject>() -> Result<()> {
    let (_subject, mut machine, mut state) = saved::<S>()?;
    // The unit's name begins after 16 bytes and the kind.
    state[32] = b'z';
    refused(&mut machine, &state, "was given to")
}

pub(crate) fn a_peer_that_goes_away_leaves_the_device_alive<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, _) = saved::<S>()?;
    let (ours, theirs) = UnixStream::pair()?;
    drop(ours);
    machine
        .connection
        .begin_transfer(Direction::SAVE, theirs.into())?;
    ensure!(check(&mut machine).is_err(), "nobody took the state");
    // The move is off: the source goes on.
    machine.start_rings()?;
    subject.exchange(&mut machine)
}

fn check(machine: &mut Machine) -> Result<()> {
    Ok(machine.connection.frontend().check_device_state()?)
}

pub(crate) fn failed_load_needs_a_reset<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, state) = saved::<S>()?;
    ensure!(machine.connection.load(&state[..20]).is_err());
    ensure!(machine.start_rings().is_err(), "it runs on half a state");
    machine
        .process
        .wait_log("cannot go from Error to Running")?;
    machine.reconnect_roughly()?;
    machine.reset()?;
    subject.exchange(&mut machine)
}
