//! `godwit reload`: the definitions in the configuration folder.

use crate::connection::Broker;
use crate::error::{Result, What as _};
use crate::render::Output;

pub async fn run(broker: &Broker, output: Output) -> Result<()> {
    let manager = broker.manager().await?;
    manager.reload().await.what("the definitions")?;
    output.print_json(&broker.machines().await?)
}
