//! The control link: what is told on it, and what its end or a hostile peer does to the device.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::future::poll_fn;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::pin::pin;

use anyhow::{Context as _, Result, ensure};
use api::device1::{Device1Proxy, INTERFACE, PATH, Prefault};
use futures_core::Stream as _;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use test_framework::frontend::{DeviceSpec, Machine, MachineOptions, PATIENCE, wait_for};
use tokio::runtime::Runtime;
use zbus::proxy::CacheProperties;
use zbus::{Connection, OwnedVariant, Variant};

use super::program::refused;
use crate::subject::{Subject, options};

/// The core's end of a link, and what it is driven by.
pub(crate) struct Core {
    pub(crate) runtime: Runtime,
    pub(crate) connection: Connection,
}

impl Core {
    pub(crate) fn new(socket: UnixStream) -> Result<Self> {
        let runtime = Runtime::new()?;
        let connection = runtime.block_on(async {
            let connection = api::peer::client(socket)?.build();
            anyhow::Ok(tokio::time::timeout(PATIENCE, connection).await??)
        })?;
        Ok(Self {
            runtime,
            connection,
        })
    }

    fn ask<T>(
        &self,
        question: impl AsyncFnOnce(&Device1Proxy<'_>) -> Result<T, api::Error>,
    ) -> Result<T> {
        let asked = async {
            let device = Device1Proxy::builder(&self.connection)
                .cache_properties(CacheProperties::No)
                .build()
                .await?;
            anyhow::Ok(question(&device).await?)
        };
        self.runtime
            .block_on(async { tokio::time::timeout(PATIENCE, asked).await })?
    }

    pub(crate) fn statistics(&self) -> Result<BTreeMap<String, u64>> {
        self.ask(async |device| Ok(device.statistics().await?))
    }

    fn last_error(&self) -> Result<String> {
        self.ask(async |device| Ok(device.last_error().await?))
    }
}

/// Makes a descriptor one that children inherit; returns its number.
fn hand_over(fd: &OwnedFd) -> Result<i32> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(fd.as_raw_fd())
}

/// A machine whose device has a link, and the other end of the link.
fn linked<S: Subject>() -> Result<(S, Machine, UnixStream)> {
    let subject = S::new()?;
    let options = options(&subject);
    let (machine, ours) = linked_with(options)?;
    Ok((subject, machine, ours))
}

/// As [`linked`], for a machine of `options`.
pub(crate) fn linked_with(mut options: MachineOptions) -> Result<(Machine, UnixStream)> {
    let (ours, _theirs) = link(&mut options.device)?;
    let machine = Machine::start(options)?;
    Ok((machine, ours))
}

/// Lets a device that will be started have a link: the core's end of it, and the device's, which is
/// to be kept until then.
pub(crate) fn link(device: &mut DeviceSpec) -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs);
    let argument = format!("--control-fd={}", hand_over(&theirs)?);
    device.arguments.push(argument);
    Ok((ours, theirs))
}

fn with_core<S: Subject>() -> Result<(S, Machine, Core)> {
    let (subject, machine, socket) = linked::<S>()?;
    Ok((subject, machine, Core::new(socket)?))
}

pub(crate) fn interface_is_introspected<S: Subject>() -> Result<()> {
    let (_subject, _machine, core) = with_core::<S>()?;
    let xml: String = core.runtime.block_on(async {
        let introspectable = Some("org.freedesktop.DBus.Introspectable");
        let call =
            core.connection
                .call_method(None::<&str>, PATH, introspectable, "Introspect", &());
        let answer = tokio::time::timeout(PATIENCE, call).await??;
        anyhow::Ok(answer.body().deserialize()?)
    })?;
    for word in [
        r#"interface name="org.godwit.Device1""#,
        r#"method name="Statistics""#,
        r#"type="a{st}""#,
        r#"method name="Prefault""#,
        r#"method name="CancelPrefault""#,
        r#"property name="LastError" type="s" access="read""#,
        r#"property name="State" type="s" access="read""#,
        r#"property name="PrefaultedBytes" type="t" access="read""#,
    ] {
        ensure!(xml.contains(word), "{word} is not in {xml}");
    }
    assert_eq!(core.ask(async |d| Ok(d.kind().await?))?, S::KIND);
    assert_eq!(core.ask(async |d| Ok(d.unit().await?))?, S::KIND);
    let version = core.ask(async |d| Ok(d.version().await?))?;
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
    Ok(())
}

