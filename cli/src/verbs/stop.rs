//! `godwit stop`: switches machines off.

use super::each;
use super::start::{print, wait_for};
use crate::connection::Broker;
use crate::error::{POWER_OFF, Result, What as _};
use crate::job::Job;
use crate::options::Stop;
use crate::render::Output;

pub async fn run(broker: &Broker, output: Output, stop: Stop) -> Result<()> {
    let jobs = each(&stop.names.names, async |name| {
        let machine = broker.machine(name).await?;
        let state = machine.state().await?;
        // So that it can be said again.
        if matches!(state.as_str(), "off" | "failed") {
            return Ok(None);
        }
        let (what, path) = if stop.force {
            ("end of ", machine.proxy.terminate(0).await)
        } else {
            (POWER_OFF, machine.proxy.power_off(0).await)
        };
        let what = format!("{what}{name}");
        let job = Job::at(broker, &what, path.what(name)?).await?;
        wait_for(&job, stop.wait).await.map(Some)
    })
    .await;
    print(output, &jobs.done)?;
    jobs.result()
}
