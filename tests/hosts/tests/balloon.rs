//! A stock Linux guest with a balloon, in an emulated host: what its driver gives, takes back, is
//! forced to take back, and names as free.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use test_hosts::{Host, HostOptions, strip};

const SCRIPT: &str = include_str!("balloon.sh");
const GUEST: &str = include_str!("balloon-guest.sh");
const PROGRAMS: [&str; 4] = ["godwit", "godwit-broker", "godwit-vmm", "godwit-balloon"];

/// Emulated hosts are slow, and slower on a busy machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// A host with the programs, which lie beside the folder of the tests' own, and a guest in it.
fn booted(name: &str, start: &str) -> Result<Host> {
    let mut host = Host::start(&HostOptions::named(name))?;
    let test = std::env::current_exe()?;
    let built = test.ancestors().nth(2).context("the test has no folder")?;
    let stripped = tempfile::tempdir()?;
    for program in PROGRAMS {
        let to = stripped.path().join(program);
        strip(&built.join(program), &to)?;
        host.install(&[&to])?;
    }
    fs::write(host.share().join("balloon-guest.sh"), GUEST)?;
    call(&mut host, start)?;
    Ok(host)
}

/// Runs lines of shell with the script's functions.
fn call(host: &mut Host, lines: &str) -> Result<String> {
    let output = host.run_for(&format!("{SCRIPT}\n{lines}"), DEADLINE)?;
    ensure!(
        output.status == 0,
        "{lines}: status {}\n{}{}",
        output.status,
        output.stdout,
        output.stderr
    );
    Ok(output.stdout)
}

#[test]
fn a_linux_guest_gives_and_takes_memory() -> Result<()> {
    let mut host = booted("balloon", "broker a\n boot a")?;
    // Statistics are asked for every five seconds.
    call(&mut host, "within 60 says a total_bytes")?;
    // What is free for long is given back: the kernel reports it.
    call(
        &mut host,
        "guest 'fill /run/x 256'
         expect 'the file is in memory' spent_above 256
         guest 'rm /run/x'
         within 120 spent_below 200
         expect 'pages are reported' [ $(counts a reported_pages) -gt 20000 ]",
    )?;
    call(
        &mut host,
        "before=$(free)
         at a balloon guest 256M
         within 120 holds a $((256 << 20))
         expect 'the guest has less' [ $(free) -lt $((before - 200)) ]
         expect 'the host has it' [ $(counts a returned_bytes) -gt $((400 << 20)) ]
         expect 'the host has it' spent_below 200
         at a balloon guest 0
         within 120 holds a 0
         expect 'the guest has it again' [ $(free) -gt $((before - 50)) ]
         guest 'fill /run/x 256 && filled /run/x 256 && rm /run/x'",
    )?;
    // Out of memory the driver takes back what it has given, and no program is killed.
    call(
        &mut host,
        "at a balloon guest 384M
         within 120 holds a $((384 << 20))
         guest 'fill /run/x 96 && filled /run/x 96'
         expect 'memory was taken back' [ $(counts a deflated_pages) -gt $((65536 + 4096)) ]
         guest calm",
    )?;
    Ok(())
}

#[test]
fn huge_pages_return_when_all_of_each_is_given() -> Result<()> {
    let mut host = booted(
        "huge",
        "echo 300 >/proc/sys/vm/nr_hugepages
         [ $(huge) = 300 ] || exit 1
         broker a
         boot a --hugepages 2M",
    )?;
    // 256 of them are the guest's, and most of these used once.
    call(
        &mut host,
        "guest 'random /run/kept 16 && fill /run/x 320'
         expect 'they are used' huge_below 130
         guest 'rm /run/x'
         at a balloon guest 256M
         within 120 holds a $((256 << 20))
         within 120 huge_above 160
         at a balloon guest 0
         within 120 holds a 0
         guest 'fill /run/x 320 && filled /run/x 320 && kept && calm'",
    )?;
    Ok(())
}

#[test]
fn what_a_linux_guest_used_and_freed_does_not_travel() -> Result<()> {
    let mut host = booted("free-pages", "broker a\n broker b\n boot a")?;
    // A balloon, a file that is kept, and most of the memory used and freed just before.
    let outcome = call(
        &mut host,
        "at a balloon guest 64M
         within 120 holds a $((64 << 20))
         guest 'random /run/kept 32'
         guest 'fill /run/x 288 && rm /run/x'
         at a migrate guest unix:/run/b.door --max-downtime 2s >&2
         at a --json job show 2
         within 60 runs_at b
         listen b
         guest 'kept && calm'
         guest 'fill /run/x 288 && filled /run/x 288 && rm /run/x && kept && calm'
         at b balloon guest 0
         within 120 holds b 0
         guest 'fill /run/x 320 && filled /run/x 320 && kept && calm'",
    )?;
    let (sent, left_out) = sizes(&outcome)?;
    ensure!(
        sent < 192 << 20 && left_out > 200 << 20,
        "{sent} bytes were sent and {left_out} left out: {outcome}"
    );
    Ok(())
}

/// Bytes of memory that were sent, and that were left out, of a job's JSON.
fn sizes(job: &str) -> Result<(u64, u64)> {
    let start = job.find(['[', '{']).context("no JSON")?;
    let mut values = serde_json::Deserializer::from_str(&job[start..]).into_iter();
    let job: serde_json::Value = values.next().context("no JSON")??;
    let job = job.get(0).unwrap_or(&job);
    let report = &job["migration"]["report"];
    let spans = report["source"]["spans"].as_array().into_iter().flatten();
    let left_out = spans
        .filter(|span| span["name"] == "left out")
        .filter_map(|span| span["bytes"].as_u64())
        .max();
    let sent = report["memory_bytes"].as_u64();
    Ok((
        sent.with_context(|| format!("no bytes in {job:#}"))?,
        left_out.unwrap_or_default(),
    ))
}
