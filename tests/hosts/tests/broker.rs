//! The broker with systemd, on the private and the system bus, in an emulated host on which
//! everything is installed as packages install it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use packaging::{Install, PROGRAMS};
use serde_json::Value;
use test_framework::programs::program;
use test_hosts::{Host, HostOptions, strip};

/// Minutes on two idle cores; this is for busy ones.
const DEADLINE: Duration = Duration::from_secs(840);

/// The variable that says how many machines come and go, and how many do in a host that is as slow
/// as an emulated one.
const CYCLES: &str = "GODWIT_TEST_CYCLES";
const FEW_CYCLES: &str = "12";

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A host with everything in place, and the bundled guest where it is here.
fn installed(name: &str) -> Result<Host> {
    let mut host = Host::start(&HostOptions::named(name))?;
    let staged = tempfile::tempdir()?;
    for name in PROGRAMS {
        strip(&program(name)?, &staged.path().join(name))?;
    }
    let guest = test_guest::program();
    let install = Install {
        source: &source(),
        programs: staged.path(),
        guest,
        destdir: &host.share().join("root"),
        prefix: Path::new("/usr"),
    };
    install.run()?;
    fs::copy(guest, host.share().join("guest"))?;
    let put_in_place = format!(
        "cp -a --no-preserve=ownership /share/root/. / && install -Dm644 /share/guest '{}' &&
         systemd-sysusers && systemd-tmpfiles --create &&
         systemctl daemon-reload && systemctl reload dbus",
        guest.display()
    );
    host.call("", &put_in_place, DEADLINE)?;
    Ok(host)
}

/// Programs of the broker's own tests, built with all others, as other features of what they depend on
/// would have it built anew.
fn suite(names: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    let output = Command::new(env!("CARGO"))
        .args(["test", "--no-run", "--quiet", "--message-format=json"])
        .arg("--workspace")
        .args(names.iter().flat_map(|name| ["--test", name]))
        .current_dir(source())
        .output()
        .context("cargo cannot be run")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "the broker's tests do not build: {said}"
    );
    let mut programs = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: Value = serde_json::from_str(line)?;
        let of_broker = || {
            let source = message["target"]["src_path"].as_str()?;
            let folder = Path::new(source).parent()?;
            folder.ends_with("tests/broker/tests").then_some(())
        };
        if let (Some(()), Some(name), Some(program)) = (
            of_broker(),
            message["target"]["name"].as_str(),
            message["executable"].as_str(),
        ) {
            programs.push((name.to_owned(), program.into()));
        }
    }
    Ok(programs)
}

/// Runs programs of the broker's tests, with options for the harness.
fn passes(manner: &str, names: &[&str], options: &str) -> Result<()> {
    let mut host = installed(manner)?;
    let suite = suite(names)?;
    let cycles = std::env::var(CYCLES).unwrap_or_else(|_| FEW_CYCLES.into());
    // The tests start brokers of their own.
    host.run("systemctl mask --runtime --now godwit-broker")?;
    for name in names {
        let (_, program) = suite
            .iter()
            .find(|(test, _)| test == name)
            .with_context(|| format!("the broker has no tests {name}"))?;
        strip(program, &host.share().join(name))?;
        let output = host.run_for(
            &format!(
                "install -m755 /share/{name} /usr/bin/broker-test &&
                 GODWIT_TEST_BROKER={manner} GODWIT_TEST_CYCLES={cycles} \
                     /usr/bin/broker-test --test-threads=1 {options}"
            ),
            DEADLINE,
        )?;
        let (out, err) = (output.stdout, output.stderr);
        ensure!(output.status == 0, "{manner} {name}:\n{out}{err}");
        ensure!(!out.contains(" 0 passed"), "{manner} {name}:\n{out}");
    }
    Ok(())
}

/// Debian's Python is not in a host, nor is the documentation.
const ELSEWHERE: &str = "--skip python_drives_a_machine --skip what_is_documented";

#[test]
fn machines_live_in_units() -> Result<()> {
    passes("units", &["life"], "--skip a_killed --skip a_device")
}

#[test]
fn machines_in_units_survive_what_is_killed() -> Result<()> {
    passes("units", &["life"], "a_killed a_device")
}

#[test]
fn clients_networks_and_refusals_with_units() -> Result<()> {
    let others = ["clients", "cycles", "network", "refused"];
    passes("units", &others, ELSEWHERE)
}

#[test]
fn callers_balloons_and_other_back_ends_with_units() -> Result<()> {
    let others = ["balloon", "foreign", "hostile", "introspection", "vfio"];
    passes("units", &others, ELSEWHERE)
}

#[test]
fn machines_in_units_move() -> Result<()> {
    let tests = "many_times_within_a_host a_declared_machine_that_has_moved";
    passes("units", &["elsewhere", "migration"], tests)
}

/// Who may call on the system bus is polkit's to say: see `the_service_of_a_system`.
#[test]
fn machines_live_on_the_system_bus() -> Result<()> {
    passes("system-bus", &["life"], "lives declared transient")?;
    let options = format!("{ELSEWHERE} --skip another_user_is_refused");
    passes("system-bus", &["clients", "refused"], &options)
}

#[test]
fn the_service_of_a_system() -> Result<()> {
    let mut host = installed("service")?;
    let script = host.share().join("service.sh");
    fs::write(script, include_str!("service.sh"))?;
    let guest = test_guest::program().display();
    let output = host.run_for(&format!("bash /share/service.sh '{guest}'"), DEADLINE)?;
    let said: Vec<_> = output.stdout.lines().collect();
    let expected = [
        "activated",
        "declared machine runs",
        "polkit decides",
        "the living survive",
        "it moves",
        "the demonstration is installed",
        "failures say why",
        "nothing is left",
    ];
    assert_eq!(said, expected, "{}", output.stderr);
    Ok(())
}
