//! Every verb against a broker of the test's own: statuses, JSON, tables, messages.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use crate::common::fake::Fake;
use crate::common::real::eventually;
use crate::common::{Ended, godwit, run};
use api::job::State as JobState;
use api::machine::State;
use serde_json::json;

fn at(fake: &Fake, line: &str) -> Ended {
    run(godwit(&fake.bus, line))
}

/// A broker with a machine `vm1` that is kept and runs.
fn with_machine() -> Fake {
    let fake = Fake::start();
    at(&fake, "run --kernel /k --keep --detach").ok();
    fake
}

#[test]
fn a_machine_goes_through_its_life() {
    let fake = Fake::start();
    assert_eq!(at(&fake, "run --kernel /k --keep --detach").ok(), "vm1\n");
    assert_eq!(
        at(&fake, "run --kernel /k --detach --name web").ok(),
        "web\n"
    );
    assert_eq!(at(&fake, "run --kernel /k --detach --paused").ok(), "vm2\n");
    let list = at(&fake, "list --no-legend").ok();
    let states: Vec<_> = list
        .lines()
        .map(|line| line.split_whitespace().take(2).collect::<Vec<_>>())
        .collect();
    let expected: [Vec<_>; 3] = [
        vec!["vm1", "running"],
        vec!["vm2", "paused"],
        vec!["web", "running"],
    ];
    assert_eq!(states, expected);
    assert!(at(&fake, "list").ok().ends_with("\n3 machines\n"));
    assert_eq!(
        at(&fake, "list --state paused --no-legend")
            .ok()
            .lines()
            .count(),
        1
    );

    let paused = at(&fake, "pause vm1 web --json").json();
    assert_eq!(paused[1]["name"], "web");
    assert_eq!(paused[1]["state"], "paused");
    at(&fake, "resume vm1").ok();
    at(&fake, "reset vm1").ok();
    at(&fake, "reset web").failed(5, "web is paused");
    at(&fake, "stop --force vm1").ok();
    at(&fake, "stop vm1").ok();
    assert_eq!(fake.state_of("vm1"), Some(State::Off));
    at(&fake, "start vm1").ok();
    at(&fake, "start vm1").ok();
    at(&fake, "remove vm1").failed(5, "vm1 is running");
    at(&fake, "stop -f vm1").ok();
    at(&fake, "remove vm1").ok();
    at(&fake, "show vm1").failed(4, "hint: godwit list");
}

#[test]
fn json_of_a_machine_has_all_in_one_object() {
    let fake = with_machine();
    let shown = at(&fake, "show vm1 --json").json();
    assert_eq!(shown[0]["name"], "vm1");
    assert_eq!(shown[0]["definition"], json!({"kernel": "/k"}));
    assert_eq!(shown[0]["devices"][0]["source"], "/disk.img");
    let short = at(&fake, "list --json=short").ok();
    assert_eq!(short.lines().count(), 1);
    let list: serde_json::Value = serde_json::from_str(&short).unwrap();
    assert_eq!(list[0]["process"], 42);
    assert_eq!(list[0]["devices"][0]["id"], "disk0");
    let devices = at(&fake, "device list vm1 --json").json();
    assert_eq!(devices[0]["statistics"]["requests"], 4321);
    assert_eq!(devices[0]["machine"], "vm1");
    assert_eq!(devices[0]["reconnects"], 0);
    let jobs = at(&fake, "job list --json").json();
    assert_eq!(jobs[0]["kind"], "start");
    assert_eq!(jobs[0]["state"], "done");
    let started = at(&fake, "run --kernel /k --detach --json").json();
    assert_eq!(started["name"], "vm2");
}

#[test]
fn several_machines_are_all_tried() {
    let fake = with_machine();
    let ended = at(&fake, "pause nobody vm1 neither");
    assert_eq!(fake.state_of("vm1"), Some(State::Paused));
    assert!(
        ended.stderr.contains("nobody") && ended.stderr.contains("neither"),
        "{ended:?}"
    );
    ended.failed(4, "2 of 3 failed");
    let ended = at(&fake, "show nobody vm1 --json=short");
    assert!(ended.stdout.contains("vm1"), "{ended:?}");
    assert_eq!(ended.status, 4);
}

#[test]
fn a_name_that_is_taken_is_said_to_be() {
    let fake = with_machine();
    at(&fake, "run --kernel /k --detach --name vm1").failed(5, "vm1 already");
}

