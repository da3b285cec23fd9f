//! `godwit balloon`: memory that a guest gives to the host.

use api::balloon::BalloonProxy;
use api::path;
use zbus::proxy::CacheProperties;

use crate::connection::Broker;
use crate::error::{Failure, Result, What as _};
use crate::options::Balloon as Verb;
use crate::render::{Output, text};
use crate::view;

pub async fn run(broker: &Broker, output: Output, verb: Verb) -> Result<()> {
    let (machine, _) = broker.machine(&verb.name).await?.look().await?;
    let device = machine.devices.iter().find(|d| d.kind == "balloon");
    let device = device.ok_or_else(|| Failure::NoDevice {
        machine: verb.name.clone(),
        device: "balloon".into(),
        there_are: match machine.devices.is_empty() {
            true => "none".into(),
            false => {
                let ids = machine.devices.iter().map(|d| d.id.clone());
                ids.collect::<Vec<_>>().join(", ")
            }
        },
    })?;
    let what = format!("{}/{}", verb.name, device.id);
    let proxy = BalloonProxy::builder(broker.connection())
        .path(path::device(&verb.name, &device.id))
        .cache_properties(CacheProperties::No)
        .build()
        .await
        .what(&what)?;
    if let Some(size) = verb.size {
        proxy.set_target(size.0).await.what(&what)?;
    }
    if let Some(seconds) = verb.statistics_interval {
        proxy.set_statistics_interval(seconds).await.what(&what)?;
    }
    let shown = view::Balloon {
        target_bytes: proxy.target().await.what(&what)?,
        actual_bytes: proxy.actual().await.what(&what)?,
        statistics_interval_s: proxy.statistics_interval().await.what(&what)?,
        guest: proxy.statistics().await.what(&what)?,
        machine: verb.name,
        device: device.id.clone(),
    };
    output.print(&shown, text::balloon)
}
