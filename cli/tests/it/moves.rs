//! Machines that move and go into files, as a person and a script see it.

use nix::sys::signal::Signal;
use test_guest::{BlkMode, Workload};

use crate::common::real::{Other, Real, eventually};
use crate::common::terminal::OnTerminal;
use crate::common::{godwit, run};

/// Writes to its memory as fast as it goes: something is left after every round.
fn hurried() -> Workload {
    Workload {
        heartbeat: 50,
        blk: BlkMode::Off,
        span: 4,
        dirty: 0,
        poweroff: true,
        ..Workload::default()
    }
}

/// A broker with a machine `vm` that runs.
fn with_machine() -> Real {
    let real = Real::new();
    crate::common::run(real.guest(&hurried(), "--detach --keep --name vm")).ok();
    real
}

/// What is never stopped.
const ENDLESS: &str = "--max-downtime 1ms --patience 600 --max-bandwidth 1M";

#[test]
fn a_move_says_what_it_took() {
    let real = with_machine();
    let before = real.show("vm")["process"].clone();
    let options =
        "--max-downtime 500ms --blackout-limit 20s --patience 30 --channels 4 --auto-converge";
    let job = real
        .run(&format!("migrate vm local: {options} --json"))
        .json();
    assert_eq!(job["state"], "done", "{job}");
    assert_eq!(job["result"]["Place"], "destination");
    let migration = &job["migration"];
    assert_eq!(migration["uri"], "local:");
    assert_eq!(migration["max_downtime_usec"], 500_000);
    assert!(migration["downtime_usec"].as_u64() > Some(0), "{job}");
    assert_ne!(real.show("vm")["process"], before);
    let trace = real.path("trace.json");
    let line = format!("migrate vm local: --trace {}", trace.display());
    let said = real.run(&line);
    assert!(said.stderr.contains("it stood still for"), "{said:?}");
    said.ok();
    let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    assert!(!trace["traceEvents"].as_array().unwrap().is_empty());
    let number = job["id"].to_string();
    let drawn = real.run(&format!("job show {number}")).ok();
    assert!(drawn.contains("barrier B"), "{drawn}");
    real.run("stop --force vm").ok();
}

#[test]
fn statuses_tell_why_a_machine_did_not_move() {
    let real = with_machine();
    real.run("migrate nobody local:").failed(4, "nobody");
    real.run("migrate vm ssh://x:1")
        .failed(6, "tcp://HOST:PORT");
    real.run("migrate vm local: --channels 17")
        .failed(6, "channels");
    real.run("migrate vm local: --max-bandwidth 1K")
        .failed(6, "max-bandwidth");
    let nowhere = format!("unix:{}", real.path("nobody").display());
    real.run(&format!("migrate vm {nowhere}"))
        .failed(12, "does not take it");
    assert_eq!(real.show("vm")["state"], "running");
    real.run("decide vm --there").failed(5, "");
    assert_eq!(real.run("decide vm").status, 2);
    real.run("stop --force vm").ok();
    real.run("migrate vm local:").failed(5, "vm is off");
}

#[test]
fn a_move_shows_how_far_it_is_and_ctrl_c_asks() {
    let real = with_machine();
    // Through another broker, so that memory is copied.
    let there = Other::start(&real);
    let mut terminal =
        OnTerminal::start(real.command(&format!("migrate vm {} {ENDLESS}", there.door)));
    terminal.see("copying");
    terminal.signal(Signal::SIGINT);
    terminal.see("[c]ancel");
    terminal.press("c\n");
    assert_eq!(terminal.end().code(), Some(11));
    assert_eq!(real.show("vm")["state"], "running");
    // In the background it is a job like others.
    let mut number = String::new();
    eventually("memory is sent", || {
        // The other side may still be busy with the end of the attempt before.
        let job = real.run(&format!("job show {number} --json"));
        let job: serde_json::Value = serde_json::from_str(&job.stdout).unwrap_or_default();
        if job[0]["state"] != "running" {
            let line = format!("migrate vm {} {ENDLESS} --no-wait --json", there.door);
            number = real.run(&line).json()["id"].to_string();
        }
        job[0]["migration"]["bytes_sent"].as_u64() > Some(0) && job[0]["state"] == "running"
    });
    real.run(&format!("job cancel {number}")).ok();
    assert_eq!(real.run(&format!("job wait {number}")).status, 11);
    real.run("stop --force vm").ok();
}

#[test]
fn a_move_that_does_not_converge_ends_when_it_may_stop_longer() {
    let real = with_machine();
    let there = Other::start(&real);
    let line = format!("migrate vm {} {ENDLESS} --no-wait --json", there.door);
    let number = real.run(&line).json()["id"].to_string();
    let show = || real.run(&format!("job show {number} --json")).json()[0].take();
    eventually("a round is over", || {
        show()["migration"]["iteration"].as_u64() > Some(1)
    });
    assert_eq!(show()["state"], "running");
    let set = format!("job set {number} --max-downtime 60s");
    assert_eq!(real.run(&set).ok(), "");
    assert_eq!(show()["migration"]["max_downtime_usec"], 60_000_000);
    real.run(&format!("job wait {number}")).ok();
    assert_eq!(show()["result"]["Place"], "destination");
    real.run(&set).failed(5, "moves no machine away");
    real.run("job set 99 --max-downtime 1s").failed(4, "job 99");
    run(godwit(&there.bus(), "stop --force vm")).ok();
}

#[test]
fn a_machine_goes_into_a_folder_and_out_of_it() {
    let real = with_machine();
    let folder = real.path("snapshot");
    let at = folder.display();
    let job = real.run(&format!("snapshot vm {at} --json")).json();
    assert_eq!(job["kind"], "snapshot");
    assert_eq!(job["state"], "done");
    assert_eq!(real.show("vm")["state"], "running");
    real.run(&format!("snapshot vm {at}"))
        .failed(7, "not there yet");
    real.run(&format!("restore {at} --name vm")).failed(5, "vm");
    real.run("stop --force vm").ok();
    let job = real.run(&format!("restore {at} --keep --json")).json();
    assert_eq!(job["kind"], "restore");
    assert_eq!(real.show("vm")["state"], "running");
    real.run("stop --force vm").ok();
    real.run(&format!("restore {at} --keep --paused")).ok();
    assert_eq!(real.show("vm")["state"], "paused");
    real.run("stop --force vm").ok();
    let nothing = real.path("nothing");
    real.run(&format!("restore {}", nothing.display()))
        .failed(7, "is the folder a snapshot?");
}
