//! Machines that are given a PCI device: the synthetic one, in a process of the broker's and in one of
//! somebody else's.

use std::collections::HashMap;

use anyhow::Result;
use api::device::State as DeviceState;
use api::machine::State;
use api::{Dictionary, Error};
use test_broker::*;
use test_framework::console::Console;
use test_framework::machine::DEADLINE;
use test_framework::process::Launch;
use test_framework::programs::program;
use test_guest::{Idle, Report, Workload};
use zbus::Variant;

/// Copies that a guest has its device do.
const COPIES: u32 = 200;

/// A machine with one PCI device, whose guest uses it.
fn with(key: &str, source: impl Into<Variant<'static>>) -> Dictionary {
    let mut definition = definition(&Workload {
        copies: COPIES,
        idle: Idle::Halt,
        heartbeat: 50,
        // It has something to do until it is told to stop.
        span: 4,
        dirty: 4,
        ..Workload::default()
    });
    let device = HashMap::from([(key.to_owned(), source.into())]);
    definition.insert("vfio".into(), value(vec![device]));
    definition
}

/// Waits until the guest is through with its copies, which were right, with an interrupt each.
fn copied(console: &mut Console) -> Result<()> {
    let last = |report: &Report| match *report {
        Report::Copy {
            copies,
            irqs,
            errors,
            end: true,
            ..
        } => Some((copies, irqs, errors)),
        _ => None,
    };
    let (_, counted) = console.report("the last copy", DEADLINE, last)?;
    assert_eq!(counted, (COPIES.into(), COPIES.into(), 0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pci_device_works_is_seen_and_keeps_its_machine_here() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let vm = running(&bus, "vm", with("synthetic", true)).await?;
    copied(&mut console(&vm).await?)?;

    let path = api::path::device("vm", "vfio0").to_string();
    let get = |property: &str| {
        let interface = "org.godwit.Vmm1.Device";
        broker.busctl(&[
            "get-property",
            "org.godwit.Vmm1",
            &path,
            interface,
            property,
        ])
    };
    assert_eq!(get("Kind")?.trim(), "s \"vfio\"");
    assert_eq!(get("Source")?.trim(), "s \"synthetic\"");
    assert_eq!(get("State")?.trim(), "s \"running\"");
    let statistics = device(&bus, "vm", "vfio0").await?.statistics().await?;
    // What it refuses ends with an interrupt, too.
    assert!(
        statistics["interrupts"] >= u64::from(COPIES),
        "{statistics:?}"
    );
    assert!(
        statistics["copied_bytes"] >= u64::from(COPIES),
        "{statistics:?}"
    );
    assert_eq!(statistics["mapped_bytes"], 64 << 20);

    let folder = broker.folder().join("snapshot");
    let target = folder.display().to_string();
    for refused in [
        vm.migrate("local:", HashMap::new(), 0).await,
        vm.migrate("tcp://127.0.0.1:1", HashMap::new(), 0).await,
        vm.snapshot(&target, 0).await,
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::NotMigratable(_)), "{error:?}");
        assert!(error.to_string().contains("vfio0 (synthetic)"), "{error}");
    }
    assert!(!folder.exists());
    assert_eq!(vm.state().await?, State::Running);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_is_followed_by_another() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let vm = running(&bus, "vm", with("synthetic", true)).await?;
    copied(&mut console(&vm).await?)?;
    let card = device(&bus, "vm", "vfio0").await?;
    kill_process(card.process().await?)?;
    until("another process", async || {
        Ok(card.reconnects().await? == 1 && card.state().await? == DeviceState::Running)
    })
    .await?;
    assert_eq!(vm.state().await?, State::Running);
    // The guest knows nothing of cards that fail: it starts anew, with the new one.
    let mut console = console(&vm).await?;
    vm.reset(0).await?;
    copied(&mut console)?;
    // Nobody kills it now.
    vm.terminate(0).await?;
    becomes(&vm, State::Off).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_others_is_used_and_reached_again() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let socket = broker.folder().join("card.sock");
    let others = || {
        Launch::new(&program("godwit-vfio")?)
            .option("--socket-path", &socket)
            .arg("--synthetic")
            .start()
    };
    let definition = with("socket", socket.display().to_string());
    let (vm, process) = starts_after(&bus, definition, others).await?;
    let mut console = console(&vm).await?;
    copied(&mut console)?;
    let _process = is_reached_again(&bus, "vfio0", process, others).await?;
    vm.reset(0).await?;
    copied(&mut console)
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_cannot_be_given_away_are_named() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let manager = manager(&bus).await?;
    let refused = async |definition: Dictionary| manager.create_machine("vm", definition, 0).await;
    for (key, source) in [
        ("host", Variant::from("../../../dev")),
        ("host", "0000:01:00.0/../x".into()),
        ("host", true.into()),
        ("synthetic", false.into()),
        ("synthetic", "yes".into()),
        ("socket", "card.sock".into()),
        ("socket", "/run/../card.sock".into()),
        ("device", "0000:01:00.0".into()),
    ] {
        let error = refused(with(key, source)).await.unwrap_err();
        assert!(matches!(error, Error::InvalidDefinition(_)), "{error:?}");
        assert!(error.to_string().starts_with("vfio[0]."), "{error}");
    }
    // No computer has so many buses.
    let path = refused(with("host", "ffff:FF:1f.7")).await?;
    let vm = machine(&bus, path).await?;
    let job = vm.start(0).await?;
    let error = format!("{:#}", done(&bus, job).await.unwrap_err());
    assert!(
        error.contains("PCI device ffff:ff:1f.7 cannot be given to a machine"),
        "{error}"
    );
    assert!(error.contains("see lspci -D"), "{error}");
    assert_eq!(vm.state().await?, State::Failed);
    Ok(())
}
