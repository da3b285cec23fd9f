//! Rings that were wired ahead and start and stop by one message: [`migration::rings`].

use anyhow::{Context, Result, ensure};
use migration::rings::{self, Forecast, RingBase};
use test_framework::frontend::Machine;

use crate::subject::{Subject, options, running};

/// A machine whose rings are wired and not served.
fn wired<S: Subject>() -> Result<(S, Machine)> {
    let subject = S::new()?;
    let mut machine = Machine::connect(options(&subject))?;
    machine.wire_rings()?;
    Ok((subject, machine))
}

pub(crate) fn wired_rings_rest_until_they_are_started<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = wired::<S>()?;
    ensure!(machine.stop_wired()? == 0, "a ring runs that is only wired");
    subject.load(&mut machine)?;
    for ring in &machine.rings {
        let used = ring.used_index(&machine.ram)?;
        ensure!(used == 0, "a ring was served that is only wired");
    }
    machine.start_wired()?;
    subject.settle(&mut machine)
}

pub(crate) fn one_message_stops_and_starts_all_rings<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    for _ in 0..10 {
        subject.load(&mut machine)?;
        ensure!(machine.stop_wired()? == S::QUEUES, "not all rings ran");
        // Drained, as after GET_VRING_BASE.
        for (ring, base) in machine.rings.iter().zip(machine.bases()) {
            let used = ring.used_index(&machine.ram)?;
            ensure!(used == *base, "base {base}, but {used} are answered");
        }
        ensure!(machine.stop_wired()? == 0, "a ring was stopped twice");
        machine.start_wired()?;
        subject.settle(&mut machine)?;
    }
    subject.exchange(&mut machine)
}

pub(crate) fn state_moves_between_stop_and_start<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.change_state(&mut machine)?;
    ensure!(machine.stop_wired()? == S::QUEUES);
    let state = machine.connection.save()?;
    machine.connection.load(&state)?;
    machine.start_wired()?;
    subject.verify_state(&mut machine)?;
    subject.exchange(&mut machine)
}

pub(crate) fn one_message_stops_and_saves<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.change_state(&mut machine)?;
    for leaves in [false, true] {
        let (stopped, state) = machine.stop_and_save(leaves)?;
        ensure!(stopped == S::QUEUES, "not all rings ran");
        machine.connection.load(&state)?;
        machine.start_wired()?;
    }
    subject.verify_state(&mut machine)?;
    subject.exchange(&mut machine)
}

pub(crate) fn memory_is_mapped_while_it_runs<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.load(&mut machine)?;
    let answer = machine.connection.wired(rings::PREFAULT, &[])?;
    ensure!(answer.is_empty(), "{answer:?}");
    subject.settle(&mut machine)
}

pub(crate) fn what_one_may_have_is_given_up_and_taken_again<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.exchange(&mut machine)?;
    ensure!(machine.stop_wired()? == S::QUEUES);
    // Asking twice is fine.
    for hold in [0u32, 0, 1, 1, 0] {
        let refused = machine.connection.wired(rings::HOLD, &hold.to_ne_bytes())?;
        ensure!(refused.is_empty(), "{}", String::from_utf8_lossy(&refused));
    }
    // START takes it as HOLD does.
    machine.start_wired()?;
    subject.exchange(&mut machine)
}

pub(crate) fn a_forecast_is_given_while_it_runs<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.load(&mut machine)?;
    let answer = machine.connection.wired(rings::FORECAST, &[])?;
    Forecast::decode(&answer).context("no forecast")?;
    subject.settle(&mut machine)
}

pub(crate) fn impossible_wishes_end_the_session_only<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    let start = |index| rings::encode(&[RingBase { index, base: 0 }]);
    let wishes = [
        ("to start a ring that runs", rings::START, start(0)),
        (
            "to start a ring that there is not",
            rings::START,
            start(200),
        ),
        ("to start half a ring", rings::START, start(0)[..5].to_vec()),
        ("to stop something", rings::STOP, vec![0; 8]),
        (
            "to leave without its state",
            rings::STOP,
            1u32.to_ne_bytes().to_vec(),
        ),
        ("to give up what rings need", rings::HOLD, vec![0; 4]),
        ("to hold two", rings::HOLD, 2u32.to_ne_bytes().to_vec()),
    ];
    for (wish, request, body) in wishes {
        let answer = machine.connection.wired(request, &body);
        ensure!(answer.is_err(), "{wish}: {answer:?}");
        machine.reconnect_roughly()?;
        subject.exchange(&mut machine)?;
    }
    Ok(())
}
