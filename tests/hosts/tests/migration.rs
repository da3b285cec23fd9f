//! A stock Linux guest that moves while it works: between two brokers of a host and within one,
//! and between two hosts. The bytes of its disk, its connection, its timers, its clock and its
//! kernel's messages say whether it noticed.

use std::fs::{File, hard_link};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use test_framework::programs::program;
use test_hosts::{Host, HostOptions, Pair};

const SCRIPT: &str = include_str!("migration.sh");
/// The image, on the share of each host.
const DISK: &str = "disk.ext4";
const PROGRAMS: [&str; 5] = [
    "godwit",
    "godwit-broker",
    "godwit-vmm",
    "godwit-blk",
    "godwit-net",
];

/// Copying takes seconds in an emulated host, and more on a busy machine.
const DEADLINE: Duration = Duration::from_secs(420);

/// Milliseconds that the guest's clock may be away from the host's, more than at first: what asking
/// takes on a busy machine. It loses more when it stands still in a blackout, or in each of some.
const CLOCK_MS: i64 = 250;

/// Puts the programs into a host.
fn install(host: &mut Host) -> Result<()> {
    for name in PROGRAMS {
        host.install(&[&program(name)?])?;
    }
    Ok(())
}

/// Calls some of the script's functions, one a line.
fn call(host: &mut Host, functions: &str) -> Result<String> {
    Ok(host.call(SCRIPT, functions, DEADLINE)?)
}

/// What the guest tells in the end must be that it noticed nothing.
fn noticed_nothing(told: &str) -> Result<()> {
    let after =
        |word: &str| -> Vec<_> { told.lines().filter_map(|l| l.strip_prefix(word)).collect() };
    ensure!(after("KERNEL ").is_empty(), "its kernel complained: {told}");
    let clock = after("CLOCK ");
    let away = clock.first().and_then(|clock| clock.split(' ').next_back());
    let away: i64 = away.context("it told of no clock")?.parse()?;
    ensure!(
        away.abs() <= CLOCK_MS,
        "its clock is {away} ms away: {told}"
    );
    ensure!(after("DONE").len() == 1, "it did not end: {told}");
    Ok(())
}

#[test]
fn a_linux_guest_moves_between_brokers_of_a_host() -> Result<()> {
    let mut host = Host::start(&HostOptions::named("brokers"))?;
    install(&mut host)?;
    let start = "network 1\n peer\n broker a tcp://127.0.0.1:7001\n broker b tcp://127.0.0.1:7002\n \
                 boot a\n works";
    call(&mut host, start)?;
    for (from, uri) in [
        ("a", "unix:/run/b.door"),
        ("b", "local:"),
        ("b", "tcp://127.0.0.1:7001"),
        ("a", "local:"),
    ] {
        call(&mut host, &format!("move {from} {uri}\n works"))?;
    }
    noticed_nothing(&call(&mut host, "ends")?)?;
    call(&mut host, "disk")?;
    Ok(())
}

#[test]
fn a_linux_guest_moves_between_hosts_and_back() -> Result<()> {
    let Pair { a, b, .. } = &mut Pair::start()?;
    install(a)?;
    install(b)?;
    File::create(a.share().join(DISK))?;
    hard_link(a.share().join(DISK), b.share().join(DISK))?;
    call(b, "network 2 lan0\n broker b tcp://10.8.0.2:7000")?;
    call(
        a,
        "network 1 lan0\n peer\n broker a tcp://10.8.0.1:7000\n boot a\n works",
    )?;
    call(a, "move a tcp://10.8.0.2:7000\n works")?;
    call(b, "move b tcp://10.8.0.1:7000")?;
    call(a, "works")?;
    noticed_nothing(&call(a, "ends")?)?;
    call(b, "gone")?;
    call(a, "disk")?;
    Ok(())
}
