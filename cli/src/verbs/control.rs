//! `godwit reset`, `pause`, `resume`, `remove`: what is done at once.

use super::each;
use crate::connection::Broker;
use crate::error::{Result, What as _};
use crate::options::Names;

pub async fn reset(broker: &Broker, names: Names) -> Result<()> {
    each(&names.names, async |name| {
        broker.machine(name).await?.proxy.reset(0).await.what(name)
    })
    .await
    .result()
}

pub async fn pause(broker: &Broker, names: Names) -> Result<()> {
    each(&names.names, async |name| {
        broker.machine(name).await?.proxy.pause(0).await.what(name)
    })
    .await
    .result()
}

pub async fn resume(broker: &Broker, names: Names) -> Result<()> {
    each(&names.names, async |name| {
        broker.machine(name).await?.proxy.resume(0).await.what(name)
    })
    .await
    .result()
}

pub async fn remove(broker: &Broker, names: Names) -> Result<()> {
    each(&names.names, async |name| {
        broker.machine(name).await?.proxy.remove(0).await.what(name)
    })
    .await
    .result()
}
