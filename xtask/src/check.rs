//! What a change must pass.

use std::time::Instant;

use anyhow::Result;

use crate::cargo::{command, root, run};
use crate::{rules, tools};

/// Runs all tests.
pub fn test(nextest: &[String]) -> Result<()> {
    tools::install_for_tests()?;
    run(command("cargo", &["nextest", "run", "--workspace"]).args(nextest))?;
    run(&mut command(
        "cargo",
        &["test", "--quiet", "--doc", "--workspace"],
    ))
}

/// Format, lints, docs, rules, tests.
pub fn check() -> Result<()> {
    let start = Instant::now();
    tools::install_for_tests()?;
    run(&mut command("cargo", &["fmt", "--all", "--check"]))?;
    rules::check()?;
    guest_program("fmt", &["--check"])?;
    guest_program(
        "clippy",
        &[
            "--release",
            "--target",
            "x86_64-unknown-linux-gnu",
            "--",
            "-D",
            "warnings",
        ],
    )?;
    run(&mut command(
        "cargo",
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ],
    ))?;
    run(
        command("cargo", &["doc", "--workspace", "--no-deps", "--quiet"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    test(&[])?;
    println!("all checks passed in {} s", start.elapsed().as_secs());
    Ok(())
}

/// A cargo command on the bundled guest's program, which is a workspace of its own.
fn guest_program(subcommand: &str, arguments: &[&str]) -> Result<()> {
    let mut cargo = command("cargo", &[subcommand]);
    run(cargo
        .args(arguments)
        .current_dir(root().join("tests/guest/program")))
}
