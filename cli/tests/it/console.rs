//! A person at a terminal: the console and its escape, Ctrl-C while something is awaited.

use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;

use crate::common::fake::Fake;
use crate::common::real::eventually;
use crate::common::terminal::OnTerminal;
use crate::common::{godwit, run};
use api::machine::State;
use nix::sys::signal::Signal;

fn type_at(fake: &Fake, line: &str) -> OnTerminal {
    OnTerminal::start(godwit(&fake.bus, line))
}

fn with_machine() -> Fake {
    let fake = Fake::start();
    run(godwit(&fake.bus, "run --kernel /k --detach")).ok();
    fake
}

#[test]
fn the_console_passes_keys_and_is_left_by_its_escape() {
    let fake = with_machine();
    let mut person = type_at(&fake, "console vm1");
    person.see("^] leaves its console");
    person.see("it booted");
    assert!(person.is_raw());
    // Ctrl-C is a key of the guest.
    person.press("ls\r\x03");
    let mut guest = fake.guest("vm1");
    let mut keys = [0; 4];
    guest.read_exact(&mut keys).unwrap();
    assert_eq!(&keys, b"ls\r\x03");
    guest.write_all(b"one\ntwo\n").unwrap();
    person.see("one\r\ntwo\r\n");
    person.press("\x1d");
    person.see("vm1 goes on");
    assert!(person.end().success());
    assert_eq!(fake.state_of("vm1"), Some(State::Running));
}

#[test]
fn the_escape_can_be_another_key() {
    let fake = with_machine();
    let mut person = type_at(&fake, "console vm1 --escape ^A --no-replay");
    person.see("^A leaves its console");
    eventually("keys come at once", || person.is_raw());
    person.press("\x1dx\x01");
    assert!(person.end().success());
    let mut keys = [0; 2];
    fake.guest("vm1").read_exact(&mut keys).unwrap();
    assert_eq!(&keys, b"\x1dx");
}

#[test]
fn run_ends_with_its_machine() {
    let fake = Fake::start();
    let mut person = type_at(&fake, "run --kernel /k");
    person.see("it booted");
    fake.guest("vm1").write_all(b"bye\n").unwrap();
    person.see("bye");
    fake.end_machine("vm1", None);
    person.see("vm1 is off");
    assert!(person.end().success());
    assert_eq!(fake.state_of("vm1"), None);

    let mut person = type_at(&fake, "run --kernel /k");
    person.see("it booted");
    fake.end_machine("vm1", Some("the guest triple-faulted"));
    person.see("vm1 failed: the guest triple-faulted");
    assert_eq!(person.end().code(), Some(9));
}

#[test]
fn a_pipe_is_typed_and_its_end_is_not_the_end() {
    let fake = with_machine();
    let mut command = godwit(&fake.bus, "console vm1");
    command
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    // The escape key is none here.
    child.stdin.take().unwrap().write_all(b"a\x1db").unwrap();
    let mut output = child.stdout.take().unwrap();
    let mut text = [0; 10];
    output.read_exact(&mut text).unwrap();
    let mut keys = [0; 3];
    fake.guest("vm1").read_exact(&mut keys).unwrap();
    assert_eq!(&keys, b"a\x1db");
    assert!(child.try_wait().unwrap().is_none());
    fake.end_machine("vm1", None);
    assert!(child.wait().unwrap().success());
}

#[test]
fn signals_restore_the_terminal() {
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let fake = with_machine();
        let mut person = type_at(&fake, "console vm1");
        person.see("it booted");
        assert!(person.is_raw());
        person.signal(signal);
        let status = person.end();
        assert_eq!(
            (status.code(), status.signal()),
            (Some(130), None),
            "{signal}"
        );
    }
}

#[test]
fn ctrl_c_asks_whether_to_cancel() {
    let fake = Fake::start();
    let mut person = type_at(&fake, "run --kernel /k --cmdline slow");
    person.see("start of vm1: working");
    person.press("\x03");
    person.see("[c]ancel");
    // To wait is to be asked again.
    person.press("w\r");
    person.see("start of vm1: working");
    person.press("\x03");
    person.see("[c]ancel");
    person.press("c\r");
    person.see("start of vm1 was cancelled");
    assert_eq!(person.end().code(), Some(11));
}

#[test]
fn ctrl_c_can_leave_what_is_awaited() {
    for leave in ["d\r", "\x03"] {
        let fake = Fake::start();
        let mut person = type_at(&fake, "run --kernel /k --cmdline stuck");
        person.see("start of vm1: working");
        person.press("\x03");
        person.see("it cannot be cancelled now");
        person.press(leave);
        person.see("start of vm1 goes on as job 1");
        person.see("godwit job wait 1");
        assert_eq!(person.end().code(), Some(130));
        assert!(
            fake.state_of("vm1").is_some(),
            "what goes on is not removed"
        );
    }
}

#[test]
fn what_ends_while_a_question_is_asked_has_ended() {
    let fake = Fake::start();
    let mut person = type_at(&fake, "run --kernel /k --cmdline slow --detach");
    person.see("start of vm1: working");
    person.press("\x03");
    person.see("[c]ancel");
    fake.end_job(1, api::job::State::Done);
    person.see("vm1\r\n");
    assert!(person.end().success());
}

#[test]
fn top_is_left_by_a_key() {
    let fake = with_machine();
    for key in ["q", "\x03"] {
        let mut person = type_at(&fake, "top --interval 0.1");
        person.see("MACHINE");
        person.see("disk0");
        person.press("xq".get(..usize::from(key == "q")).unwrap());
        person.press(key);
        person.see("\x1b[?1049l");
        assert!(person.end().success());
    }
}