#[test]
fn a_failed_start_says_why_and_leaves_nothing() {
    let fake = Fake::start();
    at(&fake, "run --kernel /k --cmdline fail").failed(7, "there is no tap t0");
    assert_eq!(at(&fake, "list --json").json(), json!([]));
    at(&fake, "run --kernel /k --cmdline fail --keep -d").failed(7, "there is no tap t0");
    assert_eq!(fake.state_of("vm1"), Some(State::Off));
    let shown = at(&fake, "job show 1 --json").json();
    assert_eq!(shown[0]["result"]["Message"], "there is no tap t0");
    assert!(
        at(&fake, "job show 1")
            .ok()
            .contains("Message: there is no tap t0")
    );
    let listed = at(&fake, "job list").ok();
    assert!(
        listed.contains("failed  100%  there is no tap t0"),
        "{listed}"
    );
    at(&fake, "job wait 1").failed(7, "there is no tap t0");
    at(&fake, "job show 99").failed(4, "there is no job 99");
}

#[test]
fn a_mistake_in_a_definition_is_shown_with_its_line() {
    let fake = Fake::start();
    let file = fake.path("web.toml");
    std::fs::write(&file, "kernel = \"/k\"\nmemory = \"lots\"\n").unwrap();
    let ended = at(&fake, &format!("run {}", file.display()));
    assert!(ended.stderr.contains("2 | memory = \"lots\""), "{ended:?}");
    ended.failed(6, "web.toml:2: memory");
    std::fs::write(&file, "kernel = \"/k\"\n").unwrap();
    assert_eq!(
        at(&fake, &format!("run -d {}", file.display())).ok(),
        "web\n"
    );
    at(&fake, "run /nowhere.toml").failed(1, "/nowhere.toml cannot be read");
}

#[test]
fn options_reach_the_broker() {
    let fake = Fake::start();
    let mut command = godwit(&fake.bus, "run -d --kernel k --initrd /i --cmdline quiet");
    command.current_dir("/tmp");
    run(command).ok();
    let expected = json!({"kernel": "/tmp/k", "initrd": "/i", "cmdline": "quiet"});
    assert_eq!(fake.definition("vm1"), expected);
}

#[test]
fn devices_are_listed_shown_and_restarted() {
    let fake = with_machine();
    at(&fake, "device restart vm1 disk0").ok();
    let shown = at(&fake, "device show vm1 disk0 --json").json();
    assert_eq!(shown["reconnects"], 1);
    assert!(
        at(&fake, "device show vm1 disk0")
            .ok()
            .contains("Reconnects: 1")
    );
    assert!(at(&fake, "show vm1").ok().contains("disk0"));
    at(&fake, "device show vm1 disk9").failed(4, "vm1 has no device disk9: there are disk0");
    at(&fake, "device restart vm1 disk9").failed(4, "disk9");
    let job = at(&fake, "device restart vm1 disk0 --json").json();
    assert_eq!(job["kind"], "restart-device");
}

#[test]
fn a_job_can_be_left_awaited_and_cancelled() {
    let fake = with_machine();
    // Its guest does not listen to the power button.
    at(&fake, "stop vm1 --timeout 0").failed(10, "godwit job wait 2");
    let job = at(&fake, "stop vm1 --no-wait --json").json();
    assert_eq!(
        (&job[0]["id"], &job[0]["state"]),
        (&json!(3), &json!("running"))
    );
    at(&fake, "job cancel 2").ok();
    at(&fake, "job wait 2").failed(11, "was cancelled");
    at(&fake, "job wait 3 --timeout 0").failed(10, "job 3");
    fake.end_job(3, JobState::Done);
    at(&fake, "job wait 3").ok();
    assert!(at(&fake, "job list").ok().ends_with("\n3 jobs\n"));
}

/// Waits until a job has joined the one that the machine came with.
fn await_two_jobs(fake: &Fake) {
    eventually("the job is there", || {
        let jobs = at(fake, "job list --json").json();
        jobs.as_array().unwrap().len() == 2
    });
}

#[test]
fn a_job_is_awaited_until_it_ends() {
    let fake = with_machine();
    let mut waiting = godwit(&fake.bus, "stop vm1").spawn().unwrap();
    await_two_jobs(&fake);
    assert!(waiting.try_wait().unwrap().is_none());
    fake.end_job(2, JobState::Done);
    assert!(waiting.wait().unwrap().success());
}

#[test]
fn a_job_that_changes_faster_than_it_is_read_is_awaited_too() {
    let fake = with_machine();
    let waiting = godwit(&fake.bus, "stop vm1").stderr(Stdio::piped()).spawn();
    let waiting = waiting.unwrap();
    await_two_jobs(&fake);
    // Many times what a connection keeps, and less than the bus keeps for a client.
    fake.hurry(2, 600);
    fake.end_job(2, JobState::Done);
    let ended = waiting.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{said}");
}

