//! What a guest sees of its processor, in an emulated host: not every KVM can hide instructions.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use test_hosts::{Host, HostOptions, strip};

const DEADLINE: Duration = Duration::from_secs(300);

/// The tests of levels, built as this one is.
fn tests() -> Result<PathBuf> {
    let options = ["--no-run", "--quiet", "--message-format=json"];
    let output = Command::new(env!("CARGO"))
        .arg("test")
        .args(options)
        .args(["-p", "test-migration", "--test", "levels"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .output()
        .context("cargo cannot be run")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "they do not build: {said}");
    let told = String::from_utf8(output.stdout)?;
    let mut messages = told
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = messages.find_map(|message| {
        let is_it = message["target"]["name"] == "levels";
        let program = message["executable"].as_str().filter(|_| is_it)?;
        Some(PathBuf::from(program))
    });
    program.context("cargo named no program")
}

#[test]
fn a_guest_sees_its_level_and_no_more() -> Result<()> {
    let built = std::env::current_exe()?;
    let built = built.ancestors().nth(2).context("the test has no folder")?;
    let mut host = Host::start(&HostOptions::named("levels"))?;
    let guest = test_guest::program();
    for (from, name) in [
        (built.join("godwit-vmm"), "godwit-vmm"),
        (tests()?, "levels"),
    ] {
        strip(&from, &host.share().join(name))?;
    }
    std::fs::copy(guest, host.share().join("guest"))?;
    let output = host.run_for(
        &format!(
            "install -Dm644 /share/guest '{}' && mkdir /opt/test &&
             install -m755 /share/godwit-vmm /share/levels /opt/test &&
             /opt/test/levels --include-ignored",
            guest.display()
        ),
        DEADLINE,
    )?;
    let (out, err) = (output.stdout, output.stderr);
    ensure!(output.status == 0, "{out}{err}");
    ensure!(out.contains("1 passed"), "{out}");
    Ok(())
}
