//! Machines that come and go leave nothing behind.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use api::machine::State;
use test_broker::*;
use test_guest::Workload;

/// How often, and in which cycle caches are warm; another number by this variable.
fn cycles() -> Result<(usize, usize)> {
    let cycles = match std::env::var("GODWIT_TEST_CYCLES") {
        Ok(number) => number.parse().context("GODWIT_TEST_CYCLES is no number")?,
        Err(_) => 200,
    };
    Ok((cycles, cycles / 10 + 2))
}

/// KiB that the broker may have grown by after the first cycles: each job is kept for five
/// minutes, a few KiB with its object on the bus.
const MAX_GROWTH: u64 = 8 << 10;

fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_that_come_and_go_leave_nothing_behind() -> Result<()> {
    let broker = Broker::start()?;
    let (cycles, warm) = cycles()?;
    let bus = broker.connect().await?;
    let images = [broker.image("a", 1)?];
    let jobs = |files: Vec<std::path::PathBuf>| -> Vec<_> {
        let kept = |path: &std::path::PathBuf| !path.to_string_lossy().contains("/jobs/");
        files.into_iter().filter(kept).collect()
    };
    let files = jobs(broker.files());
    let mut before = (0, 0);
    for cycle in 0..cycles {
        let definition = with_disks(definition(&Workload::default()), &images, 1);
        let vm = running(&bus, "vm", definition).await?;
        let job = vm.terminate(0).await?;
        done(&bus, job).await?;
        ensure!(
            vm.state().await? == State::Off,
            "cycle {cycle}: {}",
            vm.reason().await?
        );
        until("the end of the job", async || {
            Ok(vm.job().await?.as_str() == "/")
        })
        .await?;
        vm.remove(0).await?;
        if cycle == warm {
            before = (descriptors(broker.id())?, own_memory(broker.id())?);
        }
    }
    until("as few descriptors as before", async || {
        Ok(descriptors(broker.id())? <= before.0)
    })
    .await?;
    let grown = own_memory(broker.id())?.saturating_sub(before.1);
    assert!(grown < MAX_GROWTH, "the broker has grown by {grown} KiB");
    assert_eq!(jobs(broker.files()), files);
    let programs = broker.left()?;
    assert!(programs.is_empty(), "{programs:?} are left");
    Ok(())
}
