//! `godwit reload`: the definitions in the configuration folder.

use crate::connection::Broker;
use crate::error::{Result, What as _};

pub async fn run(broker: &Broker) -> Result<()> {
    broker
        .manager()
        .await?
        .reload()
        .await
        .what("the definitions")
}