#[test]
fn logs_name_their_sources_when_there_are_several() {
    let fake = with_machine();
    let expected = "core  | first of core\ncore  | second of core\n\
                    disk0 | first of disk0\ndisk0 | second of disk0\n";
    assert_eq!(at(&fake, "logs vm1").ok(), expected);
    assert_eq!(
        at(&fake, "logs vm1 disk0").ok(),
        "first of disk0\nsecond of disk0\n"
    );
    let json = at(&fake, "logs vm1 disk0 --json=short").ok();
    assert_eq!(
        json.lines().next().unwrap(),
        r#"{"source":"disk0","line":"first of disk0"}"#
    );
    at(&fake, "logs vm1 nothing").failed(6, "nothing has no log");
}

#[test]
fn top_prints_once_where_nobody_looks() {
    let fake = with_machine();
    let rows = at(&fake, "top --interval 0.1 --json").json();
    assert_eq!(rows[0]["kind"], "core");
    assert_eq!(rows[1]["device"], "disk0");
    assert!(
        at(&fake, "top -i 0.1 vm1")
            .ok()
            .ends_with("\n2 processes\n")
    );
    at(&fake, "top -i 0.1 nobody").failed(4, "nobody");
}

#[test]
fn what_is_not_allowed_is_denied() {
    let fake = Fake::start();
    at(&fake, "reload").failed(8, "you may not reload");
}

#[test]
fn without_a_broker_it_says_how_to_get_one() {
    let folder = tempfile::TempDir::new().unwrap();
    let bus = folder.path().join("bus");
    for line in [
        "list",
        "show vm1",
        "stop vm1",
        "console vm1",
        "job list",
        "top",
    ] {
        run(godwit(&bus, line)).failed(3, "hint: godwit run starts one");
    }
    run(godwit(&folder.path().join("other"), "run --kernel /k")).failed(3, "is named bus");
    run(godwit(std::path::Path::new("nonsense"), "list")).failed(2, "is no D-Bus address");
}

#[test]
fn the_variable_names_the_broker_and_the_option_goes_before_it() {
    let fake = with_machine();
    let other = Fake::start();
    let list = |variable: &Fake, option: Option<&Fake>| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_godwit"));
        command.args(["list", "--json"]);
        let address = format!("unix:path={}", variable.bus.display());
        command.env("GODWIT_BUS", address);
        if let Some(option) = option {
            command.arg("--bus").arg(&option.bus);
        }
        run(command).json().as_array().unwrap().len()
    };
    assert_eq!(list(&fake, None), 1);
    assert_eq!(list(&fake, Some(&other)), 0);
    assert_eq!(list(&other, Some(&fake)), 1);
}

#[test]
fn a_broker_that_does_not_start_is_quoted() {
    // A copy of the program beside which there is a broker that only complains.
    let folder = tempfile::TempDir::new().unwrap();
    let program = folder.path().join("godwit");
    std::fs::copy(env!("CARGO_BIN_EXE_godwit"), &program).unwrap();
    let start = || {
        let mut command = std::process::Command::new(&program);
        let bus = folder.path().join("run/bus");
        command.args(["--bus".as_ref(), bus.as_os_str()]);
        command.args(["run", "--kernel", "/k"]).env("PATH", "");
        run(command)
    };
    start().failed(
        3,
        "godwit-broker is neither beside this program nor in PATH",
    );
    let broker = folder.path().join("godwit-broker");
    std::fs::write(&broker, "#!/bin/sh\necho no KVM for $1 $2 >&2\nexit 1\n").unwrap();
    std::fs::set_permissions(&broker, std::fs::Permissions::from_mode(0o755)).unwrap();
    let ended = start();
    assert!(
        ended.stderr.contains("no KVM for --embedded --runtime-dir"),
        "{ended:?}"
    );
    ended.failed(3, "did not start");
}

#[test]
fn a_wrong_command_line_is_status_2() {
    let folder = tempfile::TempDir::new().unwrap();
    for line in ["frobnicate", "run", "run --kernel k --net lan"] {
        assert_eq!(run(godwit(folder.path(), line)).status, 2, "{line}");
    }
}

#[test]
fn completions_and_man_pages_need_no_broker() {
    let folder = tempfile::TempDir::new().unwrap();
    let script = run(godwit(&folder.path().join("bus"), "completions bash")).ok();
    assert!(
        script.contains("complete") && script.contains("godwit"),
        "{script}"
    );
    let pages = folder.path().join("man");
    run(godwit(
        &folder.path().join("bus"),
        &format!("man {}", pages.display()),
    ))
    .ok();
    assert!(pages.join("godwit-run.1").is_file());
}
