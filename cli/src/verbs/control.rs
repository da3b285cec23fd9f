//! `godwit reset`, `pause`, `resume`, `remove`: what is done at once.

use super::each;
use crate::connection::{Broker, Machine};
use crate::error::{Result, What as _};
use crate::options::Names;
use crate::render::Output;

pub async fn reset(broker: &Broker, output: Output, names: Names) -> Result<()> {
    let reset = async |machine: &Machine| machine.proxy.reset(0).await;
    change(broker, output, names, reset).await
}

pub async fn pause(broker: &Broker, output: Output, names: Names) -> Result<()> {
    let pause = async |machine: &Machine| machine.proxy.pause(0).await;
    change(broker, output, names, pause).await
}

pub async fn resume(broker: &Broker, output: Output, names: Names) -> Result<()> {
    let resume = async |machine: &Machine| machine.proxy.resume(0).await;
    change(broker, output, names, resume).await
}

/// Changes machines, and prints what they are now for a program; a person sees success by silence.
async fn change(
    broker: &Broker,
    output: Output,
    names: Names,
    action: impl AsyncFn(&Machine) -> std::result::Result<(), api::Error>,
) -> Result<()> {
    let changed = each(&names.names, async |name| {
        let machine = broker.machine(name).await?;
        action(&machine).await.what(name)?;
        Ok(machine.look().await?.0)
    })
    .await;
    if output.is_json() {
        output.print(&changed.done, |_| String::new())?;
    }
    changed.result()
}

pub async fn remove(broker: &Broker, names: Names) -> Result<()> {
    each(&names.names, async |name| {
        broker.machine(name).await?.proxy.remove(0).await.what(name)
    })
    .await
    .result()
}
