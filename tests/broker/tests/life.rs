//! Machines under a broker, and what happens when processes are killed.

use std::time::Duration;

use anyhow::{Context as _, Result};
use api::device::State as DeviceState;
use api::machine::{PAUSED, State};
use api::manager::{START, TRANSIENT};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use test_broker::*;
use test_framework::machine::DEADLINE;
use test_guest::{Report, command};

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_lives_and_the_bus_shows_it() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let vm = running(&bus, "vm-1", definition(&idle())).await?;
    assert_eq!(vm.state().await?, State::Running);
    assert!(lives(vm.process().await?));
    assert!(vm.started_usec().await? > 0);
    let has_unit = !vm.unit().await?.is_empty();
    assert_eq!(has_unit, broker.manner().has_units());
    vm.pause(0).await?;
    assert_eq!(vm.state().await?, State::Paused);
    vm.resume(0).await?;
    assert_eq!(vm.state().await?, State::Running);
    let mut console = console(&vm).await?;
    let beat = |report: &Report| matches!(report, Report::Beat { .. }).then_some(());
    console.report("a heartbeat", DEADLINE, beat)?;
    vm.reset(0).await?;
    console.report("a heartbeat", DEADLINE, beat)?;
    console.send(command::POWEROFF)?;
    becomes(&vm, State::Off).await?;
    assert_eq!(vm.reason().await?, "the guest powered off");
    // It is still there, and starts again.
    let job = vm.start(PAUSED).await?;
    done(&bus, job).await?;
    assert_eq!(vm.state().await?, State::Paused);
    let again = vm.start(0).await.unwrap_err();
    assert!(matches!(again, api::Error::InvalidState(_)), "{again:?}");
    let job = vm.terminate(0).await?;
    done(&bus, job).await?;
    assert_eq!(vm.state().await?, State::Off);
    vm.remove(0).await?;
    let gone = manager(&bus).await?.get_machine("vm-1").await.unwrap_err();
    assert!(matches!(gone, api::Error::NoSuchMachine(_)), "{gone:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transient_machine_goes_with_its_end() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let manager = manager(&bus).await?;
    let path = manager
        .create_machine("once", definition(&idle()), START | TRANSIENT)
        .await?;
    let vm = machine(&bus, path).await?;
    becomes(&vm, State::Running).await?;
    vm.terminate(0).await?;
    until("the machine's end", async || {
        Ok(manager.list_machines().await?.is_empty())
    })
    .await?;
    // One that does not start goes as well.
    let mut wrong = definition(&idle());
    wrong.insert("kernel".into(), value("/etc/hostname"));
    manager
        .create_machine("wrong", wrong, START | TRANSIENT)
        .await?;
    until("the machine's end", async || {
        Ok(manager.list_machines().await?.is_empty())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_leaves_nothing_and_says_why() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let image = broker.image("disk", 8)?;
    for (key, wrong, why) in [
        (
            "kernel",
            value("/nowhere/vmlinuz"),
            "/nowhere/vmlinuz cannot be opened",
        ),
        ("kernel", value("/etc/passwd"), "kernel /etc/passwd"),
        (
            "initrd",
            value("/dev/null"),
            "initrd /dev/null is neither a file",
        ),
    ] {
        let mut definition = with_disks(definition(&idle()), std::slice::from_ref(&image), 1);
        definition.insert(key.into(), wrong);
        let path = manager(&bus)
            .await?
            .create_machine("bad", definition, 0)
            .await?;
        let vm = machine(&bus, path).await?;
        let job = vm.start(0).await?;
        let error = format!("{:#}", done(&bus, job).await.unwrap_err());
        assert!(error.contains(why), "{error}");
        assert_eq!(vm.state().await?, State::Failed);
        assert!(vm.reason().await?.contains(why));
        let left: Vec<_> = broker
            .files()
            .into_iter()
            .filter(|path| path.to_string_lossy().contains("/machines/"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        vm.remove(0).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_device_comes_back_under_io() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let images = [broker.image("a", 32)?, broker.image("b", 32)?];
    let vm = running(&bus, "vm", with_disks(definition(&busy()), &images, 4)).await?;
    let mut console = console(&vm).await?;
    active(&mut console)?;
    for round in 1..=3 {
        for (number, id) in [(0, "disk0"), (1, "disk1")] {
            works_on(&mut console, number)?;
            let disk = device(&bus, "vm", id).await?;
            kill_process(disk.process().await?)?;
            until("another process", async || {
                Ok(
                    disk.reconnects().await? == round
                        && disk.state().await? == DeviceState::Running,
                )
            })
            .await?;
            let why = disk.reason().await?;
            assert!(why.contains("SIGKILL"), "{why}");
        }
    }
    works_on(&mut console, 0)?;
    let job = device(&bus, "vm", "disk0").await?.restart(0).await?;
    done(&bus, job).await?;
    works_on(&mut console, 0)?;
    finish(&mut console)?;
    becomes(&vm, State::Off).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_dies_again_and_again_is_given_up() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let images = [broker.image("a", 32)?];
    let vm = running(&bus, "vm", with_disks(definition(&busy()), &images, 1)).await?;
    let disk = device(&bus, "vm", "disk0").await?;
    until("the end of patience", async || {
        let pid = disk.process().await?;
        if pid != 0 {
            // It may have ended in between.
            let _ = kill_process(pid);
        }
        Ok(disk.state().await? == DeviceState::Failed)
    })
    .await?;
    assert_eq!(vm.state().await?, State::Running);
    // A person may want it nevertheless.
    let job = disk.restart(0).await?;
    done(&bus, job).await?;
    let mut console = console(&vm).await?;
    works_on(&mut console, 0)?;
    finish(&mut console)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_core_takes_its_devices_and_is_said() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let images = [broker.image("a", 32)?];
    let vm = running(&bus, "vm", with_disks(definition(&busy()), &images, 1)).await?;
    let disk = device(&bus, "vm", "disk0").await?.process().await?;
    kill_process(vm.process().await?)?;
    becomes(&vm, State::Failed).await?;
    let why = vm.reason().await?;
    assert!(why.contains("SIGKILL"), "{why}");
    assert!(!lives(disk));
    assert_eq!(vm.process().await?, 0);
    let job = vm.start(0).await?;
    done(&bus, job).await?;
    let mut console = console(&vm).await?;
    active(&mut console)?;
    finish(&mut console)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_fails_is_said() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let vm = running(&bus, "vm", definition(&idle())).await?;
    let mut console = console(&vm).await?;
    let beat = |report: &Report| matches!(report, Report::Beat { .. }).then_some(());
    console.report("a heartbeat", DEADLINE, beat)?;
    console.send(command::TRIPLE)?;
    becomes(&vm, State::Failed).await?;
    let why = vm.reason().await?;
    assert!(why.contains("vCPU 0"), "{why}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_survive_their_broker() -> Result<()> {
    let mut broker = Broker::start()?;
    let bus = broker.connect().await?;
    let images = [broker.image("a", 32)?, broker.image("b", 32)?];
    let vm = running(&bus, "vm", with_disks(definition(&busy()), &images, 2)).await?;
    active(&mut console(&vm).await?)?;
    let core = vm.process().await?;
    let dying = device(&bus, "vm", "disk1").await?.process().await?;
    // A job that goes on, whatever the guest, which ignores the button, does.
    let waiting = vm.power_off(0).await?;
    broker.kill()?;
    assert!(lives(core) && lives(dying));
    // One that dies while nobody watches.
    kill_process(dying)?;
    broker.start_again()?;

    let bus = broker.connect().await?;
    let path = manager(&bus).await?.get_machine("vm").await?;
    let vm = machine(&bus, path).await?;
    assert_eq!(vm.state().await?, State::Running);
    assert_eq!(vm.process().await?, core);
    assert_eq!(vm.job().await?, waiting);
    let disk = device(&bus, "vm", "disk1").await?;
    until("another process", async || {
        Ok(disk.reconnects().await? == 1 && disk.state().await? == DeviceState::Running)
    })
    .await?;
    let mut console = console(&vm).await?;
    works_on(&mut console, 1)?;
    kill_process(device(&bus, "vm", "disk0").await?.process().await?)?;
    works_on(&mut console, 0)?;
    finish(&mut console)?;
    becomes(&vm, State::Off).await?;
    done(&bus, waiting).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_core_that_does_not_answer_the_next_broker_is_waited_for() -> Result<()> {
    let mut broker = Broker::start()?;
    let bus = broker.connect().await?;
    let vm = running(&bus, "vm", definition(&idle())).await?;
    let core = vm.process().await?;
    let signal = |signal| kill(Pid::from_raw(i32::try_from(core)?), signal).context("no core");
    for ends in [false, true] {
        signal(Signal::SIGSTOP)?;
        broker.kill()?;
        broker.start_again()?;
        let bus = broker.connect().await?;
        let path = manager(&bus).await?.get_machine("vm").await?;
        let vm = machine(&bus, path).await?;
        let silent = format!("its core, process {core}, does not answer");
        until("a word on its core", async || {
            Ok(vm.reason().await? == silent)
        })
        .await?;
        assert_eq!(vm.process().await?, core);
        if ends {
            // Who does not want to wait ends it, by force if nothing else helps.
            done(&bus, vm.terminate(0).await?).await?;
            assert_eq!(vm.state().await?, State::Failed);
        } else {
            signal(Signal::SIGCONT)?;
            until("an answer", async || Ok(vm.reason().await?.is_empty())).await?;
            assert_eq!(vm.state().await?, State::Running);
            beats(&mut console(&vm).await?)?;
        }
    }
    until("an end of its processes", async || {
        Ok(broker.programs().is_empty())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_was_cut_short_is_cleaned_up() -> Result<()> {
    let mut broker = Broker::start()?;
    let bus = broker.connect().await?;
    let images = [broker.image("a", 32)?];
    for round in 0..10 {
        let name = format!("vm{round}");
        let definition = with_disks(definition(&idle()), &images, 1);
        manager(&bus)
            .await?
            .create_machine(&name, definition, 0)
            .await?;
    }
    for round in 0..10u64 {
        let bus = broker.connect().await?;
        let name = format!("vm{round}");
        let path = manager(&bus).await?.get_machine(&name).await?;
        let vm = machine(&bus, path).await?;
        vm.start(0).await?;
        // At another moment each time.
        tokio::time::sleep(Duration::from_millis(3 * round)).await;
        broker.kill()?;
        broker.start_again()?;
        let bus = broker.connect().await?;
        let path = manager(&bus).await?.get_machine(&name).await?;
        let vm = machine(&bus, path).await?;
        match vm.state().await? {
            State::Running | State::Paused => {
                let job = vm.terminate(0).await?;
                done(&bus, job).await?;
            }
            state => assert!(matches!(state, State::Off | State::Failed), "{state:?}"),
        }
        let what = format!("round {round}: an end of all processes");
        until(&what, async || Ok(broker.left()?.is_empty())).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_ended_without_a_broker_is_known() -> Result<()> {
    let mut broker = Broker::start()?;
    let bus = broker.connect().await?;
    let vm = running(&bus, "vm", definition(&idle())).await?;
    let core = vm.process().await?;
    broker.kill()?;
    kill_process(core)?;
    broker.start_again()?;
    let bus = broker.connect().await?;
    let path = manager(&bus).await?.get_machine("vm").await?;
    let vm = machine(&bus, path).await?;
    becomes(&vm, State::Failed).await?;
    let job = vm.start(0).await?;
    done(&bus, job).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn declared_machines_are_found_and_started() -> Result<()> {
    let mut broker = Broker::start()?;
    let kernel = test_guest::program().display();
    let text = format!("kernel = \"{kernel}\"\nmemory = \"64M\"\ncmdline = \"heartbeat=50\"\n");
    std::fs::write(broker.config().join("quiet.toml"), &text)?;
    std::fs::write(
        broker.config().join("eager.toml"),
        format!("{text}autostart = true\n"),
    )?;
    std::fs::write(
        broker.config().join("wrong.toml"),
        format!("{text}cpus = 3\n"),
    )?;
    broker.kill()?;
    broker.start_again()?;
    let bus = broker.connect().await?;
    let manager = manager(&bus).await?;
    let names: Vec<_> = manager
        .list_machines()
        .await?
        .into_iter()
        .map(|m| m.name)
        .collect();
    assert_eq!(names, ["eager", "quiet"]);
    let said = broker.stderr();
    assert!(
        said.contains("wrong.toml: line 4: cpus: unknown key"),
        "{said}"
    );
    let eager = machine(&bus, manager.get_machine("eager").await?).await?;
    becomes(&eager, State::Running).await?;
    let quiet = machine(&bus, manager.get_machine("quiet").await?).await?;
    assert_eq!(quiet.state().await?, State::Off);
    let uuid = quiet.uuid().await?;
    std::fs::write(
        broker.config().join("quiet.toml"),
        format!("{text}vcpus = 2\n"),
    )?;
    let mistakes = manager.reload().await.unwrap_err();
    assert!(
        matches!(&mistakes, api::Error::InvalidDefinition(text) if text.contains("wrong.toml: line 4: cpus: unknown key")),
        "{mistakes}"
    );
    assert_eq!(quiet.vcpus().await?, 2);
    assert_eq!(quiet.uuid().await?, uuid);
    let console = std::fs::metadata(broker.run().join("log/eager/console.log"));
    console.context("the console is logged")?;
    // Files that are gone: one machine runs, and goes with its end.
    for name in ["quiet", "eager", "wrong"] {
        std::fs::remove_file(broker.config().join(format!("{name}.toml")))?;
    }
    manager.reload().await?;
    let names = async || -> Result<Vec<String>> {
        let machines = manager.list_machines().await?;
        Ok(machines.into_iter().map(|machine| machine.name).collect())
    };
    assert_eq!(names().await?, ["eager"]);
    eager.terminate(0).await?;
    until("the end of the last machine", async || {
        Ok(names().await?.is_empty())
    })
    .await
}

/// The counters that are asked for, of a device under I/O.
async fn counts(disk: &api::device::DeviceProxy<'_>, name: &str) -> Result<u64> {
    let counters = disk.statistics().await?;
    Ok(counters.get(name).copied().unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_count_also_after_a_restart_and_under_another_broker() -> Result<()> {
    let mut broker = Broker::start()?;
    let bus = broker.connect().await?;
    let images = [broker.image("a", 32)?];
    let vm = running(&bus, "vm", with_disks(definition(&busy()), &images, 2)).await?;
    active(&mut console(&vm).await?)?;
    let disk = device(&bus, "vm", "disk0").await?;
    let works = async |disk: &api::device::DeviceProxy<'_>| {
        let before = counts(disk, "requests").await?;
        until("more requests", async || {
            Ok(counts(disk, "requests").await? > before)
        })
        .await
    };
    works(&disk).await?;
    for name in ["bytes_to_guest", "cpu_usec", "own_bytes", "mapped_bytes"] {
        assert!(counts(&disk, name).await? > 0, "{name}");
    }
    assert!(counts(&disk, "own_bytes").await? < counts(&disk, "resident_bytes").await?);
    let of_machine = vm.statistics().await?;
    for name in ["requests", "bytes_from_guest", "own_bytes", "uptime_usec"] {
        assert!(of_machine[name] > 0, "{name}: {of_machine:?}");
    }
    // A new process has a link of its own, whichever broker started it.
    for broker_dies in [false, true] {
        if broker_dies {
            broker.kill()?;
            broker.start_again()?;
        }
        let bus = broker.connect().await?;
        let disk = device(&bus, "vm", "disk0").await?;
        let old = disk.process().await?;
        kill_process(old)?;
        until("another process", async || {
            Ok(![0, old].contains(&disk.process().await?))
        })
        .await?;
        works(&disk).await?;
    }
    let bus = broker.connect().await?;
    let vm = machine(&bus, api::path::machine("vm")).await?;
    let lines = [
        "godwit_broker_machines{state=\"running\"} 1",
        "godwit_broker_device_takeovers_total{machine=\"vm\",process=\"disk0\",kind=\"blk\"} 2",
        "godwit_broker_device_requests_total{machine=\"vm\",process=\"disk0\",kind=\"blk\"} ",
        "godwit_broker_process_own_bytes{machine=\"vm\",process=\"core\",kind=\"core\"} ",
        "# EOF",
    ];
    // What a busy device does not tell in time is not in them.
    until("complete metrics", async || {
        let metrics = broker.metrics()?;
        Ok(lines.iter().all(|line| metrics.contains(line)))
    })
    .await?;
    let job = vm.terminate(0).await?;
    done(&bus, job).await?;
    assert!(vm.statistics().await?.is_empty());
    let disk = device(&bus, "vm", "disk0").await?;
    assert_eq!(counts(&disk, "requests").await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_core_that_dies_in_a_call_is_said() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let vm = running(&bus, "vm", definition(&idle())).await?;
    let core = i32::try_from(vm.process().await?)?;
    kill(Pid::from_raw(core), Signal::SIGSTOP)?;
    let waiting = {
        let vm = vm.clone();
        tokio::spawn(async move { vm.pause(0).await })
    };
    // The call is under way when it has got to the core, which is not to be seen from here.
    tokio::time::sleep(Duration::from_millis(200)).await;
    kill(Pid::from_raw(core), Signal::SIGKILL)?;
    let error = waiting.await?.unwrap_err();
    assert!(
        matches!(&error, api::Error::MachineFailed(why) if why.contains("SIGKILL")),
        "{error:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_progress_of_a_start_is_told() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let images: Vec<_> = (0..4)
        .map(|number| broker.image(&format!("disk{number}"), 1))
        .collect::<Result<_>>()?;
    let rule = zbus::MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .interface("org.freedesktop.DBus.Properties")
        .path_namespace("/org/godwit/Vmm1/job")
        .build()?;
    let mut signals = zbus::MessageStream::for_match_rule(rule, &bus, None).await?;
    running(&bus, "vm", with_disks(definition(&idle()), &images, 1)).await?;
    let (mut phases, mut progress) = (Vec::new(), vec![0.0]);
    while progress.last() != Some(&1.0) {
        let signal = tokio::time::timeout(DEADLINE, api::next(&mut signals)).await?;
        let signal = signal.context("the bus ended")??;
        let body = signal.body();
        let (_, changed, _): (
            &str,
            std::collections::HashMap<&str, zbus::Variant<'_>>,
            Vec<&str>,
        ) = body.deserialize()?;
        if let Some(phase) = changed.get("Phase") {
            phases.push(<&str>::try_from(phase)?.to_owned());
        }
        if let Some(now) = changed.get("Progress") {
            progress.push(f64::try_from(now)?);
        }
    }
    assert!(progress.is_sorted(), "{progress:?}");
    assert!(
        phases.contains(&"waiting for the core".to_owned()),
        "{phases:?}"
    );
    Ok(())
}
