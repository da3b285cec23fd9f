//! Real machines under the real broker, with the bundled guest.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use test_guest::{BlkMode, Report, Workload};

use crate::common::real::{Real, eventually};
use crate::common::run;
use crate::common::terminal::OnTerminal;

/// Beats, and uses its memory, until it is told to stop.
fn busy() -> Workload {
    Workload {
        heartbeat: 50,
        span: 4,
        dirty: 10,
        poweroff: true,
        ..Workload::default()
    }
}

fn short() -> Workload {
    Workload {
        poweroff: true,
        ..Workload::default()
    }
}

/// What the guest reported at its end.
#[track_caller]
fn is_well(output: &str) -> bool {
    let ends = output
        .lines()
        .filter_map(|line| match Report::parse(line.trim_end()).unwrap() {
            Some(Report::Done { ok, .. }) => Some(ok),
            Some(Report::Fail { .. }) => Some(false),
            _ => None,
        });
    match ends.collect::<Vec<_>>().last() {
        Some(ok) => *ok,
        None => panic!("the guest did not end: {output}"),
    }
}

#[test]
fn a_first_machine_needs_nothing_but_its_options() {
    let real = Real::new();
    // No broker runs, and the guest is done before a person could attach.
    let output = run(real.guest(&short(), "")).ok();
    assert!(output.starts_with("@first"), "{output}");
    assert!(is_well(&output));
    assert_eq!(real.run("list --json").json(), json!([]));
}

#[test]
fn two_who_start_a_broker_share_it() {
    let real = Real::new();
    let mut first = real.guest(&busy(), "--detach --name a").spawn().unwrap();
    let mut second = real.guest(&busy(), "--detach --name b").spawn().unwrap();
    assert!(first.wait().unwrap().success());
    assert!(second.wait().unwrap().success());
    let list = real.run("list --json").json();
    let names: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["name"])
        .collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn a_disk_process_that_is_killed_under_io_comes_back() {
    let real = Real::new();
    let disk = real.disk("disk", 16);
    let line = format!("--detach --name vm --disk {}", disk.display());
    let workload = Workload {
        blk: BlkMode::Loop,
        ..busy()
    };
    run(real.guest(&workload, &line)).ok();
    eventually("the guest uses its disk", || {
        real.run("logs vm console").stdout.contains("@beat")
    });
    for times in 1..=3 {
        let shown = real.show("vm");
        assert_eq!(shown["devices"][0]["reconnects"], times - 1, "{shown}");
        let process = i32::try_from(shown["devices"][0]["process"].as_i64().unwrap()).unwrap();
        kill(Pid::from_raw(process), Signal::SIGKILL).unwrap();
        eventually("the disk is served again", || {
            let disk = &real.show("vm")["devices"][0];
            disk["reconnects"] == times && disk["state"] == "running"
        });
    }
    let text = real.run("show vm").ok();
    assert!(
        text.contains("disk0: ") && text.contains("SIGKILL"),
        "{text}"
    );
    real.run("device restart vm disk0").ok();
    assert_eq!(
        real.run("device show vm disk0 --json").json()["reconnects"],
        4
    );
    let top = real.run("top --interval 0.3 vm --json").json();
    assert!(top[0]["cpu_percent"].as_f64().unwrap() > 0.0, "{top}");
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or_default();
    let (own, resident) = (&top[1]["own_bytes"], &top[1]["resident_bytes"]);
    assert!(0 < number(own) && number(own) < number(resident), "{top}");
    assert!(number(&top[1]["counters"]["mapped_bytes"]) > 0, "{top}");
    assert!(real.run("logs vm").ok().contains("disk0 | "));

    // Every request was done once: the guest compares all that it wrote.
    let mut person = OnTerminal::start(real.command("console vm"));
    person.see("@beat");
    person.press(test_guest::command::STOP);
    person.see("@done ok=1");
    person.see("vm is off");
    assert!(person.end().success());
}

