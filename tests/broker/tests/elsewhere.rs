//! Machines that are at another host, or may be: exactly one runs, whatever is lost on the way.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use api::Dictionary;
use api::job::State as JobState;
use api::machine::{FORCE, MachineProxy, REPLAY, State};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use test_broker::*;
use test_framework::console::Console;
use test_framework::machine::make_image;
use test_guest::{BlkMode, Workload};
use zbus::Connection;

const KEY: &str = "a secret of two brokers\n";

/// A guest that works, and may stand still for longer than a core waits for another.
fn work() -> Workload {
    Workload {
        heartbeat: 20,
        timeout: 300_000,
        blk: BlkMode::Loop,
        depth: 4,
        span: 8,
        dirty: 40,
        poweroff: true,
        ..Workload::default()
    }
}

/// Two brokers.
struct Pair {
    brokers: [Broker; 2],
    buses: [Connection; 2],
    folder: TempDir,
}

impl Pair {
    async fn start() -> Result<Self> {
        let brokers = [Broker::start_with_doors(KEY)?, Broker::start_beside(KEY)?];
        let buses = [brokers[0].connect().await?, brokers[1].connect().await?];
        let folder = TempDir::new()?;
        Ok(Self {
            brokers,
            buses,
            folder,
        })
    }

    /// A machine at the first of them, whose disk both have.
    async fn machine(&self) -> Result<MachineProxy<'static>> {
        let disk = self.folder.path().join("disk");
        make_image(&disk, 32)?;
        running(
            &self.buses[0],
            "vm",
            with_disks(definition(&work()), &[disk], 1),
        )
        .await
    }

    /// The machine at one of them, if it knows it.
    async fn at(&self, number: usize) -> Result<Option<MachineProxy<'static>>> {
        let bus = &self.buses[number];
        match manager(bus).await?.get_machine("vm").await {
            Ok(path) => machine(bus, path).await.map(Some),
            Err(api::Error::NoSuchMachine(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn runs(&self, number: usize) -> Result<bool> {
        match self.at(number).await? {
            Some(vm) => Ok(vm.state().await? == State::Running),
            None => Ok(false),
        }
    }

    /// The core that waits for the machine at the second of them, and the socket where it is called.
    fn core_there(&self) -> Result<(u32, PathBuf)> {
        let place = self.brokers[1].run().join("incoming/vm");
        let state: serde_json::Value =
            serde_json::from_slice(&fs::read(place.join("state.json"))?)?;
        let pid = state["core"]["pid"].as_u64().context("no core")?;
        Ok((pid.try_into()?, place.join("control")))
    }

    /// Kills brokers, and starts others in their places.
    async fn kill(&mut self, numbers: &[usize]) -> Result<()> {
        for &number in numbers {
            self.brokers[number].kill()?;
        }
        for &number in numbers {
            self.brokers[number].start_again()?;
            self.buses[number] = self.brokers[number].connect().await?;
        }
        Ok(())
    }

    /// Where it is in the end, when no job works on it any more: at one of them, and it works.
    async fn settles(&self) -> Result<usize> {
        until("one place of the machine", async || {
            let mut places = 0;
            for number in 0..2 {
                let Some(vm) = self.at(number).await? else {
                    continue;
                };
                match vm.job().await {
                    Ok(job) if job.as_str() == "/" => places += 1,
                    // It may be forgotten at this moment.
                    _ => return Ok(false),
                }
            }
            // None, when it comes to the first of them after that was asked.
            Ok(places == 1)
        })
        .await?;
        let place = usize::from(self.at(0).await?.is_none());
        let vm = self.at(place).await?.context("it is gone")?;
        becomes(&vm, State::Running).await?;
        beats(&mut take_console(&vm).await?)?;
        let other = &self.brokers[1 - place];
        until("an end of the other processes", async || {
            Ok(other.programs().is_empty())
        })
        .await?;
        Ok(place)
    }
}

/// The console, also when that of the look before has not been left yet.
async fn take_console(vm: &MachineProxy<'_>) -> Result<Console> {
    let socket = vm.open_console("", FORCE | REPLAY).await?;
    Console::new(UnixStream::from(OwnedFd::from(socket)))
}

fn place(result: &Dictionary) -> String {
    text(result, "Place")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_word_that_is_lost_is_asked_for() -> Result<()> {
    let mut pair = Pair::start().await?;
    let relay = Relay::start(pair.folder.path(), &pair.brokers[1].unix())?;
    let vm = pair.machine().await?;
    // Of the commit the destination never hears: it ends, and says so.
    relay.lose("Commit", false);
    let at = vm.migrate(&relay.uri(), Dictionary::new(), 0).await?;
    let (state, result) = ended(&pair.buses[0], at).await?;
    assert_eq!(state, JobState::Failed, "{result:?}");
    assert_eq!(place(&result), "source", "{result:?}");
    assert_eq!(pair.settles().await?, 0);
    // Nobody hears of it for a while, and the broker is killed meanwhile.
    relay.lose("Commit", true);
    let at = vm.migrate(&relay.uri(), Dictionary::new(), 0).await?;
    until_asked(&pair.buses[0], &at).await?;
    job(&pair.buses[0], at.clone()).await?.cancel().await?;
    let (state, result) = ended(&pair.buses[0], at).await?;
    assert_eq!(state, JobState::Failed, "{result:?}");
    assert_eq!(place(&result), "undecided", "{result:?}");
    assert_eq!(vm.state().await?, State::Paused);
    ensure!(vm.resume(0).await.is_err(), "it runs by mistake");
    pair.kill(&[0]).await?;
    relay.open();
    assert_eq!(pair.settles().await?, 0);
    // Here the destination has heard it, and the source does not hear that.
    let vm = pair.at(0).await?.context("it is gone")?;
    relay.lose("Running", false);
    let at = vm.migrate(&relay.uri(), Dictionary::new(), 0).await?;
    let (state, result) = ended(&pair.buses[0], at).await?;
    assert_eq!(state, JobState::Done, "{result:?}");
    assert_eq!(place(&result), "destination", "{result:?}");
    assert_eq!(pair.settles().await?, 1);
    let vm = pair.at(1).await?.context("it is gone")?;
    finish(&mut take_console(&vm).await?)
}

/// Waits until a job asks what became of its machine.
async fn until_asked(bus: &Connection, at: &zbus::OwnedObjectPath) -> Result<()> {
    let job = job(bus, at.clone()).await?;
    until("a question", async || {
        Ok(job.phase().await? == "asking the destination")
    })
    .await
}

/// Gives the machine to a core that stands still and says nothing for as long as the source waits,
/// until that asks what became of it. The job, and that core.
async fn given_to_a_silent_core(
    pair: &Pair,
    vm: &MachineProxy<'_>,
) -> Result<(zbus::OwnedObjectPath, u32)> {
    let relay = Relay::start(pair.folder.path(), &pair.brokers[1].unix())?;
    relay.hold("Loaded");
    let long = ("blackout-limit-ms".to_owned(), value(60_000u64));
    let at = vm.migrate(&relay.uri(), [long].into(), 0).await?;
    until("a machine that is loaded", async || Ok(relay.holds())).await?;
    let (core, _) = pair.core_there()?;
    signal(core, Signal::SIGSTOP)?;
    relay.open();
    until_asked(&pair.buses[0], &at).await?;
    assert_eq!(vm.state().await?, State::Paused);
    Ok((at, core))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_core_that_is_silent_when_it_is_given_the_machine_is_waited_for() -> Result<()> {
    let mut pair = Pair::start().await?;
    let vm = pair.machine().await?;
    let (at, core) = given_to_a_silent_core(&pair, &vm).await?;
    job(&pair.buses[0], at.clone()).await?.cancel().await?;
    let (_, result) = ended(&pair.buses[0], at).await?;
    assert_eq!(place(&result), "undecided", "{result:?}");
    ensure!(vm.resume(0).await.is_err(), "it runs by mistake");
    signal(core, Signal::SIGCONT)?;
    // One that is started asks at once.
    pair.kill(&[0]).await?;
    // It has waited for the word for as long as the source for the answer: one of them has it.
    let place = pair.settles().await?;
    let vm = pair.at(place).await?.context("it is gone")?;
    finish(&mut take_console(&vm).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_core_that_was_silent_when_it_was_given_the_machine_and_is_killed_has_not_got_it()
-> Result<()> {
    let pair = Pair::start().await?;
    let vm = pair.machine().await?;
    let (at, core) = given_to_a_silent_core(&pair, &vm).await?;
    kill_process(core)?;
    let (state, result) = ended(&pair.buses[0], at).await?;
    assert_eq!(state, JobState::Failed, "{result:?}");
    assert_eq!(pair.settles().await?, 0);
    finish(&mut take_console(&vm).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_core_whose_connection_is_lost_is_called_again() -> Result<()> {
    let pair = Pair::start().await?;
    let relay = Relay::start(pair.folder.path(), &pair.brokers[1].unix())?;
    let vm = pair.machine().await?;
    relay.hold("Ready");
    let at = vm.migrate(&relay.uri(), Dictionary::new(), 0).await?;
    until("a destination", async || Ok(relay.holds())).await?;
    let (core, control) = pair.core_there()?;
    ensure!(cut(core, &control)? > 0, "nobody was connected");
    relay.open();
    let (state, result) = ended(&pair.buses[0], at).await?;
    assert_eq!(state, JobState::Done, "{result:?}");
    assert_eq!(pair.settles().await?, 1);
    let vm = pair.at(1).await?.context("it is gone")?;
    // It is talked to.
    vm.pause(0).await?;
    becomes(&vm, State::Paused).await?;
    vm.resume(0).await?;
    finish(&mut take_console(&vm).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn somebody_decides_when_the_other_host_is_lost() -> Result<()> {
    let pair = Pair::start().await?;
    let relay = Relay::start(pair.folder.path(), &pair.brokers[1].unix())?;
    let vm = pair.machine().await?;
    for (word, there) in [("Commit", false), ("Running", true)] {
        relay.open();
        relay.lose(word, true);
        let at = vm.migrate(&relay.uri(), Dictionary::new(), 0).await?;
        until_asked(&pair.buses[0], &at).await?;
        job(&pair.buses[0], at.clone()).await?.cancel().await?;
        let (_, result) = ended(&pair.buses[0], at).await?;
        assert_eq!(place(&result), "undecided", "{result:?}");
        let reason = vm.reason().await?;
        ensure!(reason.contains("godwit decide vm"), "{reason}");
        until("an end of the job", async || {
            Ok(vm.job().await?.as_str() == "/")
        })
        .await?;
        vm.decide(there, 0).await?;
        assert_eq!(pair.settles().await?, usize::from(there));
    }
    let vm = pair.at(1).await?.context("it is gone")?;
    finish(&mut take_console(&vm).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn brokers_that_are_killed_at_any_moment_find_the_machine_again() -> Result<()> {
    let mut pair = Pair::start().await?;
    pair.machine().await?;
    let mut place = 0;
    for (number, delay) in [0, 20, 60, 120, 200, 300, 500].into_iter().enumerate() {
        let vm = pair.at(place).await?.context("it is gone")?;
        let there = pair.brokers[1 - place].unix();
        vm.migrate(&there, Dictionary::new(), 0).await?;
        tokio::time::sleep(Duration::from_millis(delay)).await;
        match number % 3 {
            0 => pair.kill(&[0, 1]).await?,
            1 => pair.kill(&[place]).await?,
            _ => pair.kill(&[1 - place]).await?,
        }
        place = pair
            .settles()
            .await
            .with_context(|| format!("after {delay} ms"))?;
    }
    let vm = pair.at(place).await?.context("it is gone")?;
    finish(&mut take_console(&vm).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_came_and_had_not_begun_to_go_on_stays() -> Result<()> {
    let mut pair = Pair::start().await?;
    let vm = pair.machine().await?;
    let there = pair.brokers[1].unix();
    let at = vm.migrate(&there, Dictionary::new(), 0).await?;
    let (state, result) = ended(&pair.buses[0], at).await?;
    assert_eq!(state, JobState::Done, "{result:?}");
    // The next destination is called, and says nothing.
    let silent = pair.folder.path().join("silent");
    let _silent = UnixListener::bind(&silent)?;
    let vm = pair.at(1).await?.context("it did not come")?;
    let uri = format!("unix:{}", silent.display());
    vm.migrate(&uri, Dictionary::new(), 0).await?;
    pair.kill(&[1]).await?;
    assert_eq!(pair.settles().await?, 1);
    let vm = pair.at(1).await?.context("it is gone")?;
    finish(&mut take_console(&vm).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_declared_machine_that_has_moved_is_not_started_again() -> Result<()> {
    let mut pair = Pair::start().await?;
    let workload = Workload {
        blk: BlkMode::Off,
        ..work()
    };
    let text = format!(
        "uuid = \"6f1c7d0a-0b5e-4a53-9f43-0d3f3d6c9a11\"\nkernel = \"{}\"\ncmdline = \"{workload}\"\nmemory = \"64M\"\n\
         autostart = true\n",
        test_guest::program().display()
    );
    fs::write(pair.brokers[0].config().join("vm.toml"), text)?;
    pair.kill(&[0]).await?;
    let vm = pair.at(0).await?.context("it is not declared")?;
    becomes(&vm, State::Running).await?;
    until("an end of the start", async || {
        Ok(vm.job().await?.as_str() == "/")
    })
    .await?;
    let there = pair.brokers[1].unix();
    done(
        &pair.buses[0],
        vm.migrate(&there, Dictionary::new(), 0).await?,
    )
    .await?;
    for _ in 0..2 {
        let vm = pair.at(0).await?.context("it is not declared")?;
        let error = vm.start(0).await.unwrap_err().to_string();
        ensure!(
            error.contains(&format!("vm has moved to {there}")),
            "{error}"
        );
        ensure!(vm.reason().await?.contains("has moved"), "no reason");
        assert_eq!(vm.state().await?, State::Off);
        ensure!(pair.runs(1).await?, "it does not run there");
        pair.kill(&[0]).await?;
    }
    // It comes back, and is what it was.
    let back = pair.at(1).await?.context("it is gone")?;
    let here = pair.brokers[0].unix();
    done(
        &pair.buses[1],
        back.migrate(&here, Dictionary::new(), 0).await?,
    )
    .await?;
    let vm = pair.at(0).await?.context("it is gone")?;
    beats(&mut take_console(&vm).await?)?;
    pair.kill(&[0]).await?;
    let vm = pair.at(0).await?.context("it is gone")?;
    // The other host is lost with it.
    until("an end of the job", async || {
        Ok(vm.job().await?.as_str() == "/")
    })
    .await?;
    done(
        &pair.buses[0],
        vm.migrate(&there, Dictionary::new(), 0).await?,
    )
    .await?;
    let lost = pair.at(1).await?.context("it is gone")?;
    done(&pair.buses[1], lost.terminate(0).await?).await?;
    done(&pair.buses[0], vm.start(FORCE).await?).await?;
    finish(&mut take_console(&vm).await?)
}
