//! Godwit's own commands: `cargo xtask demo | test | bench | check | hosts | install`.
#![expect(
    clippy::print_stdout,
    reason = "these commands talk to a person on stdout"
)]

mod bench;
mod cargo;
mod check;
mod demo;
mod hosts;
mod install;
mod rules;
mod tools;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Godwit's own commands.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boots the bundled guest with its disk and network in processes of their own.
    Demo,
    /// Runs all tests, on this computer and in emulated hosts.
    Test {
        /// Passed on to `cargo nextest run`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        nextest: Vec<String>,
    },
    /// Measures; every figure beside its peer in the same run.
    Bench {
        #[command(subcommand)]
        bench: bench::Bench,
    },
    /// Emulated hosts, to try things in by hand.
    Hosts {
        #[command(subcommand)]
        hosts: hosts::Hosts,
    },
    /// Puts programs, units, policies, completions and man pages in place.
    Install(install::Place),
    /// Everything that a change must pass: format, lints, docs, rules, tests.
    Check,
}

fn main() -> ExitCode {
    let done = |result: anyhow::Result<()>| result.map(|()| ExitCode::SUCCESS);
    let result = match Cli::parse().command {
        Command::Demo => done(demo::demo()),
        Command::Bench { bench } => done(bench::bench(bench)),
        Command::Hosts { hosts } => hosts::hosts(&hosts),
        Command::Install(place) => done(install::install(place)),
        Command::Test { nextest } => done(check::test(&nextest)),
        Command::Check => done(check::check()),
    };
    match result {
        Ok(status) => status,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
