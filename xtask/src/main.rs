//! Godwit's own commands: `cargo xtask demo | test | bench | check | hosts`.
#![expect(
    clippy::print_stdout,
    reason = "these commands talk to a person on stdout"
)]

mod bench;
mod cargo;
mod check;
mod demo;
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
    /// Everything that a change must pass: format, lints, docs, rules, tests.
    Check,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo => demo::demo(),
        Command::Bench { bench } => bench::bench(&bench),
        Command::Test { nextest } => check::test(&nextest),
        Command::Check => check::check(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
