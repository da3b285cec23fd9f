//! `cargo xtask demo`: a machine whose devices are processes, which gives memory to the host and is
//! moved twice while it works.

use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;
use test_framework::console::Console;
use test_framework::machine::make_image;
use test_framework::{network, programs};
use test_guest::{BalloonMode, BlkMode, NetMode, Report, Workload, command};

use crate::cargo;

/// The machine's name.
const NAME: &str = "demo";
/// How long it is watched before and after each move.
const WORK: Duration = Duration::from_secs(3);
/// How long anything else may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// MiB that its guest has used and does not use any more, and MiB of them that it shall give.
const UNUSED: u32 = 128;
const GIVEN: u32 = 96;

/// Boots the bundled guest with a disk, a network device and a balloon, takes memory from it and
/// moves it to new processes while it works, twice, and shows that nothing was lost.
pub fn demo() -> Result<()> {
    let built = cargo::build(false)?;
    programs::use_folder(built.clone());
    put_guest(&built)?;
    network::enter()?;
    let (host, guest) = (Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2));
    // With several queues, so that the next process can have it open before the machine comes.
    network::add_tap("demo0", host, 4)?;
    network::echo(host, 7)?;
    let folder = TempDir::new()?;
    let image = folder.path().join("disk");
    make_image(&image, 64)?;
    let workload = Workload {
        heartbeat: 1000,
        blk: BlkMode::Loop,
        blk_mib: 16,
        net: NetMode::Loop,
        ip: test_guest::Ipv4(guest.octets()),
        peer: test_guest::Ipv4(host.octets()),
        balloon: BalloonMode::Follow,
        balloon_mib: UNUSED,
        dirty: 50,
        span: 16,
        poweroff: true,
        ..Workload::default()
    };
    let broker = Broker::start(&folder)?;
    broker.godwit(&[
        "run",
        "--detach",
        "--keep",
        "--name",
        NAME,
        "--kernel",
        &test_guest::program().display().to_string(),
        "--cmdline",
        &workload.to_string(),
        "--cpus",
        "2",
        "--memory",
        "256M",
        "--balloon",
        "--disk",
        &image.display().to_string(),
        "--net",
        "tap:demo0",
    ])?;
    let (mut console, _reader) = broker.console()?;
    println!("\nits guest writes to its disk, reads back and compares, sends packets to an echo");
    println!("service and compares, and dirties memory and compares, all at once:\n");
    broker.godwit(&["device", "list", NAME])?;
    watch(&mut console, WORK)?;
    give(&broker, GIVEN)?;
    for _ in 0..2 {
        println!("\ngodwit migrate {NAME} local:");
        broker.godwit(&["migrate", NAME, "local:"])?;
        broker.godwit(&["device", "list", NAME])?;
        watch(&mut console, WORK)?;
    }
    give(&broker, 0)?;
    console.send(command::STOP)?;
    finish(&mut console)?;
    println!("\nNext, a machine of your own, with the same guest:");
    println!("  export PATH={}:$PATH", built.display());
    println!("  godwit run --demo --name first");
    Ok(())
}

/// A broker of the demo's own.
struct Broker {
    process: Child,
    bus: PathBuf,
}