pub(crate) fn statistics_move_with_data<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, core) = with_core::<S>()?;
    let before = core.statistics()?;
    for _ in 0..10 {
        subject.exchange(&mut machine)?;
    }
    let after = core.statistics()?;
    for (name, count) in &before {
        ensure!(
            after.get(name) >= Some(count),
            "{name} went back: {after:?}"
        );
    }
    for name in ["requests", "kicks", "bytes_to_guest", "bytes_from_guest"] {
        let (before, after) = (before.get(name), after.get(name));
        ensure!(
            after > before && before.is_some(),
            "{name}: {before:?}, {after:?}"
        );
    }
    // The first session was the look whether the process listens.
    ensure!(after.get("sessions") >= Some(&1), "{after:?}");
    assert_eq!(after.get("errors"), Some(&0));
    assert_eq!(core.last_error()?, "");
    Ok(())
}

pub(crate) fn life_is_told<S: Subject>() -> Result<()> {
    let (_subject, mut machine, core) = with_core::<S>()?;
    let state = || core.ask(async |d| Ok(d.state().await?));
    let connected = || core.ask(async |d| Ok(d.connected().await?));
    assert_eq!((state()?.as_str(), connected()?), ("Running", true));
    machine.stop_rings()?;
    assert_eq!(state()?, "Stop");
    machine.start_rings()?;
    assert_eq!(state()?, "Running");
    let Machine {
        process,
        connection,
        ..
    } = machine;
    drop(connection);
    wait_for("the device is free", || {
        connected().is_ok_and(|c| !c).then_some(())
    })?;
    assert_eq!(state()?, "Stop");
    drop(process);
    Ok(())
}

pub(crate) fn changes_are_signalled<S: Subject>() -> Result<()> {
    let (_subject, mut machine, core) = with_core::<S>()?;
    let mut signals = core.runtime.block_on(async {
        let properties = zbus::fdo::PropertiesProxy::builder(&core.connection)
            .path(PATH)
            .destination(INTERFACE)
            .build()
            .await?;
        properties.receive_properties_changed().await
    })?;
    machine.stop_rings()?;
    let wait = async {
        loop {
            let next = poll_fn(|context| pin!(&mut signals).poll_next(context));
            let signal = next.await.context("the link is over")?;
            let arguments = signal.args()?;
            let changed: &HashMap<&str, Variant<'_>> = arguments.changed_properties();
            if let Some(state) = changed.get("State") {
                let state = OwnedVariant::try_from(state.try_clone()?)?;
                break anyhow::Ok(String::try_from(state)?);
            }
        }
    };
    let state = core
        .runtime
        .block_on(async { tokio::time::timeout(PATIENCE, wait).await })??;
    assert_eq!(state, "Stop");
    Ok(())
}

pub(crate) fn errors_are_told<S: Subject>() -> Result<()> {
    let (_subject, machine, core) = with_core::<S>()?;
    let Machine {
        process,
        connection,
        ..
    } = machine;
    drop(connection);
    let mut stream = UnixStream::connect(process.socket())?;
    stream.write_all(&[0xff; 64])?;
    let error = wait_for("an error", || {
        core.last_error().ok().filter(|text| !text.is_empty())
    })?;
    ensure!(!error.contains('\n'), "{error}");
    let statistics = core.statistics()?;
    assert_eq!(statistics.get("errors"), Some(&1));
    assert_eq!(statistics.get("failed_sessions"), Some(&1));
    Ok(())
}

pub(crate) fn prefault_is_told_and_steered<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, core) = with_core::<S>()?;
    let progress = || {
        core.ask(async |d| {
            let running = d.prefaulting().await?;
            Ok((
                running,
                d.mapped_bytes().await?,
                d.prefaulted_bytes().await?,
            ))
        })
    };
    let end = || {
        wait_for("the walk ends", || {
            progress().ok().filter(|(running, ..)| !running)
        })
    };
    let (_, mapped, done) = end()?;
    ensure!(mapped > 0 && done == mapped, "{done} of {mapped}");
    core.ask(async |d| d.prefault(Prefault::All).await)?;
    assert_eq!(end()?, (false, mapped, mapped));
    core.ask(async |d| d.prefault(Prefault::Off).await)?;
    assert_eq!(progress()?, (false, mapped, 0));
    core.ask(async |d| Ok(d.cancel_prefault().await?))?;
    // It counts for the next table too.
    machine.connection.set_memory(&[&machine.ram])?;
    assert_eq!(progress()?, (false, mapped, 0));
    subject.exchange(&mut machine)
}

pub(crate) fn device_outlives_its_link<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, core) = with_core::<S>()?;
    subject.load(&mut machine)?;
    drop(core);
    machine.process.wait_log("the control link is over")?;
    subject.settle(&mut machine)?;
    subject.exchange(&mut machine)?;
    machine.stop_rings()?;
    machine.start_rings()?;
    subject.exchange(&mut machine)
}

