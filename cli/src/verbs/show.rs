//! `godwit show`: machines with all they have.

use serde::Serialize;
use serde_json::Value;

use super::each;
use crate::connection::Broker;
use crate::error::Result;
use crate::options::Show;
use crate::render::{Output, text};
use crate::view;

/// A machine and its definition, as JSON in one object.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    machine: view::Machine,
    definition: Value,
}

pub async fn run(broker: &Broker, output: Output, show: Show) -> Result<()> {
    let shown = each(&show.names, async |name| {
        let (machine, definition) = broker.machine(name).await?.look().await?;
        let definition = view::json_object(&definition);
        Ok(Shown {
            machine,
            definition,
        })
    })
    .await;
    output.print(shown.done.as_slice(), |all| {
        let texts: Vec<_> = all
            .iter()
            .map(|shown| text::machine(&shown.machine, &shown.definition))
            .collect();
        texts.join("\n")
    })?;
    shown.result()
}
