//! `bench lifecycle`: under one broker, how long machines take from their creation until they
//! run, and from the word to end them until nothing of them is left, one and twenty at once; and
//! the memory of each process meanwhile.
//!
//! A machine has a disk, a network device and a balloon. It runs when its start's job is done, which is when
//! its core lets the guest run; it has ended when the job to terminate it is done, which is when no
//! process of it is left. The jobs' signals are the moments taken.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use api::manager::{JobRemovedStream, ManagerProxy};
use clap::ValueEnum;
use serde_json::json;
use test_broker::{Broker, definition, device, machine, manager, value, with_disks};
use test_framework::machine::DEADLINE;
use test_framework::network;
use test_guest::Workload;
use zbus::{Connection, Variant};

use crate::report::{Goal, Report};

/// Memory that a device process may have of its own.
const GOAL_MIB: f64 = 8.0;
/// How long machines run before their memory is looked at.
const SETTLE: Duration = Duration::from_secs(1);
const MIB: f64 = (1 << 20) as f64;

/// How many machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LifecyclePreset {
    /// One, and twenty at once.
    All,
    /// One.
    One,
}

/// The benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Lifecycle {
    /// How many machines.
    pub preset: LifecyclePreset,
    /// Runs of each.
    pub runs: usize,
}

/// What one run measured.
struct Run {
    create_ms: f64,
    destroy_ms: f64,
    /// MiB of the processes of each kind.
    own: BTreeMap<String, Vec<f64>>,
}

impl Lifecycle {
    /// Runs it. The calling thread must be in a network of its own.
    pub fn run(self) -> Result<Report> {
        let counts: &[usize] = match self.preset {
            LifecyclePreset::All => &[1, 20],
            LifecyclePreset::One => &[1],
        };
        for number in 0..counts.iter().max().copied().unwrap_or(0) {
            let subnet = u8::try_from(number).context("too many machines")?;
            network::add_tap(&tap(number), Ipv4Addr::new(10, 79, subnet, 1), 1)?;
        }
        let mut report = Report::new("lifecycle", format!("{:?}", self.preset).to_lowercase());
        report.notes.push(
            "memory: pages of private mappings that no other process maps; no guest memory, no \
             page tables"
                .into(),
        );
        // Its threads inherit the network.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        for &count in counts {
            let mut all = Vec::new();
            // The first run warms up the page cache and is not counted.
            for number in 0..=self.runs {
                let run = runtime.block_on(once(count))?;
                if number == 0 {
                    continue;
                }
                report.runs.push(json!({
                    "machines": count, "create_ms": run.create_ms, "destroy_ms": run.destroy_ms,
                    "own_mib": run.own,
                }));
                all.push(run);
            }
            summarise(&mut report, count, &all);
        }
        compare(&mut report);
        Ok(report)
    }
}

fn tap(number: usize) -> String {
    format!("life{number}")
}

async fn once(count: usize) -> Result<Run> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let manager = manager(&bus).await?;
    let mut ends = manager.receive_job_removed().await?;
    let mut definitions = Vec::new();
    for number in 0..count {
        let image = broker.image(&format!("disk{number}"), 16)?;
        let mut definition = with_disks(definition(&Workload::default()), &[image], 1);
        let net = HashMap::from([("tap", Variant::from(tap(number)))]);
        definition.insert("net".into(), value(vec![net]));
        let balloon = HashMap::<&str, Variant<'_>>::new();
        definition.insert("balloon".into(), value(vec![balloon]));
        definitions.push((format!("vm{number}"), definition));
    }
    let names: Vec<_> = definitions.iter().map(|(name, _)| name.clone()).collect();

    let began = Instant::now();
    for (name, definition) in definitions {
        let start = api::manager::START;
        manager.create_machine(&name, definition, start).await?;
    }
    let create_ms = all_done(&mut ends, count, began).await?;

    tokio::time::sleep(SETTLE).await;
    let mut own = BTreeMap::from([("godwit-broker".to_owned(), vec![own_mib(broker.id())?])]);
    for name in &names {
        for process in processes(&bus, &manager, name).await? {
            let program = fs::read_to_string(format!("/proc/{process}/comm"))?;
            let of_kind = own.entry(program.trim().to_owned()).or_default();
            of_kind.push(own_mib(process)?);
        }
    }

    let began = Instant::now();
    for name in &names {
        let path = manager.get_machine(name).await?;
        machine(&bus, path).await?.terminate(0).await?;
    }
    let destroy_ms = all_done(&mut ends, count, began).await?;
    Ok(Run {
        create_ms,
        destroy_ms,
        own,
    })
}

