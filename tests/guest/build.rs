//! Builds the guest program: a package of its own, with its own flags and target folder.
//!
//! The inner cargo has a target folder inside `OUT_DIR`, so it never waits for the lock that the
//! outer one holds, and inherits none of the outer one's flags.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, error::Error};

/// Where the program is linked for: any target whose `core` and `alloc` are installed will do.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    let crate_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let program = crate_dir.join("program");
    let target_dir = PathBuf::from(env::var("OUT_DIR")?).join("program");
    for watched in [
        "program/src",
        "program/Cargo.toml",
        "program/link.ld",
        "src/protocol",
    ] {
        println!("cargo::rerun-if-changed={watched}");
    }

    let mut cargo = Command::new(env::var("CARGO")?);
    for (name, _) in env::vars_os() {
        if inherited_by_mistake(&name.to_string_lossy()) {
            cargo.env_remove(name);
        }
    }
    let status = cargo
        .current_dir(&program)
        .args(["build", "--release", "--locked", "--offline", "--quiet"])
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(&program)?)
        .status()?;
    if !status.success() {
        return Err(format!("the guest program in {} did not build", program.display()).into());
    }
    let elf = target_dir.join(TARGET).join("release/godwit-guest");
    println!("cargo::rustc-env=TEST_GUEST_PROGRAM={}", elf.display());
    Ok(())
}

/// Variables that cargo, or a wrapper such as clippy, sets for the outer build alone.
fn inherited_by_mistake(name: &str) -> bool {
    name.starts_with("CARGO_PROFILE")
        || name.starts_with("CARGO_FEATURE")
        || name.starts_with("CARGO_CFG")
        || (name.starts_with("CARGO_BUILD_") || name.starts_with("CARGO_TARGET_"))
        || name.contains("RUSTFLAGS")
        || [
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "CLIPPY_ARGS",
            "TARGET",
            "RUSTC_LINKER",
        ]
        .contains(&name)
}

/// A static image at a fixed address, with nothing of the host's C runtime.
fn rustflags(program: &Path) -> Result<String, Box<dyn Error>> {
    let script = program.join("link.ld");
    let script = script.to_str().ok_or("the checkout's path is not UTF-8")?;
    let script = format!("-Clink-arg=-T{script}");
    let flags = [
        "-Crelocation-model=static",
        "-Cno-redzone=yes",
        "-Clink-arg=-nostartfiles",
        "-Clink-arg=-nostdlib",
        "-Clink-arg=-static",
        "-Clink-arg=-no-pie",
        "-Clink-arg=-Wl,--build-id=none",
        &script,
    ];
    Ok(flags.join("\x1f"))
}
