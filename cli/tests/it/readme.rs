//! What README.md has a newcomer do, to the letter.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;
use test_framework::programs::program;

use crate::common::real::{Real, eventually};
use crate::common::run;
use crate::common::terminal::OnTerminal;

/// The key that leaves a console.
const ESCAPE: &str = "\x1d";
/// What the walk is made of, besides the guest.
const PROGRAMS: [&str; 6] = [
    "godwit",
    "godwit-balloon",
    "godwit-blk",
    "godwit-broker",
    "godwit-net",
    "godwit-vmm",
];

/// The commands below a heading, without their comments.
fn commands(heading: &str) -> Vec<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
    let text = fs::read_to_string(path).unwrap();
    let (_, section) = text.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let lines = section.lines().filter_map(|line| line.strip_prefix("$ "));
    let command = |line: &str| {
        line.split("  #")
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    lines.map(command).collect()
}

/// A folder with the programs and the guest, as `cargo xtask demo` leaves it.
fn built(real: &Real) -> PathBuf {
    let folder = real.path("bin");
    fs::create_dir(&folder).unwrap();
    let put = |from: &std::path::Path, name: &str| {
        let to = folder.join(name);
        // Temporary files may be on another file system.
        if fs::hard_link(from, &to).is_err() {
            fs::copy(from, &to).unwrap();
        }
    };
    for name in PROGRAMS {
        put(&program(name).unwrap(), name);
    }
    put(test_guest::program(), "godwit-demo-guest");
    folder
}

#[test]
fn a_first_machine_is_as_the_readme_says() {
    let real = Real::new();
    let path = format!(
        "{}:{}",
        built(&real).display(),
        std::env::var("PATH").unwrap()
    );
    let shell = |line: &str| {
        let mut command = Command::new("sh");
        command.args(["-euc", line]).env("PATH", &path);
        command.env("GODWIT_BUS", &real.bus);
        command.env("TMPDIR", real.path(""));
        command
    };
    let walk = commands("A first machine");
    for line in &walk {
        if line.starts_with("export PATH=") {
            assert!(line.contains("$PWD/target/debug"), "{line}");
        } else if line.starts_with("godwit run") {
            let mut person = OnTerminal::start(shell(line));
            person.see("first runs; ^] leaves its console");
            person.see("@beat");
            person.press(ESCAPE);
            person.see("first goes on; godwit console first comes back");
            assert!(person.end().success(), "{line}");
        } else if line.starts_with("godwit console") {
            let mut person = OnTerminal::start(shell(line));
            person.see("@beat");
            person.press("stop\r");
            person.see("@done ok=1");
            person.see("first is off");
            assert!(person.end().success(), "{line}");
        } else if line.starts_with("godwit top") {
            let mut person = OnTerminal::start(shell(line));
            person.see("disk0");
            person.press("q");
            assert!(person.end().success(), "{line}");
        } else {
            assert!(
                !run(shell(line)).ok().is_empty() || is_silent(line),
                "{line} says nothing"
            );
        }
        if line.starts_with("kill -9") {
            eventually("another process serves the disk", || {
                let disk = &real.run("device show first disk0 --json").json();
                disk["reconnects"] == 1 && disk["state"] == "running"
            });
        }
    }
    let verbs = "run list show kill device logs balloon top pause resume migrate job console";
    for verb in verbs.split(' ') {
        let does = |line: &String| line.split_whitespace().take(2).any(|word| word == verb);
        assert!(walk.iter().any(does), "the README does not show {verb}");
    }
    assert_eq!(real.run("list --json").json(), json!([]));
}

/// Whether success is shown by silence.
fn is_silent(line: &str) -> bool {
    ["kill", "godwit pause", "godwit resume", "godwit migrate"]
        .iter()
        .any(|silent| line.starts_with(silent))
}
