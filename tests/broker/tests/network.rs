//! Network devices under a broker.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use api::device::State as DeviceState;
use api::machine::State;
use test_broker::*;
use test_framework::machine::DEADLINE;
use test_framework::network;
use test_guest::{NetMode, Report, Workload, command};
use zbus::{Connection, Variant};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// A network of its own with a tap `net0` and an echo service, and what the test does there by a
/// connection to a broker. Only the thread that enters it is in it.
fn in_network(pairs: u16, test: impl AsyncFnOnce(Connection) -> Result<()>) -> Result<()> {
    network::enter()?;
    network::add_tap("net0", HOST, pairs)?;
    network::echo(HOST, 7)?;
    let broker = Broker::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async { test(broker.connect().await?).await })
}

/// How the guest's work ended.
fn is_done(report: &Report) -> Option<bool> {
    match *report {
        Report::Done { ok, .. } => Some(ok),
        _ => None,
    }
}

#[test]
fn taps_are_handed_over_with_all_their_queues() -> Result<()> {
    in_network(4, async |bus| {
        for pairs in [1u32, 4] {
            let workload = Workload {
                net: NetMode::Ping,
                packets: 500,
                poweroff: true,
                ..Workload::default()
            };
            let card: HashMap<String, Variant<'static>> = HashMap::from([
                ("tap".to_owned(), "net0".into()),
                ("queue-pairs".to_owned(), pairs.into()),
            ]);
            let mut definition = definition(&workload);
            definition.insert("net".into(), value(vec![card]));
            let name = format!("vm{pairs}");
            let vm = running(&bus, &name, definition).await?;
            let card = device(&bus, &name, "net0").await?;
            assert_eq!(card.source().await?, "tap:net0");
            let mut console = console(&vm).await?;
            let (_, ok) = console.report("the end of the work", DEADLINE, is_done)?;
            ensure!(ok, "packets were lost: {:#?}", console.history());
            becomes(&vm, State::Off).await?;
            assert_eq!(card.state().await?, DeviceState::Off);
        }
        Ok(())
    })
}

#[test]
fn a_killed_card_comes_back_under_traffic() -> Result<()> {
    in_network(1, async |bus| {
        let workload = Workload {
            net: NetMode::Loop,
            poweroff: true,
            ..Workload::default()
        };
        let card = HashMap::from([("tap", Variant::from("net0"))]);
        let mut definition = definition(&workload);
        definition.insert("net".into(), value(vec![card]));
        let vm = running(&bus, "vm", definition).await?;
        let card = device(&bus, "vm", "net0").await?;
        let packets = async || -> Result<u64> {
            let counters = card.statistics().await?;
            Ok(counters.get("bytes_to_guest").copied().unwrap_or_default())
        };
        for round in 0..3 {
            // Answers come: packets pass both ways.
            until("traffic", async || Ok(packets().await? > 10_000)).await?;
            kill_process(card.process().await?)?;
            until("another process", async || {
                Ok(card.reconnects().await? == round + 1
                    && card.state().await? == DeviceState::Running)
            })
            .await?;
        }
        until("traffic", async || Ok(packets().await? > 10_000)).await?;
        let mut console = console(&vm).await?;
        console.send(command::STOP)?;
        let (_, ok) = console.report("the end of the work", DEADLINE, is_done)?;
        ensure!(ok, "an answer was wrong: {:#?}", console.history());
        becomes(&vm, State::Off).await
    })
}
