//! The program itself: options, capabilities, sandbox, metrics, readiness.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use test_framework::frontend::{
    Connection, DeviceProcess, DeviceSpec, Machine, PATIENCE, wait_for,
};
use test_framework::programs::program;

use vhost::VhostBackend;
use vhost::vhost_user::Frontend;

use crate::subject::{Subject, options, running};

/// Runs the program to its end.
fn run<S: Subject>(arguments: &[String]) -> Result<Output> {
    Ok(Command::new(program(S::PROGRAM)?)
        .args(arguments)
        .stdin(Stdio::null())
        .output()?)
}

/// Runs the program, which must refuse with one line.
pub(crate) fn refused<S: Subject>(arguments: &[String]) -> Result<String> {
    let output = run::<S>(arguments)?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(!output.status.success(), "it should have failed: {said}");
    ensure!(said.lines().count() == 1, "more than one line: {said}");
    ensure!(said.starts_with(S::PROGRAM), "without its name: {said}");
    Ok(said)
}

pub(crate) fn capabilities_are_json<S: Subject>() -> Result<()> {
    let output = run::<S>(&["--print-capabilities".to_owned()])?;
    ensure!(output.status.success(), "{:?}", output.status);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(json["type"], S::TYPE);
    assert!(json["features"].is_array());
    Ok(())
}

pub(crate) fn no_socket_is_an_error<S: Subject>() -> Result<()> {
    let subject = S::new()?;
    let said = refused::<S>(&subject.spec().arguments)?;
    ensure!(said.contains("--socket-path"), "{said}");
    Ok(())
}

pub(crate) fn two_sockets_are_an_error<S: Subject>() -> Result<()> {
    let subject = S::new()?;
    let mut arguments = subject.spec().arguments;
    arguments.extend(["--fd=3".to_owned(), "--socket-path=/tmp/x".to_owned()]);
    let said = refused::<S>(&arguments)?;
    ensure!(said.contains("cannot be used with"), "{said}");
    Ok(())
}

pub(crate) fn unknown_option_is_one_line<S: Subject>() -> Result<()> {
    let said = refused::<S>(&["--no-such-option".to_owned()])?;
    ensure!(said.contains("'--no-such-option'"), "{said}");
    Ok(())
}

pub(crate) fn socket_in_use_is_refused<S: Subject>() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("socket");
    let _listener = UnixListener::bind(&path)?;
    let subject = S::new()?;
    let mut arguments = subject.spec().arguments;
    arguments.push(format!("--socket-path={}", path.display()));
    let said = refused::<S>(&arguments)?;
    ensure!(said.contains("another process listens there"), "{said}");
    ensure!(said.contains(&path.display().to_string()), "{said}");
    Ok(())
}

pub(crate) fn folder_that_is_missing_is_named<S: Subject>() -> Result<()> {
    let subject = S::new()?;
    let mut arguments = subject.spec().arguments;
    arguments.push("--socket-path=/no/such/folder/socket".to_owned());
    let said = refused::<S>(&arguments)?;
    ensure!(
        said.contains("--socket-path /no/such/folder/socket"),
        "{said}"
    );
    Ok(())
}

pub(crate) fn descriptor_that_is_no_socket_is_refused<S: Subject>() -> Result<()> {
    let subject = S::new()?;
    for fd in ["0", "999", "-1"] {
        let mut arguments = subject.spec().arguments;
        arguments.push(format!("--fd={fd}"));
        let said = refused::<S>(&arguments)?;
        ensure!(said.contains(&format!("--fd {fd}: ")), "{said}");
    }
    Ok(())
}