/// Waits until so many jobs are done; how long that took since `began`.
async fn all_done(ends: &mut JobRemovedStream, count: usize, began: Instant) -> Result<f64> {
    for _ in 0..count {
        let end = tokio::time::timeout(DEADLINE, api::next(ends)).await?;
        let end = end.context("the broker is gone")?;
        let end = end.args()?;
        ensure!(
            end.result == "done",
            "{}: the job is {}",
            end.machine,
            end.result
        );
    }
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// The core's process and those of the devices.
async fn processes(bus: &Connection, manager: &ManagerProxy<'_>, name: &str) -> Result<Vec<u32>> {
    let vm = machine(bus, manager.get_machine(name).await?).await?;
    let mut all = vec![vm.process().await?];
    for id in ["disk0", "net0", "balloon0"] {
        all.push(device(bus, name, id).await?.process().await?);
    }
    Ok(all)
}

/// MiB of pages in private mappings that no other process maps (proc_pid_smaps(5)): anonymous
/// memory, and what of programs and libraries is this process's alone.
fn own_mib(process: u32) -> Result<f64> {
    let smaps = fs::read_to_string(format!("/proc/{process}/smaps"))?;
    let mut kib = 0.0;
    let mut is_private = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), Some(second)) = (words.next(), words.next()) else {
            continue;
        };
        match first {
            "Private_Clean:" | "Private_Dirty:" if is_private => kib += second.parse::<f64>()?,
            // The head of a mapping: a range, and its permissions.
            range if range.contains('-') && !range.ends_with(':') => {
                is_private = second.ends_with('p');
            }
            _ => {}
        }
    }
    Ok(kib * 1024.0 / MIB)
}

fn metric(count: usize, what: &str) -> String {
    let machines = if count == 1 { "machine" } else { "machines" };
    format!("{count:>2} {machines}, {what}")
}

fn summarise(report: &mut Report, count: usize, runs: &[Run]) {
    let create: Vec<_> = runs.iter().map(|run| run.create_ms).collect();
    let destroy: Vec<_> = runs.iter().map(|run| run.destroy_ms).collect();
    report.summarise(metric(count, "create to running"), &create, "ms");
    report.summarise(metric(count, "destroy"), &destroy, "ms");
    let programs: Vec<_> = runs.iter().flat_map(|run| run.own.keys()).collect();
    for program in programs {
        let own: Vec<_> = runs
            .iter()
            .filter_map(|run| run.own.get(program))
            .flatten()
            .copied()
            .collect();
        let name = metric(count, &format!("memory of {program}"));
        report.summarise(name, &own, "MiB");
    }
    for program in ["godwit-balloon", "godwit-blk", "godwit-net"] {
        let name = metric(count, &format!("memory of {program}"));
        if let Some(summary) = report.summary.get(&name) {
            report
                .goals
                .push(Goal::at_most(name, summary.max, GOAL_MIB, "MiB"));
        }
    }
}

/// What a machine among twenty costs, to what one alone does.
fn compare(report: &mut Report) {
    for what in ["create to running", "destroy"] {
        let median = |count| report.summary.get(&metric(count, what)).map(|s| s.median);
        if let (Some(one), Some(twenty)) = (median(1), median(20)) {
            let name = format!("each of 20 machines to 1, {what}");
            report.ratios.insert(name, twenty / 20.0 / one);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_ones_own_is_not_what_is_shared() {
        let before = own_mib(std::process::id()).unwrap();
        let own = vec![1u8; 256 << 20];
        let grown = own_mib(std::process::id()).unwrap() - before;
        // What this program shares with others that start and end varies by a few MiB.
        assert!((248.0..288.0).contains(&grown), "{grown} MiB");
        drop(own);
    }
}
