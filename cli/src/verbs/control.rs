//! `godwit reset`, `pause`, `resume`, `remove`, `decide`: what is done at once.

use super::each;
use crate::connection::{Broker, Machine};
use crate::error::{Failure, Result, What as _, is_gone};
use crate::options::{Decide, Names};
use crate::render::Output;
use crate::view;

pub async fn reset(broker: &Broker, output: Output, names: Names) -> Result<()> {
    let reset = async |machine: &Machine| machine.proxy.reset(0).await;
    change_each(broker, output, names, reset).await
}

pub async fn pause(broker: &Broker, output: Output, names: Names) -> Result<()> {
    let pause = async |machine: &Machine| machine.proxy.pause(0).await;
    change_each(broker, output, names, pause).await
}

pub async fn resume(broker: &Broker, output: Output, names: Names) -> Result<()> {
    let resume = async |machine: &Machine| machine.proxy.resume(0).await;
    change_each(broker, output, names, resume).await
}

pub async fn remove(broker: &Broker, output: Output, names: Names) -> Result<()> {
    let remove = async |machine: &Machine| machine.proxy.remove(0).await;
    change_each(broker, output, names, remove).await
}

pub async fn decide(broker: &Broker, output: Output, decide: Decide) -> Result<()> {
    let decided = async |machine: &Machine| machine.proxy.decide(decide.there, 0).await;
    output.print_json(&change(broker, &decide.name, decided).await?)
}

async fn change_each(
    broker: &Broker,
    output: Output,
    names: Names,
    action: impl AsyncFn(&Machine) -> std::result::Result<(), api::Error>,
) -> Result<()> {
    let changed = each(&names.names, async |name| {
        change(broker, name, &action).await
    })
    .await;
    output.print_json(&changed.done)?;
    changed.result()
}

/// Changes a machine. Returns what it is now, or what it was if that made the broker forget it.
async fn change(
    broker: &Broker,
    name: &str,
    action: impl AsyncFn(&Machine) -> std::result::Result<(), api::Error>,
) -> Result<view::Machine> {
    let machine = broker.machine(name).await?;
    let (before, _) = machine.look().await?;
    action(&machine).await.what(name)?;
    match machine.look().await {
        Ok((now, _)) => Ok(now),
        Err(Failure::Refused { error, .. }) if is_gone(&error) => Ok(before),
        Err(failure) => Err(failure),
    }
}