impl Broker {
    fn start(folder: &TempDir) -> Result<Self> {
        let run = folder.path().join("run");
        let bus = run.join("bus");
        let process = Command::new(programs::program("godwit-broker")?)
            .arg("--runtime-dir")
            .arg(&run)
            .env("GODWIT_LOG", "warn")
            .spawn()
            .context("the broker cannot be started")?;
        let broker = Self { process, bus };
        let end = Instant::now() + DEADLINE;
        while UnixStream::connect(&broker.bus).is_err() {
            ensure!(Instant::now() < end, "the broker does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(broker)
    }

    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(programs::program("godwit")?);
        command.arg("--bus").arg(&self.bus).args(arguments);
        Ok(command)
    }

    /// Runs a command, whose output is for the person who watches.
    fn godwit(&self, arguments: &[&str]) -> Result<()> {
        let status = self.command(arguments)?.status()?;
        ensure!(status.success(), "godwit {} failed: {status}", arguments[0]);
        Ok(())
    }

    /// Runs a command; what it prints as JSON.
    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.command(&["--json"])?.args(arguments).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "godwit {} failed: {said}",
            arguments[0]
        );
        serde_json::from_slice(&output.stdout).context("godwit printed no JSON")
    }

    /// Bytes of the host's memory that the machine's core has, the guest's included.
    fn resident(&self) -> Result<u64> {
        let rows = self.json(&["top"])?;
        let core = rows.as_array().into_iter().flatten();
        let mut core = core.filter(|row| row["machine"] == NAME && row["device"].is_null());
        let bytes = core.next().and_then(|row| row["resident_bytes"].as_u64());
        bytes.with_context(|| format!("no resident memory in {rows}"))
    }

    /// Attaches to the machine's console, from its first line on.
    fn console(&self) -> Result<(Console, Reader)> {
        let (ours, theirs) = UnixStream::pair()?;
        let (input, output) = (theirs.try_clone()?, theirs);
        let reader = self
            .command(&["console", NAME])?
            .stdin(Stdio::from(OwnedFd::from(input)))
            .stdout(Stdio::from(OwnedFd::from(output)))
            .stderr(Stdio::null())
            .spawn()?;
        Ok((Console::new(ours)?, Reader(reader)))
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // A machine that has ended cannot be ended.
        let quiet = self.command(&["stop", "--force", NAME]).map(|mut stop| {
            let stop = stop.stdout(Stdio::null()).stderr(Stdio::null());
            stop.status()
        });
        drop(quiet);
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The command that reads the console.
struct Reader(Child);

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Changes the balloon's target to `mib`, waits until the guest has followed, and shows what that
/// is in the host's accounting.
fn give(broker: &Broker, mib: u32) -> Result<()> {
    let before = broker.resident()?;
    println!("\ngodwit balloon {NAME} {mib}M:");
    broker.json(&["balloon", NAME, &format!("{mib}M")])?;
    let end = Instant::now() + DEADLINE;
    loop {
        let balloon = broker.json(&["balloon", NAME])?;
        if balloon["actual_bytes"].as_u64() == Some(u64::from(mib) << 20) {
            break;
        }
        ensure!(
            Instant::now() < end,
            "the guest does not follow its balloon's target: {balloon}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    broker.godwit(&["balloon", NAME])?;
    let after = broker.resident()?;
    println!(
        "  the host's accounting of the machine: {} MiB before, {} MiB now",
        before >> 20,
        after >> 20
    );
    ensure!(
        mib == 0 || after + (u64::from(mib) << 19) < before,
        "the memory did not return to the host"
    );
    Ok(())
}

/// Puts the bundled guest where `godwit` looks for it: beside the programs.
fn put_guest(programs: &Path) -> Result<()> {
    let place = programs.join(packaging::DEMO_GUEST);
    // A machine may run the one that is there.
    let new = place.with_extension("new");
    fs::copy(test_guest::program(), &new)
        .and_then(|_| fs::rename(&new, &place))
        .with_context(|| format!("the guest cannot be put at {}", place.display()))
}

/// Prints what the guest reports for a while.
fn watch(console: &mut Console, time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        let line = console.line(end + DEADLINE)?;
        println!("  {}", line.text);
        if let Ok(Some(Report::Fail { .. })) = Report::parse(&line.text) {
            bail!("the guest failed");
        }
    }
    Ok(())
}

/// Prints the guest's last reports, and what they prove.
fn finish(console: &mut Console) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    let (mut blocks, mut packets, mut pages) = ((0, 0), (0, 0), 0);
    loop {
        let line = console.line(end)?;
        println!("  {}", line.text);
        match Report::parse(&line.text)? {
            Some(Report::Blk {
                reads,
                writes,
                end: true,
                ..
            }) => blocks = (blocks.0 + reads, blocks.1 + writes),
            Some(Report::Net {
                sent,
                received,
                end: true,
                ..
            }) => packets = (packets.0 + sent, packets.1 + received),
            Some(Report::Verify { pages: checked, .. }) => pages += checked,
            Some(Report::Done { ok: true, .. }) => break,
            Some(Report::Done { ok: false, .. } | Report::Fail { .. }) => {
                bail!("the guest found differences");
            }
            _ => {}
        }
    }
    ensure!(
        blocks.0 > 0 && blocks.1 > 0 && packets.1 > 0 && pages > 0,
        "the guest did not work"
    );
    println!("\nmoved twice while it worked, and nothing that it had was lost:");
    println!(
        "  {} blocks read and compared, {} written: no request failed or stayed out",
        blocks.0, blocks.1
    );
    println!("  {pages} pages of memory compared at the end");
    println!(
        "  {} packets sent, {} answered and compared",
        packets.0, packets.1
    );
    Ok(())
}
