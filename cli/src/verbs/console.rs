//! `godwit console`: attaches to a machine.

use std::os::fd::OwnedFd;

use api::machine::{FORCE, READ_ONLY, REPLAY};

use super::watch::{End, Watch};
use crate::connection::{Broker, Machine};
use crate::console::{Left, attach};
use crate::error::{Failure, Result, What as _};
use crate::options::Console;
use crate::render::say;
use crate::value::Escape;

pub async fn run(broker: &Broker, console: Console) -> Result<()> {
    let machine = broker.machine(&console.name).await?;
    let watch = Watch::start(broker, &machine).await?;
    let mut flags = 0;
    for (wanted, flag) in [
        (console.read_only, READ_ONLY),
        (console.force, FORCE),
        (!console.no_replay, REPLAY),
    ] {
        if wanted {
            flags |= flag;
        }
    }
    let opened = machine
        .proxy
        .open_console("", flags)
        .await
        .what(&console.name)?;
    say(&format!(
        "{}: {} leaves its console",
        machine.name, console.escape
    ));
    follow(
        &machine,
        watch,
        opened.into(),
        console.escape,
        !console.read_only,
    )
    .await
}

/// Attaches to a console, and says how it ended.
///
/// # Errors
/// The machine failed, or the console was lost.
pub async fn follow(
    machine: &Machine,
    watch: Watch,
    console: OwnedFd,
    escape: Escape,
    input: bool,
) -> Result<()> {
    let name = &machine.name;
    match attach(console, escape, input).await? {
        Left::Escaped => {
            say(&format!(
                "\n{name} goes on; godwit console {name} comes back"
            ));
            Ok(())
        }
        Left::Interrupted => Err(Failure::Interrupted),
        Left::Closed => match watch.end().await? {
            End::Off => {
                say(&format!("{name} is off"));
                Ok(())
            }
            End::Failed(reason) => Err(Failure::MachineFailed {
                machine: name.clone(),
                reason,
            }),
            End::None => Err(Failure::ConsoleLost {
                machine: name.clone(),
            }),
        },
    }
}