/// Starts the program with a socket as its descriptor.
fn with_descriptor<S: Subject>(subject: &S, socket: &OwnedFd) -> Result<Child> {
    let number = socket.as_raw_fd();
    let mut command = Command::new(program(S::PROGRAM)?);
    command
        .arg(format!("--fd={number}"))
        .args(subject.spec().arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    inherit(&mut command, number);
    Ok(command.spawn()?)
}

pub(crate) fn connected_descriptor_is_served_once<S: Subject>() -> Result<()> {
    let subject = S::new()?;
    let (ours, theirs) = UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs);
    let mut child = with_descriptor(&subject, &theirs)?;
    drop(theirs);
    let frontend = Frontend::from_stream(ours, 1);
    frontend.set_owner()?;
    ensure!(frontend.get_features()? & S::FEATURES == S::FEATURES);
    drop(frontend);
    let status = wait_for("it ends with its front-end", || {
        child.try_wait().transpose()
    })??;
    ensure!(status.success(), "{status}");
    Ok(())
}

pub(crate) fn listening_descriptor_is_served_again<S: Subject>() -> Result<()> {
    let subject = S::new()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("socket");
    let listener = OwnedFd::from(UnixListener::bind(&path)?);
    let mut child = with_descriptor(&subject, &listener)?;
    for _ in 0..3 {
        let connection = Connection::open(&path, S::FEATURES, true)?;
        ensure!(connection.features() & S::FEATURES == S::FEATURES);
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "a descriptor is handed over between fork and exec"
)]
fn inherit(command: &mut Command, fd: i32) {
    let clear = move || {
        // SAFETY: the descriptor is open in the child; only its flag is changed.
        let result = unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
        if result < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: fcntl is safe to call between fork and exec.
    unsafe { command.pre_exec(clear) };
}

pub(crate) fn sandbox_is_entered<S: Subject>() -> Result<()> {
    let (mut subject, mut machine) = running::<S>()?;
    subject.exchange(&mut machine)?;
    let tasks = format!("/proc/{}/task", machine.process.id());
    let mut threads = 0;
    for task in fs::read_dir(tasks)? {
        let status = match fs::read_to_string(task?.path().join("status")) {
            // A thread that prefaults memory may end meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            status => status?,
        };
        threads += 1;
        for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
            ensure!(
                status.contains(line),
                "a thread is without {line}: {status}"
            );
        }
    }
    ensure!(threads > 1, "there are queue threads: {threads}");
    Ok(())
}

pub(crate) fn metrics_are_openmetrics<S: Subject>() -> Result<()> {
    let mut subject = S::new()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("metrics");
    let mut options = options(&subject);
    let argument = format!("--metrics-socket={}", path.display());
    options.device.arguments.push(argument);
    let mut machine = Machine::start(options)?;
    subject.exchange(&mut machine)?;
    let mut stream = UnixStream::connect(&path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    ensure!(text.starts_with("HTTP/1.0 200 OK\r\n"), "{text}");
    ensure!(text.ends_with("# EOF\n"), "{text}");
    let requests = text
        .lines()
        .find_map(|line| line.strip_prefix(r#"godwit_queue_requests_total{queue="0"} "#))
        .context("no counter of requests")?;
    ensure!(requests.parse::<u64>()? > 0, "{requests} requests");
    Ok(())
}

pub(crate) fn readiness_is_told<S: Subject>() -> Result<()> {
    let subject = S::new()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("notify");
    let manager = UnixDatagram::bind(&path)?;
    manager.set_read_timeout(Some(PATIENCE))?;
    let DeviceSpec {
        program: name,
        arguments,
    } = subject.spec();
    let mut child = Command::new(program(name)?)
        .arg(format!(
            "--socket-path={}",
            folder.path().join("s").display()
        ))
        .args(arguments)
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "100000")
        .stderr(Stdio::null())
        .spawn()?;
    let next = || -> Result<String> {
        let mut message = [0; 64];
        let len = manager.recv(&mut message)?;
        Ok(String::from_utf8(message[..len].to_vec())?)
    };
    let said = [next()?, next()?, next()?];
    child.kill()?;
    child.wait()?;
    assert_eq!(said, ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]);
    Ok(())
}

/// A process and a connection to it without rings.
pub(crate) fn connected<S: Subject>(
    subject: &S,
    folder: &std::path::Path,
) -> Result<(DeviceProcess, Connection)> {
    let process = DeviceProcess::start(&subject.spec(), folder)?;
    let connection = Connection::open(process.socket(), S::FEATURES, true)?;
    Ok((process, connection))
}
