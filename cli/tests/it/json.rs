//! Every verb with `--json`, the forms that programs read: a verb that is not walked here fails.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;
use test_guest::{BlkMode, Workload};

use crate::common::fake::Fake;
use crate::common::real::{Other, Real};
use crate::common::{Ended, godwit, run};

/// What a verb prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// One object.
    Object,
    /// An array of objects, with something in it.
    Array,
    /// An object on each line.
    Lines,
    /// Something for a person, a shell or a console: JSON is refused.
    Nothing,
}
use Form::{Array, Lines, Nothing, Object};

/// A guest that neither listens to the power button nor ever ends, and hurries.
fn workload() -> Workload {
    Workload {
        heartbeat: 50,
        blk: BlkMode::Loop,
        span: 4,
        dirty: 0,
        ..Workload::default()
    }
}

/// All verbs, as their man pages have them: `godwit job list` is `job-list`.
fn verbs() -> BTreeSet<String> {
    let folder = tempfile::TempDir::new().unwrap();
    let line = format!("man {}", folder.path().display());
    run(godwit(folder.path(), &line)).ok();
    let names = fs::read_dir(folder.path()).unwrap().map(|page| {
        let name = page.unwrap().file_name().into_string().unwrap();
        let name = name.trim_start_matches("godwit").trim_start_matches('-');
        name.trim_end_matches(".1").to_owned()
    });
    let names: BTreeSet<_> = names.filter(|name| !name.is_empty()).collect();
    let is_group = |name: &String| names.iter().any(|it| it.starts_with(&format!("{name}-")));
    names
        .iter()
        .filter(|name| !is_group(name))
        .cloned()
        .collect()
}

/// It printed this form, and what it printed.
#[track_caller]
fn has_form(line: &str, form: Form, ended: Ended) -> Value {
    if form == Nothing {
        assert_eq!(ended.stdout, "", "{line}");
        ended.failed(2, "no JSON");
        return Value::Null;
    }
    let text = ended.ok();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    let values: Vec<Value> = lines.collect();
    match (form, values.as_slice()) {
        (Object, [Value::Object(_)]) => values[0].clone(),
        (Array, [Value::Array(all)]) if !all.is_empty() && all.iter().all(Value::is_object) => {
            values[0].clone()
        }
        (Lines, [_, ..]) if values.iter().all(Value::is_object) => Value::Null,
        _ => panic!("{line} printed no {form:?} but {text}"),
    }
}

#[test]
fn every_verb_prints_json_or_says_that_it_has_none() {
    let mut left = verbs();
    let mut walk = |verb: &str, form, ended| {
        left.remove(verb);
        has_form(verb, form, ended)
    };
    let real = Real::new();
    let (disk, snapshot) = (real.disk("disk", 16), real.path("snapshot"));
    let (kernel, folder) = (test_guest::program().display(), snapshot.display());
    let short = |line: &str| real.run(&format!("{line} --json=short"));

    for verb in ["completions bash", "console vm", "demo", "man /nowhere"] {
        let name = verb.split(' ').next().unwrap();
        walk(name, Nothing, short(verb));
    }
    has_form("run", Nothing, short(&format!("run --kernel {kernel}")));
    let line = format!(
        "--detach --keep --name vm --balloon --disk {} --json=short",
        disk.display()
    );
    walk("run", Object, run(real.guest(&workload(), &line)));
    for (verb, form, line) in [
        ("list", Array, "list"),
        ("show", Array, "show vm"),
        ("pause", Array, "pause vm"),
        ("resume", Array, "resume vm"),
        ("reset", Array, "reset vm"),
        ("device-list", Array, "device list"),
        ("device-show", Object, "device show vm disk0"),
        ("device-restart", Object, "device restart vm disk0"),
        ("balloon", Object, "balloon vm 8M"),
        ("logs", Lines, "logs vm console"),
        ("top", Array, "top --interval 0.1"),
        ("reload", Array, "reload"),
    ] {
        walk(verb, form, short(line));
    }

    let other = Other::start(&real);
    let line = format!(
        "migrate vm {} --max-downtime 1ms --patience 600 --max-bandwidth 1M --no-wait",
        other.door
    );
    let number = walk("migrate", Object, short(&line))["id"].clone();
    walk("job-list", Array, short("job list"));
    let line = format!("job set {number} --max-downtime 2ms");
    let set = walk("job-set", Object, short(&line));
    assert_eq!(set["migration"]["max_downtime_usec"], 2000);
    for verb in ["show", "cancel"] {
        let line = format!("job {verb} {number}");
        walk(&format!("job-{verb}"), Array, short(&line));
    }
    assert_eq!(real.run(&format!("job wait {number}")).status, 11);

    let line = format!("snapshot vm {folder}");
    let number = walk("snapshot", Object, short(&line))["id"].clone();
    walk("job-wait", Array, short(&format!("job wait {number}")));
    walk("stop", Array, short("stop --force vm"));
    walk("start", Array, short("start vm"));
    short("stop --force vm").ok();
    let removed = walk("remove", Array, short("remove vm"));
    assert_eq!(removed[0]["name"], "vm");
    let line = format!("restore {folder} --paused");
    walk("restore", Object, short(&line));
    real.run("stop --force vm").ok();

    // A machine of which nobody knows where it is, is for a broker of the test's own.
    let fake = Fake::start();
    run(godwit(&fake.bus, "run --kernel /k --detach --paused")).ok();
    let decided = run(godwit(&fake.bus, "decide vm1 --here --json=short"));
    assert_eq!(walk("decide", Object, decided)["state"], "running");
    run(godwit(&fake.bus, "pause vm1")).ok();
    let decided = run(godwit(&fake.bus, "decide vm1 --there --json=short"));
    assert_eq!(walk("decide", Object, decided)["name"], "vm1");

    assert!(left.is_empty(), "nobody knows what these print: {left:?}");
}