/// Says `words` on the link as they are, and waits until the device has had enough.
fn hostile<S: Subject>(shake: bool, words: &[u8]) -> Result<()> {
    let (mut subject, mut machine, mut socket) = linked::<S>()?;
    socket.set_read_timeout(Some(PATIENCE))?;
    if shake {
        socket.write_all(b"\0AUTH ANONYMOUS 00\r\nBEGIN\r\n")?;
        let mut ok = [0; 3];
        socket.read_exact(&mut ok)?;
        assert_eq!(&ok, b"OK ");
    }
    // It may hang up in the middle of it.
    let _ = socket.write_all(words);
    // It failed, or it was up and is over.
    machine.process.wait_log("the control link")?;
    subject.exchange(&mut machine)?;
    ensure!(!machine.process.has_ended(), "it ended");
    Ok(())
}

pub(crate) fn junk_ends_the_link_only<S: Subject>() -> Result<()> {
    for words in [b"\n".as_slice(), &[0xff; 8192], b"GET / HTTP/1.1\r\n\r\n"] {
        hostile::<S>(false, words)?;
    }
    Ok(())
}

pub(crate) fn a_huge_message_ends_the_link_only<S: Subject>() -> Result<()> {
    let head = [
        &b"l\x01\0\x01"[..],
        &[0xff, 0xff, 0xff, 7, 1, 0, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    hostile::<S>(true, &head)
}

pub(crate) fn a_silent_peer_holds_up_nothing<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, socket) = linked::<S>()?;
    subject.exchange(&mut machine)?;
    machine.stop_rings()?;
    machine.start_rings()?;
    subject.exchange(&mut machine)?;
    // It is heard when it speaks at last.
    let core = Core::new(socket)?;
    ensure!(core.statistics()?.get("requests") > Some(&0));
    machine.process.signal(nix::sys::signal::Signal::SIGTERM)?;
    ensure!(machine.process.wait()?.success());
    Ok(())
}

pub(crate) fn link_lives_in_the_sandbox<S: Subject>() -> Result<()> {
    let (_subject, machine, core) = with_core::<S>()?;
    core.statistics()?;
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", machine.process.id()))? {
        let task = task?.path();
        let status = fs::read_to_string(task.join("status"))?;
        for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
            ensure!(
                status.contains(line),
                "a thread is without {line}: {status}"
            );
        }
        names.push(fs::read_to_string(task.join("comm"))?.trim().to_owned());
    }
    ensure!(names.iter().any(|name| name == "link"), "{names:?}");
    // To answer this it would have to open a file.
    let machine_id = core.runtime.block_on(async {
        let peer = Some("org.freedesktop.DBus.Peer");
        let call = core
            .connection
            .call_method(None::<&str>, PATH, peer, "GetMachineId", &());
        tokio::time::timeout(PATIENCE, call).await
    })?;
    ensure!(machine_id.is_err(), "it opened a file: {machine_id:?}");
    core.statistics()?;
    Ok(())
}

pub(crate) fn a_link_that_is_none_is_refused<S: Subject>() -> Result<()> {
    let subject = S::new()?;
    let folder = tempfile::tempdir()?;
    let listener = OwnedFd::from(UnixListener::bind(folder.path().join("s"))?);
    let (_ours, pair) = UnixStream::pair()?;
    let pair = OwnedFd::from(pair);
    let (listening, connected) = (hand_over(&listener)?, hand_over(&pair)?);
    for (fd, control_fd, reason) in [
        (connected, 999, "is no open descriptor"),
        (connected, 0, "is no open descriptor"),
        (connected, listening, "one end of a connection"),
        (connected, connected, "hand over two sockets"),
    ] {
        let mut arguments = subject.spec().arguments;
        arguments.push(format!("--fd={fd}"));
        arguments.push(format!("--control-fd={control_fd}"));
        let said = refused::<S>(&arguments)?;
        ensure!(
            said.contains(&format!("--control-fd {control_fd}: ")),
            "{said}"
        );
        ensure!(said.contains(reason), "{said}");
    }
    Ok(())
}

/// The own memory of a process whose link is in use.
pub(crate) fn own_memory_stays_small<S: Subject>() -> Result<()> {
    let (mut subject, mut machine, core) = with_core::<S>()?;
    for _ in 0..20 {
        subject.exchange(&mut machine)?;
        core.statistics()?;
    }
    let status = fs::read_to_string(format!("/proc/{}/status", machine.process.id()))?;
    let anonymous = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|line| line.split_whitespace().next())
        .context("no RssAnon")?;
    let kib: u64 = anonymous.parse()?;
    ensure!(kib < 8 << 10, "{kib} KiB of its own");
    Ok(())
}
