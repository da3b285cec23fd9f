//! `godwit list`: all machines.

use crate::connection::Broker;
use crate::error::Result;
use crate::options::List;
use crate::render::{Output, text};

pub async fn run(broker: &Broker, output: Output, list: List) -> Result<()> {
    let mut machines = broker.machines().await?;
    if !list.state.is_empty() {
        machines.retain(|machine| list.state.contains(&machine.state));
    }
    output.print(machines.as_slice(), |machines| {
        text::machines(machines, output.legend)
    })
}
