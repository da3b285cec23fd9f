//! A balloon whose target changes while its machine runs.

use std::collections::HashMap;

use anyhow::Result;
use api::balloon::BalloonProxy;
use test_broker::*;
use test_guest::{BalloonMode, Workload};
use zbus::Variant;
use zbus::proxy::CacheProperties;

const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_target_is_followed_and_a_size_that_is_none_is_refused() -> Result<()> {
    let broker = Broker::start()?;
    let bus = broker.connect().await?;
    let mut definition = definition(&Workload {
        balloon: BalloonMode::Follow,
        balloon_mib: 16,
        ..Workload::default()
    });
    let balloon = HashMap::from([("target".to_owned(), Variant::from("4M"))]);
    definition.insert("balloon".into(), value(vec![balloon]));
    running(&bus, "vm", definition).await?;
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
