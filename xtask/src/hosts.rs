//! `cargo xtask hosts`: emulated hosts to try things in by hand.

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use test_hosts::commands;

/// What to do with a host.
#[derive(Debug, Subcommand)]
pub enum Hosts {
    /// Makes all that hosts need, if it is not there yet.
    Prepare,
    /// Starts a host that runs until it is stopped.
    Start {
        /// Its name.
        name: String,
    },
    /// Runs a shell command in a host, as root.
    Run {
        /// The host's name.
        name: String,
        /// The command.
        command: String,
    },
    /// Stops a host and forgets what it wrote.
    Stop {
        /// Its name.
        name: String,
    },
}

/// Does it; a command's exit status is ours.
pub fn hosts(hosts: &Hosts) -> Result<ExitCode> {
    match hosts {
        Hosts::Prepare => println!("{}", commands::prepare()?.display()),
        Hosts::Start { name } => {
            println!("{} is /share in {name}", commands::start(name)?.display());
        }
        Hosts::Run { name, command } => {
            let output = commands::run(name, command)?;
            print!("{}", output.stdout);
            eprint!("{}", output.stderr);
            return Ok(ExitCode::from(u8::try_from(output.status).unwrap_or(1)));
        }
        Hosts::Stop { name } => commands::stop(name)?,
    }
    Ok(ExitCode::SUCCESS)
}
