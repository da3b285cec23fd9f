//! A process that comes for its program becomes it, with the descriptors under their numbers.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use broker::launch::{Program, hand_over};

#[test]
fn a_process_becomes_what_it_is_handed() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_godwit-launch"))
        .arg(&socket)
        .spawn()
        .unwrap();
    let (stream, _) = listener.accept().unwrap();
    let log = folder.path().join("log");
    let mut program = Program {
        machine: "vm".into(),
        declared: false,
        beside: false,
        pins_memory: false,
        role: "core".into(),
        path: "/bin/sh".into(),
        args: Vec::new(),
        descriptors: Vec::new(),
        log: File::create(&log).unwrap(),
    };
    let mut numbers = Vec::new();
    for text in ["one", "two", "three"] {
        let path = folder.path().join(text);
        fs::write(&path, text).unwrap();
        numbers.push(program.pass(File::open(&path).unwrap().into()));
    }
    let script: String = numbers
        .iter()
        .rev()
        .map(|n| format!("cat /proc/self/fd/{n}; "))
        .collect();
    program.args(["-c", &format!("{script} echo; echo said >&2; exit 5")]);
    hand_over::give(&stream, &program).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert_eq!(fs::read_to_string(log).unwrap(), "threetwoone\nsaid\n");
}

#[test]
fn a_process_that_is_sent_away_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_godwit-launch"))
        .arg(&socket)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (stream, _) = listener.accept().unwrap();
    hand_over::refuse(&stream, "there is no machine vm").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text, "godwit-launch: there is no machine vm\n");
}

#[test]
fn nobody_at_the_socket_is_said() {
    let output = Command::new(env!("CARGO_BIN_EXE_godwit-launch"))
        .arg(Path::new("/nowhere/socket"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.starts_with("godwit-launch: no broker at /nowhere/socket: "),
        "{text}"
    );
}