#[test]
fn the_console_is_left_and_come_back_to() {
    let real = Real::new();
    let mut person = OnTerminal::start(real.guest(&busy(), "--name vm"));
    person.see("vm runs; ^] leaves its console");
    person.see("@beat");
    assert!(person.is_raw());
    person.press("\x1d");
    person.see("vm goes on; godwit console vm comes back");
    assert!(person.end().success());
    assert_eq!(real.show("vm")["state"], "running");

    let mut person = OnTerminal::start(real.command("console vm"));
    // It begins with what was printed lately.
    person.see("@first");
    // There is one who types; others only read.
    let second = real.run("console vm");
    assert_eq!(second.status, 5, "{second:?}");
    person.press(test_guest::command::STOP);
    person.see("vm is off");
    assert!(person.end().success());
}

#[test]
fn a_guest_that_crashes_is_a_machine_that_failed() {
    let real = Real::new();
    let mut person = OnTerminal::start(real.guest(&busy(), "--name vm --keep"));
    person.see("@beat");
    person.press(test_guest::command::TRIPLE);
    person.see("error: vm failed: ");
    person.see("hint: godwit logs");
    assert_eq!(person.end().code(), Some(9));
    assert_eq!(real.show("vm")["state"], "failed");
    real.run("remove vm").ok();
}

#[test]
fn a_machine_that_is_kept_lives_again() {
    let real = Real::new();
    run(real.guest(&busy(), "--detach --keep --name vm --paused")).ok();
    assert_eq!(real.show("vm")["state"], "paused");
    real.run("resume vm").ok();
    real.run("reset vm").ok();
    real.run("pause vm").ok();
    real.run("remove vm").failed(5, "vm");
    real.run("stop --force vm").ok();
    real.run("stop vm").ok();
    assert_eq!(real.show("vm")["state"], "off");
    real.run("start vm").ok();
    assert_eq!(real.show("vm")["state"], "running");
    real.run("stop --force vm").ok();
    real.run("remove vm").ok();
    real.run("show vm").failed(4, "vm");
}

#[test]
fn a_new_broker_takes_over_what_runs() {
    let real = Real::new();
    run(real.guest(&busy(), "--detach --name vm")).ok();
    let before = real.show("vm");
    real.kill_broker();
    real.run("list").failed(3, "hint: godwit run starts one");
    // `start` starts a broker, and the machine is not started twice.
    real.run("start vm").ok();
    let after = real.show("vm");
    assert_eq!(after["process"], before["process"]);
    assert_eq!(after["state"], "running");
    real.run("stop --force vm").ok();
}

#[test]
fn a_definition_file_makes_a_machine_or_says_where_it_is_wrong() {
    let real = Real::new();
    let (disk, file) = (real.disk("d", 1), real.path("web.toml"));
    let kernel = test_guest::program().display();
    let text = format!(
        "kernel = \"{kernel}\"\nmemory = \"64M\"\n\n[[disk]]\npath = \"{}\"\n",
        disk.display()
    );
    std::fs::write(&file, format!("{text}queues = \"many\"\n")).unwrap();
    let line = format!("run --detach {}", file.display());
    let ended = real.run(&line);
    assert!(ended.stderr.contains("6 | queues = \"many\""), "{ended:?}");
    ended.failed(6, "web.toml:6: disk[0].queues");
    std::fs::write(&file, text).unwrap();
    assert_eq!(real.run(&line).ok(), "web\n");
    let shown = real.show("web");
    assert_eq!(shown["devices"][0]["source"], disk.to_str().unwrap());
    assert_eq!(shown["definition"]["vcpus"], 1);
}

#[test]
fn what_cannot_be_had_is_named_and_leaves_nothing() {
    let real = Real::new();
    real.run("run --kernel /nowhere").failed(7, "/nowhere");
    let mut command = real.guest(&short(), "--disk /nowhere/disk");
    command.arg("--detach");
    run(command).failed(7, "/nowhere/disk");
    run(real.guest(&short(), "--cpus 99")).failed(6, "vcpus");
    run(real.guest(&short(), "--name ../x")).failed(6, "../x");
    assert_eq!(real.run("list --json").json(), json!([]));
}

#[test]
fn the_demonstration_shows_what_it_says() {
    let real = Real::new();
    let mut command = real.command("demo");
    command.arg("--kernel").arg(test_guest::program());
    let ended = run(command);
    assert!(ended.stdout.contains("guest: @disk"), "{ended:?}");
    for words in ["kill -9", "took over", "resumed", "nothing of it is left"] {
        assert!(ended.stderr.contains(words), "{words}: {ended:?}");
    }
    ended.ok();
    assert_eq!(real.run("list --json").json(), json!([]));
}
