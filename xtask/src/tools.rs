//! What the tests need besides cargo, and how it gets here.

use std::io;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Result, bail};

use crate::cargo::{command, run};

/// A program and the Debian package that has it.
struct Tool {
    program: &'static str,
    /// What it is started with to see whether it is there.
    probe: &'static [&'static str],
    package: &'static str,
}

/// What the tests run besides our own programs.
const TOOLS: [Tool; 6] = [
    tool("qemu-system-x86_64", "qemu-system-x86"),
    tool("ip", "iproute2"),
    tool("cc", "gcc"),
    tool("busctl", "systemd"),
    tool("gdbus", "libglib2.0-bin"),
    Tool {
        program: "/usr/bin/python3",
        probe: &["-c", "import dbus"],
        package: "python3-dbus",
    },
];

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool {
        program,
        probe: &["--version"],
        package,
    }
}

/// Installs what the tests lack, or says what to install.
pub fn install_for_tests() -> Result<()> {
    let missing: Vec<_> = TOOLS.iter().filter(|tool| !answers(tool)).collect();
    let packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    if !packages.is_empty() {
        if !nix::unistd::geteuid().is_root() || !is_there("apt-get") {
            let programs: Vec<_> = missing.iter().map(|tool| tool.program).collect();
            bail!(
                "the tests need {}: install them (on Debian: sudo apt-get install {})",
                programs.join(", "),
                packages.join(" ")
            );
        }
        run(&mut command("apt-get", &["update", "-qq"]))?;
        let mut install = command(
            "apt-get",
            &["install", "-y", "-qq", "--no-install-recommends"],
        );
        run(install
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"))?;
    }
    cargo_tool("cargo-nextest")?;
    if !Path::new("/dev/kvm").exists() {
        bail!("the tests need /dev/kvm: is KVM there (modprobe kvm_intel or kvm_amd)?");
    }
    Ok(())
}

/// Installs a cargo subcommand from crates.io if it is not there.
pub fn cargo_tool(name: &str) -> Result<()> {
    if is_there(name) {
        return Ok(());
    }
    run(&mut command(
        "cargo",
        &["install", "--locked", "--quiet", name],
    ))
}

/// Whether a program is there: it starts, whatever it says to `--version`.
fn is_there(program: &str) -> bool {
    start(program, &["--version"]).is_ok()
}

/// Whether a tool is there and can do what it is for.
fn answers(tool: &Tool) -> bool {
    match tool.probe {
        ["--version"] => is_there(tool.program),
        probe => start(tool.program, probe).is_ok_and(|status| status.success()),
    }
}

fn start(program: &str, arguments: &[&str]) -> io::Result<ExitStatus> {
    let mut command = Command::new(program);
    command.args(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::null()).status()
}
