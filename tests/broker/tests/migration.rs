//! Machines that move between brokers and within one, and go into files.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use api::Dictionary;
use api::job::State as JobState;
use api::machine::{MachineProxy, State};
use tempfile::TempDir;
use test_broker::*;
use test_framework::machine::make_image;
use test_framework::network;
use test_guest::{BlkMode, NetMode, Workload};
use zbus::{Connection, Variant};

const KEY: &str = "a secret of two brokers\n";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// A guest that works on its disks, dirties memory, and verifies both.
fn busy() -> Workload {
    Workload {
        heartbeat: 20,
        blk: BlkMode::Loop,
        depth: 8,
        span: 16,
        dirty: 40,
        poweroff: true,
        ..Workload::default()
    }
}

/// The same without disks.
fn diskless() -> Workload {
    Workload {
        blk: BlkMode::Off,
        ..busy()
    }
}

/// Disks that no broker's folder has: processes are counted by what they have open there.
fn disks(folder: &TempDir, names: &[&str]) -> Result<Vec<PathBuf>> {
    let disk = |name: &&str| {
        let path = folder.path().join(name);
        make_image(&path, 32)?;
        Ok(path)
    };
    names.iter().map(disk).collect()
}

fn no_options() -> Dictionary {
    Dictionary::new()
}

/// A way to a broker that never says that it is ready, so that a machine is copied and copied.
fn unready(folder: &TempDir, broker: &Broker) -> Result<Relay> {
    let relay = Relay::start(folder.path(), &broker.unix())?;
    relay.mute(Some("Ready"));
    Ok(relay)
}

