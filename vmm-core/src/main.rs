//! `godwit-vmm`: runs one machine to its end.

mod options;

use std::io;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tracing_subscriber::EnvFilter;
use vmm_core::machine::{Machine, Reason};

use crate::options::Options;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("GODWIT_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
    let options = Options::parse();
    match run(options) {
        Ok(reason) => {
            if reason.exit_status() != 0 {
                eprintln!("godwit-vmm: {reason}");
            }
            ExitCode::from(reason.exit_status())
        }
        Err(error) => {
            eprintln!("godwit-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> Result<Reason> {
    // A machine with many devices has thousands of eventfds.
    let (_, most) =
        getrlimit(Resource::RLIMIT_NOFILE).context("the descriptor limit is unknown")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
        .context("the descriptor limit cannot be raised")?;
    let paused = options.paused;
    let (config, owner) = options.into_machine()?;
    let machine = Machine::new(config, owner)?;
    // Outside of systemd there is nobody to tell.
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    Ok(machine.run(paused))
}
