//! `godwit demo`: a machine that goes on while its disk process is killed.
//!
//! ```text
//! scratch disk ─► machine runs ─► kill -9 its disk process ─► a new one took over ─► pause,
//! resume ─► off, and nothing is left
//! ```
//! It is a client like any other: all that it shows can be done with the other verbs.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use api::machine::REPLAY;
use api::manager::TRANSIENT;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::bundled::{self, DISK};
use super::start::start_one;
use crate::connection::{Broker, Machine, Purpose};
use crate::definition;
use crate::error::{Failure, Result, What as _, is_gone};
use crate::job::{Interrupts, Job};
use crate::options::{Define, Demo, Wait};
use crate::render::{self, say};
use crate::view;

/// How long each state is shown.
const SHOWN: Duration = Duration::from_secs(3);
/// Before the disk is looked at again.
const PAUSE: Duration = Duration::from_millis(50);
/// Most bytes of the guest that are printed.
const MAX_PRINTED: u64 = 64 << 20;
/// How long a guest may take to use its disk, and a new process to serve it.
const DEADLINE: Duration = Duration::from_secs(30);

pub async fn run(bus: Option<&str>, demo: Demo) -> Result<()> {
    let mut define = Define {
        kernel: demo.kernel,
        initrd: demo.initrd,
        cmdline: demo.cmdline,
        cpus: Some(2),
        net: demo.net,
        ..Define::default()
    };
    let _scratch = bundled::complete(&mut define)?;
    let broker = Broker::find(bus, Purpose::Make).await?;
    let (machine, console) = create(&broker, &define).await?;
    let printer = std::thread::spawn(move || print(console));
    let mut interrupts = Interrupts::new()?;
    let shown = tokio::select! {
        shown = show(&broker, &machine) => shown,
        _ = interrupts.next() => Err(Failure::Interrupted),
    };
    let ended = end(&broker, &machine).await;
    let _ = printer.join();
    shown.and(ended)?;
    say("\nthe machine is off; nothing of it is left.");
    Ok(())
}

/// Makes the machine, and starts it.
async fn create(broker: &Broker, define: &Define) -> Result<(Machine, UnixStream)> {
    let name = format!("demo-{}", std::process::id());
    let manager = broker.manager().await?;
    let path = manager
        .create_machine(&name, definition::of_options(define)?, TRANSIENT)
        .await
        .what(&name)?;
    let machine = Machine::at(broker, &name, path).await?;
    start_one(broker, &machine, 0, Wait::default()).await?;
    let console = machine.proxy.open_console("", REPLAY).await.what(&name)?;
    Ok((
        machine,
        UnixStream::from(std::os::fd::OwnedFd::from(console)),
    ))
}

/// Prints what the guest prints, until its console is closed.
fn print(console: UnixStream) {
    let mut console = BufReader::new(console).take(MAX_PRINTED);
    let mut line = Vec::new();
    while let Ok(1..) = console.read_until(b'\n', &mut line) {
        let text = String::from_utf8_lossy(&line);
        if render::write(format!("  guest: {}\n", text.trim_end()).as_bytes()).is_err() {
            return;
        }
        line.clear();
    }
}

/// What there is to see.
async fn show(broker: &Broker, machine: &Machine) -> Result<()> {
    let (view, _) = machine.look().await?;
    say(&format!(
        "\n{} is a machine of {} processes:",
        view.name,
        1 + view.devices.len()
    ));
    if let Some(process) = view.process {
        say(&format!("  {process:>8}  core, {} vCPUs", view.vcpus));
    }
    for device in &view.devices {
        let process = device
            .process
            .map_or_else(String::new, |process| process.to_string());
        let on = match device.source.is_empty() {
            true => String::new(),
            false => format!(" on {}", device.source),
        };
        say(&format!(
            "  {process:>8}  {} {}{on}",
            device.kind, device.id
        ));
    }
    say("");
    tokio::time::sleep(SHOWN).await;

    let before = served(broker, machine, 0).await?;
    let process = before
        .process
        .ok_or_else(|| wrong("the disk has no process"))?;
    say(&format!(
        "\nkill -9 {process}: the guest's disk loses its process while it is used"
    ));
    let process = i32::try_from(process).map_err(|_| wrong("a process id is too large"))?;
    kill(Pid::from_raw(process), Signal::SIGKILL).map_err(|errno| {
        Failure::io(format!("process {process} cannot be killed"))(errno.into())
    })?;
    let after = served(broker, machine, before.reconnects + 1).await?;
    let process = after
        .process
        .map_or_else(String::new, |process| process.to_string());
    say(&format!(
        "process {process} took over with all requests in flight; the guest goes on\n"
    ));
    tokio::time::sleep(SHOWN).await;

    say("\npaused for a second: vCPUs and devices stand still");
    machine.proxy.pause(0).await.what(&machine.name)?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    machine.proxy.resume(0).await.what(&machine.name)?;
    say("resumed\n");
    tokio::time::sleep(SHOWN).await;
    // Whatever happened, it was not the end.
    match machine.state().await?.as_str() {
        "running" => Ok(()),
        state => Err(wrong(&format!("the machine is {state}"))),
    }
}

async fn disk(machine: &Machine) -> Result<view::Device> {
    let (view, _) = machine.look().await?;
    let disk = view.devices.into_iter().find(|device| device.id == DISK);
    disk.ok_or_else(|| wrong("the machine has lost its disk"))
}

/// Waits until the guest uses its disk, which so many new processes have taken over.
async fn served(broker: &Broker, machine: &Machine, reconnects: u32) -> Result<view::Device> {
    let end = Instant::now() + DEADLINE;
    loop {
        let disk = disk(machine).await?;
        if disk.reconnects >= reconnects && disk.state == "running" {
            let counters = broker.device_statistics(&machine.name, DISK).await?;
            if counters.get("requests").is_some_and(|&count| count > 0) {
                return Ok(disk);
            }
        }
        if Instant::now() > end {
            return Err(wrong(&format!(
                "the disk is {}: {}",
                disk.state, disk.reason
            )));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn wrong(what: &str) -> Failure {
    Failure::Demo(what.into())
}

/// Ends the machine, which the broker then forgets.
async fn end(broker: &Broker, machine: &Machine) -> Result<()> {
    let what = format!("end of {}", machine.name);
    match machine.proxy.terminate(0).await {
        Ok(path) => match Job::at(broker, &what, path)
            .await?
            .wait(Wait::default())
            .await
        {
            // It was forgotten with its machine.
            Err(Failure::Refused { error, .. }) if is_gone(&error) => Ok(()),
            ended => ended.map(|_| ()),
        },
        Err(error) if is_gone(&error) => Ok(()),
        Err(error) => Err(error).what(what),
    }
}