/// The machine of this name, if the broker has it.
async fn find(bus: &Connection, name: &str) -> Result<Option<MachineProxy<'static>>> {
    match manager(bus).await?.get_machine(name).await {
        Ok(path) => machine(bus, path).await.map(Some),
        Err(api::Error::NoSuchMachine(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Waits until a migration copies memory.
async fn copies(bus: &Connection, at: &zbus::OwnedObjectPath) -> Result<()> {
    let job = job(bus, at.clone()).await?;
    until("a copy", async || {
        ensure!(
            job.state().await? == JobState::Running,
            "it is over: {:?}",
            job.result().await?
        );
        Ok(job.phase().await? == "copying")
    })
    .await
}

/// Waits until nothing of a machine is left at a broker.
async fn nothing_left(broker: &Broker, bus: &Connection, name: &str) -> Result<()> {
    until("an end of the machine", async || {
        Ok(find(bus, name).await?.is_none() && broker.programs().is_empty())
    })
    .await?;
    let left = broker.files();
    let left: Vec<_> = left.iter().filter(|file| file.ends_with(name)).collect();
    ensure!(left.is_empty(), "{left:?} are left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_times_within_a_host_and_the_console_stays() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let mut images = vec![broker.image("a", 32)?];
    let mut definition = definition(&busy());
    // The one processor of an emulated host has systemd to run besides: the moves after the first find
    // what it left behind.
    let mut moves = 3;
    if !broker.manner().has_units() {
        images.push(broker.image("b", 32)?);
        definition.insert("vcpus".into(), value(2u32));
        moves = 10;
    }
    let definition = with_disks(definition, &images, 2);
    let vm = running(&bus, "vm", definition).await?;
    let mut console = console(&vm).await?;
    let mut last = beats(&mut console)?;
    let mut process = vm.process().await?;
    for _ in 0..moves {
        let at = vm.migrate("local:", no_options(), 0).await?;
        let (state, result) = ended(&bus, at).await?;
        assert_eq!(state, JobState::Done, "{result:?}");
        assert_eq!(text(&result, "Place"), "destination");
        assert_eq!(vm.state().await?, State::Running);
        let beat = beats(&mut console)?;
        ensure!(beat > last, "heartbeat {beat} after {last}");
        last = beat;
        let now = vm.process().await?;
        assert_ne!(now, process);
        assert!(!lives(process) && lives(now));
        process = now;
        let programs = broker.programs();
        assert_eq!(programs.len(), 1 + images.len(), "{programs:?}");
    }
    // Its devices are looked after as before.
    let disk = device(&bus, "vm", "disk0").await?;
    kill_process(disk.process().await?)?;
    until("a new process", async || Ok(disk.reconnects().await? == 1)).await?;
    beats(&mut console)?;
    finish(&mut console)?;
    becomes(&vm, State::Off).await
}

/// Moves a machine between two brokers so many times, by the way that `uri` gives.
async fn there_and_back(
    brokers: [&Broker; 2],
    definition: Dictionary,
    times: usize,
    uri: impl Fn(&Broker) -> Result<String>,
) -> Result<()> {
    let buses = [brokers[0].connect().await?, brokers[1].connect().await?];
    let mut vm = running(&buses[0], "vm", definition).await?;
    let mut console = test_broker::console(&vm).await?;
    let mut last = beats(&mut console)?;
    for number in 0..times {
        let (from, to) = (number % 2, (number + 1) % 2);
        let at = vm.migrate(&uri(brokers[to])?, no_options(), 0).await?;
        let (state, result) = ended(&buses[from], at).await?;
        assert_eq!(state, JobState::Done, "{result:?}");
        vm = find(&buses[to], "vm").await?.context("it did not come")?;
        // Who sent it waits for that.
        assert_eq!(vm.state().await?, State::Running);
        nothing_left(brokers[from], &buses[from], "vm").await?;
        console = test_broker::console(&vm).await?;
        let beat = beats(&mut console)?;
        ensure!(beat > last, "heartbeat {beat} after {last}");
        last = beat;
        until("an end of the job", async || {
            Ok(vm.job().await?.as_str() == "/")
        })
        .await?;
    }
    finish(&mut console)?;
    becomes(&vm, State::Off).await
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_times_between_brokers_by_a_unix_socket() -> Result<()> {
    let (a, b) = (
        Broker::start_with_doors(KEY)?,
        Broker::start_with_doors(KEY)?,
    );
    let folder = TempDir::new()?;
    let images = disks(&folder, &["a", "b"])?;
    let definition = with_disks(definition(&busy()), &images, 2);
    there_and_back([&a, &b], definition, 10, |to| Ok(to.unix())).await
}

#[test]
fn between_brokers_by_tcp_with_disk_and_network() -> Result<()> {
    network::enter()?;
    network::add_tap("net0", HOST, 4)?;
    network::echo(HOST, 7)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (a, b) = (
            Broker::start_with_doors(KEY)?,
            Broker::start_with_doors(KEY)?,
        );
        let folder = TempDir::new()?;
        let workload = Workload {
            net: NetMode::Loop,
            ..busy()
        };
        let card: HashMap<String, Variant<'static>> =
            HashMap::from([("tap".to_owned(), "net0".into())]);
        let mut definition = with_disks(definition(&workload), &disks(&folder, &["a"])?, 1);
        definition.insert("net".into(), value(vec![card]));
        definition.insert("vcpus".into(), value(2u32));
        there_and_back([&a, &b], definition, 4, Broker::tcp).await
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_named_and_nothing_is_left() -> Result<()> {
    let (a, b) = (
        Broker::start_with_doors(KEY)?,
        Broker::start_with_doors(KEY)?,
    );
    let stranger = Broker::start_with_doors("another secret than that\n")?;
    let (bus, there) = (a.connect().await?, b.connect().await?);
    let folder = TempDir::new()?;
    let image = disks(&folder, &["a"])?.remove(0);
    let vm = running(
        &bus,
        "vm",
        with_disks(definition(&busy()), std::slice::from_ref(&image), 1),
    )
    .await?;
    let mut console = console(&vm).await?;
    let mut refused = async |uri: &str, error: &str, said: &str| -> Result<()> {
        let at = vm.migrate(uri, no_options(), 0).await?;
        let (state, result) = ended(&bus, at).await?;
        assert_eq!(state, JobState::Failed, "{result:?}");
        assert_eq!(
            text(&result, "Error"),
            format!("org.godwit.Vmm1.Error.{error}")
        );
        let message = text(&result, "Message");
        ensure!(message.contains(said), "{message:?} does not say {said:?}");
        assert_eq!(text(&result, "Place"), "source");
        assert_eq!(vm.state().await?, State::Running);
        beats(&mut console)?;
        Ok(())
    };
    refused("tcp://127.0.0.1:1", "DestinationUnreachable", "refused").await?;
    refused(&stranger.tcp()?, "DestinationUnreachable", "").await?;
    // Each path may be another one there; here they are wrong ones.
    let small = b.image("small", 16)?;
    for (here, error, said) in [
        (small.display().to_string(), "MigrationFailed", "disk0"),
        (
            "/none".to_owned(),
            "NotMigratable",
            "disk /none cannot be opened",
        ),
    ] {
        let paths = HashMap::from([(image.display().to_string(), here)]);
        let options = HashMap::from([("paths".to_owned(), value(paths))]);
        let job = manager(&there)
            .await?
            .receive_migration("vm", options, 0)
            .await?;
        refused(&b.unix(), error, said).await?;
        let job = test_broker::job(&there, job).await?;
        // It ends with the machine that came, or still waits for one that fits.
        if job.state().await? == JobState::Running {
            job.cancel().await?;
        }
        nothing_left(&b, &there, "vm").await?;
    }
    let other = running(&there, "vm", definition(&diskless())).await?;
    refused(&b.unix(), "NotMigratable", "another machine vm already").await?;
    done(&there, other.terminate(0).await?).await?;
    other.remove(0).await?;
    // What stood in the way is gone.
    done(&bus, vm.migrate(&b.unix(), no_options(), 0).await?).await?;
    let vm = find(&there, "vm").await?.context("it did not come")?;
    finish(&mut test_broker::console(&vm).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_is_cancelled_and_tried_again() -> Result<()> {
    let (a, b) = (
        Broker::start_with_doors(KEY)?,
        Broker::start_with_doors(KEY)?,
    );
    let (bus, there) = (a.connect().await?, b.connect().await?);
    let folder = TempDir::new()?;
    let vm = running(
        &bus,
        "vm",
        with_disks(definition(&busy()), &disks(&folder, &["a"])?, 1),
    )
    .await?;
    let mut console = console(&vm).await?;
    let relay = unready(&folder, &b)?;
    beats(&mut console)?;
    // Each at once, whether or not the destination is done with the one before.
    for _ in 0..3 {
        let at = vm.migrate(&relay.uri(), no_options(), 0).await?;
        copies(&bus, &at).await?;
        job(&bus, at.clone()).await?.cancel().await?;
        let (state, result) = ended(&bus, at).await?;
        assert_eq!(state, JobState::Cancelled, "{result:?}");
        assert_eq!(text(&result, "Place"), "source");
        assert_eq!(vm.state().await?, State::Running);
    }
    done(&bus, vm.migrate(&b.tcp()?, no_options(), 0).await?).await?;
    let vm = find(&there, "vm").await?.context("it did not come")?;
    finish(&mut test_broker::console(&vm).await?)
}

/// Who is killed in the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    SourceDisk,
    DestinationCore,
    DestinationDisk,
    SourceBroker,
    DestinationBroker,
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_the_machine_goes_on_and_moves_later() -> Result<()> {
    let (mut a, mut b) = (
        Broker::start_with_doors(KEY)?,
        Broker::start_with_doors(KEY)?,
    );
    let (mut bus, mut there) = (a.connect().await?, b.connect().await?);
    let folder = TempDir::new()?;
    let definition = with_disks(definition(&busy()), &disks(&folder, &["a"])?, 1);
    let mut vm = running(&bus, "vm", definition).await?;
    let relay = unready(&folder, &b)?;
    for victim in [
        Victim::SourceDisk,
        Victim::DestinationCore,
        Victim::DestinationDisk,
        Victim::SourceBroker,
        Victim::DestinationBroker,
    ] {
        beats(&mut console(&vm).await?)?;
        let mut at = vm.migrate(&relay.uri(), no_options(), 0).await?;
        copies(&bus, &at).await?;
        let state = b.run().join("incoming/vm/state.json");
        let state: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(state)?)?;
        let pid = |place: &serde_json::Value| {
            let pid = place["pid"]
                .as_u64()
                .and_then(|pid| u32::try_from(pid).ok());
            pid.context("no process")
        };
        match victim {
            Victim::SourceDisk => {
                let disk = device(&bus, "vm", "disk0").await?;
                kill_process(disk.process().await?)?;
            }
            Victim::DestinationCore => kill_process(pid(&state["core"])?)?,
            Victim::DestinationDisk => kill_process(pid(&state["devices"][0]["process"])?)?,
            Victim::SourceBroker => {
                a.kill()?;
                a.start_again()?;
                bus = a.connect().await?;
                vm = find(&bus, "vm").await?.context("it is gone")?;
                at = vm.job().await?;
            }
            Victim::DestinationBroker => {
                b.kill()?;
                b.start_again()?;
                there = b.connect().await?;
            }
        }
        if !matches!(victim, Victim::SourceDisk | Victim::DestinationCore) {
            // What does not notice is ended as a user would.
            let job = job(&bus, at.clone()).await?;
            tokio::time::sleep(Duration::from_millis(300)).await;
            match job.cancel().await {
                // Or it had ended by then.
                Ok(()) | Err(api::Error::InvalidState(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let (state, result) = ended(&bus, at).await?;
        if victim == Victim::SourceDisk {
            let message = text(&result, "Message");
            ensure!(message.contains("device disk0 ended"), "{message}");
            let disk = device(&bus, "vm", "disk0").await?;
            until("a new process", async || Ok(disk.reconnects().await? == 1)).await?;
        }
        assert_ne!(state, JobState::Done, "{victim:?}: {result:?}");
        assert_eq!(text(&result, "Place"), "source", "{victim:?}: {result:?}");
        assert_eq!(vm.state().await?, State::Running, "{victim:?}");
        nothing_left(&b, &there, "vm")
            .await
            .with_context(|| format!("{victim:?}"))?;
    }
    beats(&mut console(&vm).await?)?;
    done(&bus, vm.migrate(&b.unix(), no_options(), 0).await?).await?;
    let vm = find(&there, "vm").await?.context("it did not come")?;
    // The broker that has it now is killed too.
    until("an end of the job", async || {
        Ok(vm.job().await?.as_str() == "/")
    })
    .await?;
    b.kill()?;
    b.start_again()?;
    let there = b.connect().await?;
    let vm = find(&there, "vm").await?.context("it is forgotten")?;
    let mut console = console(&vm).await?;
    beats(&mut console)?;
    finish(&mut console)?;
    becomes(&vm, State::Off).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_core_that_is_killed_while_it_is_copied_leaves_nothing_anywhere() -> Result<()> {
    let (a, b) = (
        Broker::start_with_doors(KEY)?,
        Broker::start_with_doors(KEY)?,
    );
    let (bus, there) = (a.connect().await?, b.connect().await?);
    let folder = TempDir::new()?;
    let definition = with_disks(definition(&busy()), &disks(&folder, &["a"])?, 1);
    let vm = running(&bus, "vm", definition).await?;
    let relay = unready(&folder, &b)?;
    let at = vm.migrate(&relay.uri(), no_options(), 0).await?;
    copies(&bus, &at).await?;
    kill_process(vm.process().await?)?;
    let (state, result) = ended(&bus, at).await?;
    assert_eq!(state, JobState::Failed, "{result:?}");
    assert_eq!(text(&result, "Place"), "nowhere", "{result:?}");
    becomes(&vm, State::Failed).await?;
    nothing_left(&b, &there, "vm").await?;
    // Nothing keeps it from being started again.
    done(&bus, vm.start(0).await?).await?;
    finish(&mut console(&vm).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_is_awaited_comes_where_nobody_listens_else() -> Result<()> {
    let (a, b) = (Broker::start()?, Broker::start()?);
    let (bus, there) = (a.connect().await?, b.connect().await?);
    let vm = running(&bus, "vm", definition(&diskless())).await?;
    let uri = format!("unix:{}", b.folder().join("awaited").display());
    let (state, result) = ended(&bus, vm.migrate(&uri, no_options(), 0).await?).await?;
    assert_eq!(state, JobState::Failed, "{result:?}");
    let options = HashMap::from([("listen".to_owned(), value(uri.clone()))]);
    let manager = manager(&there).await?;
    let awaits = manager.receive_migration("vm", options, 0).await?;
    done(&bus, vm.migrate(&uri, no_options(), 0).await?).await?;
    done(&there, awaits).await?;
    let vm = find(&there, "vm").await?.context("it did not come")?;
    nothing_left(&a, &bus, "vm").await?;
    finish(&mut console(&vm).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_goes_into_files_and_comes_out_again() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let images = [broker.image("a", 32)?];
    let vm = running(&bus, "vm", with_disks(definition(&busy()), &images, 1)).await?;
    let before = beats(&mut console(&vm).await?)?;
    let folder = broker.folder().join("snapshot").display().to_string();
    vm.pause(0).await?;
    done(&bus, vm.snapshot(&folder, 0).await?).await?;
    let again = vm.snapshot(&folder, 0).await.unwrap_err();
    assert!(
        matches!(again, api::Error::ResourceUnavailable(_)),
        "{again:?}"
    );
    done(&bus, vm.terminate(0).await?).await?;
    let manager = manager(&bus).await?;
    done(&bus, manager.restore_machine("", &folder, 0).await?).await?;
    assert_eq!(vm.state().await?, State::Running);
    let mut console = console(&vm).await?;
    let after = beats(&mut console)?;
    ensure!(after > before, "heartbeat {after} after {before}");
    finish(&mut console)?;
    becomes(&vm, State::Off).await?;
    // Memory that is damaged is not loaded.
    let ram = broker.folder().join("snapshot/ram0");
    let mut bytes = std::fs::read(&ram)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&ram, bytes)?;
    let (state, result) = ended(&bus, manager.restore_machine("", &folder, 0).await?).await?;
    assert_eq!(state, JobState::Failed, "{result:?}");
    assert!(broker.programs().is_empty(), "{:?}", broker.programs());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn busctl_moves_a_machine() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let vm = running(&bus, "vm", definition(&diskless())).await?;
    let path = "/org/godwit/Vmm1/machine/vm";
    let interface = "org.godwit.Vmm1.Machine";
    let said = broker.busctl(&[
        "call",
        api::SERVICE,
        path,
        interface,
        "Migrate",
        "sa{sv}t",
        "local:",
        "1",
        "max-downtime-ms",
        "t",
        "500",
        "0",
    ])?;
    let at = said.split('"').nth(1).context(said.clone())?.to_owned();
    done(&bus, at.as_str().try_into()?).await?;
    let property = |name: &str| {
        broker.busctl(&[
            "get-property",
            api::SERVICE,
            &at,
            "org.godwit.Vmm1.Job.Migration",
            name,
        ])
    };
    assert_eq!(property("URI")?.trim(), "s \"local:\"");
    assert_eq!(property("Place")?.trim(), "s \"destination\"");
    assert_eq!(property("MaxDowntimeUSec")?.trim(), "t 500000");
    assert_ne!(property("DowntimeUSec")?.trim(), "t 0");
    assert!(property("Timeline")?.contains("\"barrier B\""));
    finish(&mut console(&vm).await?)
}
