//! The command line: taps that cannot be used, and taps that are handed over.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use test_framework::frontend::{DeviceProcess, DeviceSpec, Machine, wait_for};

use super::Net;
use super::host::{TAP, make_tap};
use crate::subject::{Subject, options};

/// What the program says when it is started with these options and cannot.
fn refusal(arguments: &[&str]) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let spec = DeviceSpec {
        program: Net::PROGRAM,
        arguments: arguments.iter().map(ToString::to_string).collect(),
    };
    let mut process = DeviceProcess::spawn(&spec, folder.path())?;
    let status = process.wait()?;
    ensure!(!status.success(), "{arguments:?} was accepted");
    let log = process.log();
    ensure!(log.lines().count() == 1, "more than one line: {log}");
    Ok(log)
}

#[test]
fn a_tap_that_cannot_be_used_is_one_line_with_what_to_do() -> Result<()> {
    let _net = Net::new()?;
    let one_queue = make_tap("single", 0)?;
    let layer_3 = make_tap("routed", libc::IFF_TUN)?;
    for (arguments, said) in [
        (&["--tap", "a/b"][..], ["--tap a/b: ", "interface name"]),
        (&["--tap", "single"], ["--tap single: ", "busy"]),
        (
            &["--tap", "single", "--queue-pairs=2"],
            ["--tap single: ", "mode tap multi_queue"],
        ),
        (&["--tap", "routed"], ["--tap routed: ", "ip tuntap show"]),
        (&["--tap", "lo"], ["--tap lo: ", "not a tap"]),
        (
            &["--tap", TAP, "--queue-pairs=33"],
            ["--queue-pairs 33: ", "1 to 32"],
        ),
        (
            &["--tap", TAP, "--mac=1:2"],
            ["--mac 1:2: ", "52:54:00:12:34:56"],
        ),
        (&["--tap", TAP, "--tap-fd=9"], ["--tap-fd", "see --help"]),
        (&["--tap-fd", "99"], ["--tap-fd 99: ", "not open"]),
        (&[], ["--tap", "see --help"]),
    ] {
        let line = refusal(arguments)?;
        for word in said {
            ensure!(line.contains(word), "{line}");
        }
    }
    drop((one_queue, layer_3));
    Ok(())
}

fn hand_over(fd: &OwnedFd) -> Result<String> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(fd.as_raw_fd().to_string())
}

#[test]
fn queues_that_are_handed_over_are_served() -> Result<()> {
    let mut net = Net::new()?;
    let queue = make_tap(TAP, libc::IFF_MULTI_QUEUE)?;
    let mut with_fd = options(&net);
    with_fd.device.arguments = vec![format!("--tap-fd={}", hand_over(&queue)?)];
    let mut machine = Machine::start(with_fd)?;
    net.exchange(&mut machine)
}

#[test]
fn a_tap_that_is_not_there_is_made_and_goes_with_the_process() -> Result<()> {
    let net = Net::new()?;
    let mut fresh = options(&net);
    fresh.device.arguments = vec!["--tap=fresh".to_owned(), "--mtu=1400".to_owned()];
    fresh.features |= 1 << 3;
    let mut machine = Machine::start(fresh)?;
    ensure!(nix::net::if_::if_nametoindex("fresh").is_ok());
    assert_eq!(machine.connection.config(10, 2)?, 1400u16.to_le_bytes());
    machine.process.kill()?;
    wait_for("the tap goes", || {
        nix::net::if_::if_nametoindex("fresh").err().map(drop)
    })
}
