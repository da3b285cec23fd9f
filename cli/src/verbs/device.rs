//! `godwit device`: the devices of machines.

use serde::Serialize;

use super::start::wait_for;
use crate::connection::{Broker, Counters};
use crate::error::{Failure, Result, What as _};
use crate::job::Job;
use crate::options::{Device as Verb, Wait};
use crate::render::{Output, text};
use crate::view;

/// A device and its machine's name, as JSON in one object.
#[derive(Debug, Serialize)]
struct Shown {
    machine: String,
    #[serde(flatten)]
    device: view::Device,
    /// Its counters; empty when it does not run.
    statistics: Counters,
}

impl Shown {
    async fn of(broker: &Broker, machine: &str, device: view::Device) -> Result<Self> {
        Ok(Self {
            machine: machine.into(),
            statistics: broker.device_statistics(machine, &device.id).await?,
            device,
        })
    }

    fn line(&self) -> text::DeviceLine<'_> {
        text::DeviceLine {
            machine: Some(&self.machine),
            device: &self.device,
            requests: self.statistics.get("requests").copied(),
        }
    }
}

pub async fn run(broker: &Broker, output: Output, verb: Verb) -> Result<()> {
    match verb {
        Verb::List { names } => list(broker, output, names).await,
        Verb::Show { name, device } => show(broker, output, name, &device).await,
        Verb::Restart { name, device, wait } => {
            let job = restart(broker, &name, &device, wait).await?;
            output.print_json(&job)
        }
    }
}

async fn list(broker: &Broker, output: Output, names: Vec<String>) -> Result<()> {
    let machines = if names.is_empty() {
        broker.machines().await?
    } else {
        let mut machines = Vec::new();
        for name in &names {
            machines.push(broker.machine(name).await?.look().await?.0);
        }
        machines
    };
    let mut shown = Vec::new();
    for machine in machines {
        for device in machine.devices {
            shown.push(Shown::of(broker, &machine.name, device).await?);
        }
    }
    output.print(shown.as_slice(), |shown| {
        text::devices(shown.iter().map(Shown::line), output.legend)
    })
}

async fn show(broker: &Broker, output: Output, name: String, id: &str) -> Result<()> {
    let (machine, _) = broker.machine(&name).await?.look().await?;
    let device = find(machine.devices, &name, id)?;
    let shown = Shown::of(broker, &name, device).await?;
    output.print(&shown, |shown| {
        text::device(&shown.machine, &shown.device, &shown.statistics)
    })
}

fn find(devices: Vec<view::Device>, machine: &str, id: &str) -> Result<view::Device> {
    let ids: Vec<_> = devices.iter().map(|device| device.id.clone()).collect();
    let found = devices.into_iter().find(|device| device.id == id);
    found.ok_or_else(|| Failure::NoDevice {
        machine: machine.into(),
        device: id.into(),
        there_are: if ids.is_empty() {
            "none".into()
        } else {
            ids.join(", ")
        },
    })
}

/// Replaces the process of a device.
pub async fn restart(broker: &Broker, name: &str, id: &str, wait: Wait) -> Result<view::Job> {
    let (machine, _) = broker.machine(name).await?.look().await?;
    find(machine.devices, name, id)?;
    let what = format!("{name}/{id}");
    let path = broker
        .device(name, id)
        .await?
        .restart(0)
        .await
        .what(&what)?;
    let job = Job::at(broker, &format!("restart of {what}"), path).await?;
    wait_for(&job, wait).await
}
