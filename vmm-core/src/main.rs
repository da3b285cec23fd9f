//! `godwit-vmm`: runs one machine to its end.

mod options;

use std::fs::File;
use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use vmm_core::costs::LogLines;
use vmm_core::machine::{Machine, Reason};

use crate::options::Options;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("GODWIT_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::registry()
        .with(filter)
        .with(tracing_subscriber::fmt::layer().with_writer(io::stderr))
        .with(LogLines)
        .init();
    let mut options = Options::parse();
    let (status, why, end) = match options.take_end_file() {
        Ok(end) => match run(options, end.as_ref()) {
            Ok(reason) => (reason.exit_status(), reason.to_string(), end),
            Err(error) => (1, format!("{error:#}"), end),
        },
        Err(error) => (1, format!("{error:#}"), None),
    };
    if status != 0 {
        eprintln!("godwit-vmm: {why}");
    }
    if let Some(mut end) = end
        && let Err(error) = writeln!(end, "{status} {why}")
    {
        tracing::warn!(%error, "the owner is not told how the machine ended");
    }
    ExitCode::from(status)
}

fn run(options: Options, end: Option<&File>) -> Result<Reason> {
    // A machine with many devices has thousands of eventfds.
    let (_, most) =
        getrlimit(Resource::RLIMIT_NOFILE).context("the descriptor limit is unknown")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
        .context("the descriptor limit cannot be raised")?;
    let paused = options.paused;
    let end = end.map(File::try_clone).transpose();
    let (config, owner) = options.into_machine(end.context("no descriptor is left")?)?;
    let machine = Machine::new(config, owner)?;
    // Outside of systemd there is nobody to tell.
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    Ok(machine.run(paused))
}
