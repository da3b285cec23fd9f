//! `bench boot`: from the start of a machine's processes to the guest's first
//! instruction, and to the end of its first disk read, beside QEMU's microvm with the
//! same guest and as many devices, in turn.
//!
//! The guest's first instructions print a line; its arrival here is the moment taken.
//! Every device is set up by the guest before it reads; half of them (but the only one)
//! are network devices.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde_json::json;
use tempfile::TempDir;
use test_framework::console::Console;
use test_framework::machine::{DEADLINE, Definition, Device, Machine, make_image};
use test_framework::network;
use test_guest::{Activate, BlkMode, Report as GuestReport, Workload};

use crate::peer::qemu;
use crate::report::{Goal, Report};

/// How long four devices may take to the first instruction.
const GOAL_MS: f64 = 50.0;

/// Which machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BootPreset {
    /// 1, 4 and 24 devices.
    All,
    /// 4 devices.
    Four,
}

/// The benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// Which machines.
    pub preset: BootPreset,
    /// Runs of each.
    pub runs: usize,
}

#[derive(Clone, Copy)]
struct Times {
    first_ms: f64,
    read_ms: f64,
}

impl Boot {
    /// Runs it. The calling thread must be in a network of its own.
    pub fn run(self) -> Result<Report> {
        let counts: &[usize] = match self.preset {
            BootPreset::All => &[1, 4, 24],
            BootPreset::Four => &[4],
        };
        let folder = TempDir::new()?;
        let most = counts.iter().max().copied().unwrap_or(0);
        let devices = devices(folder.path(), most)?;
        let mut report = Report::new("boot", format!("{:?}", self.preset).to_lowercase());
        let has_qemu = qemu::is_installed();
        if !has_qemu {
            report
                .notes
                .push("qemu-system-x86_64 is absent: nothing to compare with".into());
        }
        for &count in counts {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            let devices = choose(&devices, count);
            // The first run warms up the page cache and is not counted.
            for run in 0..=self.runs {
                let godwit = boot_godwit(&devices)?;
                let qemu = has_qemu.then(|| boot_qemu(&devices)).transpose()?;
                if run == 0 {
                    continue;
                }
                report.runs.push(json!({
                    "devices": count,
                    "godwit": { "first_ms": godwit.first_ms, "read_ms": godwit.read_ms },
                    "qemu": qemu.map(|q| json!({ "first_ms": q.first_ms, "read_ms": q.read_ms })),
                }));
                ours.push(godwit);
                theirs.extend(qemu);
            }
            summarise(&mut report, count, &ours, &theirs);
        }
        Ok(report)
    }
}

fn summarise(report: &mut Report, count: usize, ours: &[Times], theirs: &[Times]) {
    for (who, times) in [("godwit", ours), ("qemu", theirs)] {
        let first: Vec<_> = times.iter().map(|t| t.first_ms).collect();
        let read: Vec<_> = times.iter().map(|t| t.read_ms).collect();
        report.summarise(
            format!("{count:>2} devices, {who}, first instruction"),
            &first,
            "ms",
        );
        report.summarise(
            format!("{count:>2} devices, {who}, first disk read"),
            &read,
            "ms",
        );
    }
    for what in ["first instruction", "first disk read"] {
        let (godwit, qemu) = (
            format!("{count:>2} devices, godwit, {what}"),
            format!("{count:>2} devices, qemu, {what}"),
        );
        let name = format!("{count:>2} devices, godwit to qemu, {what}");
        report.compare(name.clone(), &godwit, &qemu);
        if let Some(&ratio) = report.ratios.get(&name) {
            report.goals.push(Goal::at_most(name, ratio, 1.0, "×"));
        }
        if let Some(summary) = report.summary.get(&godwit)
            && count == 4
        {
            report
                .goals
                .push(Goal::at_most(godwit, summary.median, GOAL_MS, "ms"));
        }
    }
}

/// Enough disks and taps for any mix of `most` devices.
fn devices(folder: &Path, most: usize) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for number in 0..most.div_ceil(2).max(1) {
        let image = folder.join(format!("disk{number}"));
        make_image(&image, 16)?;
        devices.push(Device::Blk { image, queues: 1 });
        let tap = format!("bench{number}");
        let subnet = u8::try_from(number).context("too many devices")?;
        network::add_tap(&tap, Ipv4Addr::new(10, 78, subnet, 1), 1)?;
        devices.push(Device::Net { tap, pairs: 1 });
    }
    Ok(devices)
}

/// Disks and network devices in turn.
fn choose(devices: &[Device], count: usize) -> Vec<Device> {
    devices[..count].to_vec()
}

fn workload() -> Workload {
    Workload {
        activate: Activate::All,
        blk: BlkMode::Read,
        blk_mib: 1,
        poweroff: true,
        ..Workload::default()
    }
}

fn boot_godwit(devices: &[Device]) -> Result<Times> {
    let mut definition = Definition::of(&workload());
    definition.devices = devices.to_vec();
    let mut machine = Machine::start(&definition)?;
    let started = machine.started;
    let times = times(&mut machine.console, started).context("godwit")?;
    machine.wait_for_power_off()?;
    Ok(times)
}

fn boot_qemu(devices: &[Device]) -> Result<Times> {
    let mut qemu = qemu::Machine {
        workload: workload(),
        cpus: 1,
        memory_mib: 64,
        devices: devices.to_vec(),
        disks: qemu::Disks::Own,
    }
    .start()?;
    let started = qemu.started;
    let times = times(&mut qemu.console, started)
        .with_context(|| format!("qemu said: {}", qemu.process.stderr()))?;
    // The guest asks for power off in our machine's way; QEMU is just ended.
    qemu.process.signal(nix::sys::signal::Signal::SIGKILL)?;
    qemu.process.wait(DEADLINE)?;
    Ok(times)
}

fn times(console: &mut Console, started: Instant) -> Result<Times> {
    let since = |at: Instant| at.duration_since(started).as_secs_f64() * 1e3;
    let wait = Duration::from_secs(60);
    let (first, ()) = console.report("the first instruction", wait, |report| {
        matches!(report, GuestReport::First {}).then_some(())
    })?;
    let (read, ()) = console.report("the first disk read", wait, |report| {
        matches!(report, GuestReport::FirstRead { .. }).then_some(())
    })?;
    Ok(Times {
        first_ms: since(first),
        read_ms: since(read),
    })
}
