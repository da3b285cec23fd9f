//! `MaxDowntimeUSec` of a migration, written while it runs.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use api::job::State as JobState;
use api::job_migration::JobMigrationProxy;
use api::machine::State;
use api::{Dictionary, Error};
use test_broker::*;
use test_guest::{BlkMode, Workload};

const KEY: &str = "a secret of two brokers\n";

/// Writes its memory again and again, which is sent so slowly that it always has the time.
fn hurried() -> Workload {
    Workload {
        heartbeat: 20,
        blk: BlkMode::Off,
        span: 4,
        dirty: 0,
        poweroff: true,
        ..Workload::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_may_be_longer_ends_a_move_that_does_not_converge() -> Result<()> {
    let (a, b) = (Broker::start_with_doors(KEY)?, Broker::start_beside(KEY)?);
    let (bus, there) = (a.connect().await?, b.connect().await?);
    let vm = running(&bus, "vm", definition(&hurried())).await?;
    beats(&mut console(&vm).await?)?;
    let options = Dictionary::from([
        ("max-downtime-ms".to_owned(), value(1u64)),
        ("patience-s".to_owned(), value(600u64)),
        ("max-bandwidth".to_owned(), value(1u64 << 20)),
    ]);
    let at = vm.migrate(&b.unix(), options, 0).await?;
    let migration = JobMigrationProxy::new(&bus, at.clone()).await?;
    let mut told = migration.receive_max_downtime_usec_changed().await;
    until("a round that brings nothing", async || {
        let job = job(&bus, at.clone()).await?;
        let over = job.state().await? != JobState::Running;
        ensure!(!over, "it is over: {:?}", job.result().await?);
        Ok(migration.iteration().await? > 1)
    })
    .await?;
    let long = migration.set_max_downtime_usec(86_400_000_001).await;
    let long = long.map_err(Error::from);
    ensure!(
        matches!(&long, Err(Error::InvalidArgs(text)) if text.contains("more than a day")),
        "{long:?}"
    );

    migration.set_max_downtime_usec(60_000_000).await?;
    let (state, result) = ended(&bus, at.clone()).await?;
    assert_eq!(state, JobState::Done, "{result:?}");
    assert_eq!(text(&result, "Place"), "destination");
    let told = async {
        loop {
            let change = api::next(&mut told).await.context("no more changes")?;
            if change.get().await? == 60_000_000 {
                return anyhow::Ok(());
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), told).await??;

    // One that is over stays what it was.
    let over = migration.set_max_downtime_usec(1).await;
    let over = over.map_err(Error::from);
    ensure!(
        matches!(&over, Err(Error::InvalidState(text)) if text.contains("has ended")),
        "{over:?}"
    );
    let path = manager(&there).await?.get_machine("vm").await?;
    let vm = machine(&there, path).await?;
    finish(&mut console(&vm).await?)?;
    becomes(&vm, State::Off).await
}
