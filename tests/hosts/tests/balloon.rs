//! Stock Linux guests with a balloon, in one emulated host: what their driver gives, takes back, is
//! forced to take back, and names as free.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use test_hosts::{Assets, Host, HostOptions, strip};

const SCRIPT: &str = include_str!("balloon.sh");
const GUEST: &str = include_str!("balloon-guest.sh");
const PROGRAMS: [&str; 4] = ["godwit", "godwit-broker", "godwit-vmm", "godwit-balloon"];

/// Emulated hosts are slow, and slower on a busy machine.
const DEADLINE: Duration = Duration::from_secs(600);

/// Parts of it, each in a guest that the part before has left, or in one of its own.
type Part = (&'static str, fn(&mut Host) -> Result<()>);
const PARTS: [Part; 7] = [
    ("a guest boots", boots),
    ("it reports what is free", reports),
    ("it gives and takes", gives_and_takes),
    ("it is forced to take", is_forced_to_take),
    ("what it freed does not travel", moves),
    ("huge pages, and a page poison", huge_pages_and_poison),
    ("a guest of QEMU", of_qemu),
];

#[test]
fn linux_guests_give_memory_and_take_it_back() -> Result<()> {
    let mut host = Host::start(&HostOptions::named("balloon"))?;
    // The programs lie beside the folder of the tests' own.
    let test = std::env::current_exe()?;
    let built = test.ancestors().nth(2).context("the test has no folder")?;
    let stripped = tempfile::tempdir()?;
    for program in PROGRAMS {
        let to = stripped.path().join(program);
        strip(&built.join(program), &to)?;
        host.install(&[&to])?;
    }
    fs::write(host.share().join("balloon-guest.sh"), GUEST)?;
    let kernel = Assets::prepare()?.folder().join("vmlinux");
    fs::copy(kernel, host.share().join("vmlinux"))?;
    call(&mut host, "prepare")?;
    for (name, part) in PARTS {
        let begin = Instant::now();
        part(&mut host).with_context(|| name)?;
        eprintln!("{name}: {} s", begin.elapsed().as_secs());
    }
    Ok(())
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

fn boots(host: &mut Host) -> Result<()> {
    call(
        host,
        "broker a
         broker b
         boot a ''
         at a balloon guest --statistics-interval 1",
    )?;
    Ok(())
}

/// What is free for long is given back: the kernel reports what lies together, 2 MiB or more.
fn reports(host: &mut Host) -> Result<()> {
    call(
        host,
        "guest 'fill /run/x 64'
         used=$(spent)
         guest 'rm /run/x'
         within spent_below $((used - 32))
         expect 'pages are reported' [ $(counts a reported_pages) -gt 8192 ]
         within says a total_bytes",
    )?;
    Ok(())
}

fn gives_and_takes(host: &mut Host) -> Result<()> {
    call(
        host,
        "guest 'fill /run/x 64 && rm /run/x'
         before=$(free)
         returned=$(counts a returned_bytes)
         target a 64M
         within holds a 64
         expect 'the guest has less' [ $(free) -lt $((before - 40)) ]
         expect 'the host got it' [ $(counts a returned_bytes) -ge $((returned + (60 << 20))) ]
         expect 'the host has it' spent_below $((192 - 64))
         target a 0
         within holds a 0
         expect 'the guest has it again' [ $(free) -gt $((before - 20)) ]
         guest 'fill /run/x 64 && filled /run/x 64 && rm /run/x && calm'",
    )?;
    Ok(())
}

/// Out of memory the driver takes back what it has given, and no program is killed.
fn is_forced_to_take(host: &mut Host) -> Result<()> {
    call(
        host,
        "target a 80M
         within holds a 80
         deflated=$(counts a deflated_pages)
         guest 'fill /run/x 64 && filled /run/x 64 && calm'
         expect 'memory was taken back' [ $(counts a deflated_pages) -gt $((deflated + 4096)) ]
         guest 'rm /run/x'",
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
         move a b
         guest 'kept && calm'
         guest 'fill /run/x 64 && filled /run/x 64 && rm /run/x && kept && calm'
         target b 0
         within holds b 0
         guest 'fill /run/x 80 && filled /run/x 80 && kept && calm'
         ends b",
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
fn huge_pages_and_poison(host: &mut Host) -> Result<()> {
    let job = call(
        host,
        "huge_pages 216
         KERNEL=/share/vmlinux INITRD=/run/initrd.host boot a page_poison=1 --hugepages 2M
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
         guest 'rm /run/x'
         expect 'no free page is given back' [ $(counts a reported_pages) = 0 ]
         move a b
         guest 'fill /run/x 80 && filled /run/x 80 && kept && calm'
         ends b",
    )?;
    let left_out = left_out(&job)?;
    ensure!(left_out == 0, "{left_out} bytes were left out: {job}");
    Ok(())
}

/// QEMU has a balloon of its own, and none that is a vhost-user back-end; its generic vhost-user
/// device lends its guest any. The guest of this one takes free pages for zero (`init_on_free`).
fn of_qemu(host: &mut Host) -> Result<()> {
    call(
        host,
        "boot_qemu 48 init_on_free=1
         within measures_above inflated_pages $((48 * 256 - 1))
         within measures_above statistics_reports 2
         within spent_below $((192 - 48))
         within measures_above reported_pages 4096
         guest 'fill /run/x 80 && filled /run/x 80 && calm'
         expect 'memory was taken back' [ $(measures deflated_pages) -gt 1024 ]",
    )?;
    Ok(())
}

/// Bytes of memory that were not sent as nobody used them, of a job's JSON.
fn left_out(job: &str) -> Result<u64> {
    let start = job.find(['[', '{']).context("no JSON")?;
    let mut values = serde_json::Deserializer::from_str(&job[start..]).into_iter();
    let job: serde_json::Value = values.next().context("no JSON")??;
    let job = job.get(0).unwrap_or(&job);
    let spans = job["migration"]["report"]["source"]["spans"].as_array();
    let spans = spans.with_context(|| format!("no spans in {job:#}"))?;
    let left_out = spans
        .iter()
        .filter(|span| span["name"] == "left out")
        .filter_map(|span| span["bytes"].as_u64());
    Ok(left_out.max().unwrap_or_default())
}
