//! A balloon whose target changes while its machine runs.

use std::collections::HashMap;

use anyhow::Result;
use api::Dictionary;
use api::balloon::BalloonProxy;
use api::machine::State;
use test_broker::*;
use test_guest::{BalloonMode, Workload};
use zbus::Variant;
use zbus::proxy::CacheProperties;

const MIB: u64 = 1 << 20;

/// Of a machine whose guest follows its balloon's target, 4 MiB, with these keys of the balloon besides.
fn following<const N: usize>(more: [(&'static str, Variant<'static>); N]) -> Dictionary {
    let mut definition = definition(&Workload {
        balloon: BalloonMode::Follow,
        balloon_mib: 16,
        ..Workload::default()
    });
    let target = ("target", Variant::from("4M"));
    let keys = [target].into_iter().chain(more);
    let balloon: HashMap<_, _> = keys.map(|(key, value)| (key.to_owned(), value)).collect();
    definition.insert("balloon".into(), value(vec![balloon]));
    definition
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_is_followed_and_a_size_that_is_none_is_refused() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    running(&bus, "vm", following([])).await?;
    let balloon = BalloonProxy::builder(&bus)
        .path(api::path::device("vm", "balloon0"))
        .cache_properties(CacheProperties::No)
        .build()
        .await?;
    until("the size of the definition", async || {
        Ok(balloon.actual().await? == 4 * MIB)
    })
    .await?;
    // Another client hears of it, and asks nothing.
    let seen = BalloonProxy::builder(&bus)
        .path(api::path::device("vm", "balloon0"))
        .cache_properties(CacheProperties::Yes)
        .build()
        .await?;
    assert_eq!(seen.actual().await?, 4 * MIB);
    balloon.set_target(8 * MIB).await?;
    until("a larger balloon is told of", async || {
        let (target, actual) = (seen.cached_target()?, seen.cached_actual()?);
        Ok((target, actual) == (Some(8 * MIB), Some(8 * MIB)))
    })
    .await?;
    assert_eq!(balloon.actual().await?, 8 * MIB);
    balloon.set_target(0).await?;
    until(
        "an empty balloon",
        async || Ok(balloon.actual().await? == 0),
    )
    .await?;
    let refused = balloon.set_target(100).await.unwrap_err().to_string();
    assert!(refused.contains("multiple of 4096"), "{refused}");
    let refused = balloon.set_target(65 * MIB).await.unwrap_err().to_string();
    assert!(refused.contains("it cannot give 68157440"), "{refused}");
    assert_eq!(balloon.target().await?, 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn how_often_a_guest_is_asked_is_changed_while_it_runs() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let vm = running(
        &bus,
        "vm",
        following([("statistics-interval", Variant::from(0u32))]),
    )
    .await?;
    let device = device(&bus, "vm", "balloon0").await?;
    let builder = || BalloonProxy::builder(&bus).path(api::path::device("vm", "balloon0"));
    let balloon = builder().cache_properties(CacheProperties::No).build();
    let balloon = balloon.await?;
    let seen = builder().cache_properties(CacheProperties::Yes).build();
    let seen = seen.await?;
    assert_eq!(seen.statistics_interval().await?, 0);
    balloon.set_statistics_interval(60).await?;
    until("another client is told", async || {
        Ok(seen.cached_statistics_interval()? == Some(60))
    })
    .await?;
    let refused = balloon.set_statistics_interval(3601).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("give 0 to 3600"), "{refused}");
    // It is the machine's, and not one process's, once it has a driver.
    until("the size of the definition", async || {
        Ok(balloon.actual().await? == 4 * MIB)
    })
    .await?;
    kill_process(device.process().await?)?;
    until("another process", async || {
        Ok(device.reconnects().await? == 1)
    })
    .await?;
    until("it answers", async || {
        Ok(balloon.statistics_interval().await.is_ok())
    })
    .await?;
    assert_eq!(balloon.statistics_interval().await?, 60);
    let job = vm.migrate("local:", HashMap::new(), 0).await?;
    done(&bus, job).await?;
    assert_eq!(balloon.statistics_interval().await?, 60);
    // The next start is as the definition says.
    vm.terminate(0).await?;
    becomes(&vm, State::Off).await?;
    let job = vm.start(0).await?;
    done(&bus, job).await?;
    until("the interval of the definition", async || {
        Ok(seen.cached_statistics_interval()? == Some(0))
    })
    .await
}
