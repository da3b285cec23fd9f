//! Stock Linux guests with a balloon, in one emulated host: what their driver gives, takes back, is
//! forced to take back, and names as free.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use test_framework::programs::program;
use test_hosts::{Assets, Host, HostOptions};

const SCRIPT: &str = include_str!("balloon.sh");
const GUEST: &str = include_str!("balloon-guest.sh");
const PROGRAMS: [&str; 4] = ["godwit", "godwit-broker", "godwit-vmm", "godwit-balloon"];

/// Emulated hosts are slow, and slower on a busy machine.
const DEADLINE: Duration = Duration::from_secs(420);

/// A host with the programs.
fn host(name: &str) -> Result<Host> {
    let mut host = Host::start(&HostOptions::named(name))?;
    for name in PROGRAMS {
        host.install(&[&program(name)?])?;
    }
    fs::write(host.share().join("balloon-guest.sh"), GUEST)?;
    call(&mut host, "prepare")?;
    Ok(host)
}

/// Runs lines of shell with the script's functions.
fn call(host: &mut Host, lines: &str) -> Result<String> {
    Ok(host.call(SCRIPT, lines, DEADLINE)?)
}

#[test]
fn a_linux_guest_gives_memory_and_takes_it_back() -> Result<()> {
    let mut host = host("gives")?;
    call(&mut host, "broker a\n broker b\n boot a '' --balloon")?;
    reports(&mut host).context("it reports what is free")?;
    gives_and_takes(&mut host).context("it gives, takes, and is forced to take")?;
    moves(&mut host).context("what it has freed does not travel")
}

/// What is free for long is given back: the kernel reports what lies together, 2 MiB or more.
fn reports(host: &mut Host) -> Result<()> {
    call(
        host,
        "at a balloon guest --statistics-interval 1
         guest 'fill /run/x 64'
         used=$(spent)
         guest 'rm /run/x'
         within spent_below $((used - 32))
         expect 'pages are reported' counts_above a reported_pages 8192
         within says a total_bytes",
    )?;
    Ok(())
}

/// Out of memory the driver takes back what it has given, and no program is killed.
fn gives_and_takes(host: &mut Host) -> Result<()> {
    call(
        host,
        "before=$(free)
         target a 80M
         within holds a 80
         expect 'the guest has less' [ $(free) -lt $((before - 60)) ]
         expect 'the host has it' spent_below $((192 - 80))
         guest 'fill /run/x 48 && filled /run/x 48 && calm'
         expect 'memory was taken back' counts_above a deflated_pages 2048
         guest 'rm /run/x'
         target a 0
         within holds a 0
         expect 'the guest has it again' [ $(free) -gt $((before - 20)) ]",
    )?;
    Ok(())
}

/// A balloon, a file that is kept, and most of the memory used and freed just before the move.
fn moves(host: &mut Host) -> Result<()> {
    let job = call(
        host,
        "target a 16M
         within holds a 16
         guest 'random /run/kept 8'
         guest 'fill /run/x 64 && rm /run/x'
         move a b 16M
         guest 'kept && calm'
         target b 0
         within holds b 0
         guest 'fill /run/x 64 && filled /run/x 64 && kept && calm'",
    )?;
    // Beside the balloon, at least one of the 4 MiB that its driver names at once. How many it names
    // before they are sent goes by the processors that it has here.
    let left_out = left_out(&job)?;
    ensure!(
        left_out >= 20 << 20,
        "{left_out} bytes were left out: {job}"
    );
    Ok(())
}

/// A huge page returns when all of it is given. A guest that fills what is free with a poison keeps
/// its free pages as they are: they are neither given back by reports nor left out of a move, and
/// its kernel, which looks at the poison of each page that it takes, finds none spoilt.
#[test]
fn a_linux_guest_has_huge_pages_and_a_page_poison() -> Result<()> {
    let mut host = host("poison")?;
    let kernel = Assets::prepare()?.folder().join("vmlinux");
    fs::copy(kernel, host.share().join("vmlinux"))?;
    let job = call(
        &mut host,
        "broker a
         broker b
         huge_pages 216
         KERNEL=/share/vmlinux INITRD=/run/initrd.host boot a page_poison=1 --hugepages 2M --balloon
         guest 'poisons && random /run/kept 8 && fill /run/x 64'
         used=$(huge)
         guest 'rm /run/x'
         target a 64M
         within holds a 64
         within huge_above $((used + 8))
         target a 0
         within holds a 0
         guest 'fill /run/x 64 && filled /run/x 64 && kept && calm'
         expect 'the guest has them again' huge_below $((used + 8))
         at a balloon guest --statistics-interval 0
         requests=$(counts a requests)
         guest 'rm /run/x'
         within counts_above a requests $requests
         expect 'no free page is given back' [ $(counts a reported_pages) = 0 ]
         move a b 32M
         guest 'fill /run/x 64 && filled /run/x 64 && kept && calm'",
    )?;
    let left_out = left_out(&job)?;
    ensure!(left_out == 0, "{left_out} bytes were left out: {job}");
    Ok(())
}

/// QEMU has a balloon of its own, and none that is a vhost-user back-end; its generic vhost-user
/// device lends its guest any. The guest of this one takes free pages for zero (`init_on_free`).
#[test]
fn qemu_gives_its_linux_guest_the_balloon() -> Result<()> {
    let mut host = host("qemu")?;
    call(
        &mut host,
        "boot_qemu 24 init_on_free=1
         within measures_above inflated_pages $((24 * 256 - 1))
         within measures_above statistics_reports 2
         within measures_above reported_pages 8192
         expect 'the host has them' spent_below $((192 - 24 - 24))
         guest 'fill /run/x 96 && filled /run/x 96 && calm'
         expect 'memory was taken back' measures_above deflated_pages 1024",
    )?;
    Ok(())
}

/// Bytes of memory that were not sent as nobody used them, of the job that was printed among others.
fn left_out(printed: &str) -> Result<u64> {
    let start = printed.find('{').context("no JSON")?;
    let mut values = serde_json::Deserializer::from_str(&printed[start..]).into_iter();
    let job: Value = values.next().context("no JSON")??;
    let spans = job["migration"]["report"]["source"]["spans"].as_array();
    let spans = spans.with_context(|| format!("no spans in {job:#}"))?;
    let left_out = spans
        .iter()
        .filter(|span| span["name"] == "left out")
        .filter_map(|span| span["bytes"].as_u64());
    Ok(left_out.max().unwrap_or_default())
}
