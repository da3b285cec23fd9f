//! Objects of the broker as text and tables for a person.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api::job::RESULT_MESSAGE;
use migration::picture;
use serde_json::Value;

use super::{Column, table};
use crate::connection::Counters;
use crate::value::Size;
use crate::view::{Balloon, Device, Job, Machine};

/// Width of the names before values.
const LABEL: usize = 11;

/// A list of machines.
pub fn machines(machines: &[Machine], legend: bool) -> String {
    let columns = [
        Column::Left("NAME"),
        Column::Left("STATE"),
        Column::Right("VCPUS"),
        Column::Right("MEMORY"),
        Column::Right("DEVICES"),
        Column::Right("PID"),
        Column::Left("UP"),
    ];
    let row = |machine: &Machine| {
        vec![
            machine.name.clone(),
            machine.state.clone(),
            machine.vcpus.to_string(),
            Size(machine.memory).to_string(),
            machine.devices.len().to_string(),
            number(machine.process),
            machine.started_usec.map(since).unwrap_or_default(),
        ]
    };
    table(legend, &columns, machines.iter().map(row), "machine")
}

/// One machine with all it has.
pub fn machine(machine: &Machine, definition: &Value) -> String {
    let mut text = format!("{} ({})\n", machine.name, machine.uuid);
    let mut line = |label: &str, value: String| {
        if !value.is_empty() {
            text.push_str(&format!("  {label:>LABEL$}: {value}\n"));
        }
    };
    line("State", machine.state.clone());
    line("Reason", machine.reason.clone());
    line("Up", machine.started_usec.map(since).unwrap_or_default());
    line("vCPUs", machine.vcpus.to_string());
    line("CPU", definition["cpu"].as_str().unwrap_or_default().into());
    line("Memory", Size(machine.memory).to_string());
    for key in ["kernel", "initrd", "cmdline", "firmware"] {
        let value = definition[key].as_str().unwrap_or_default();
        let label = key[..1].to_uppercase() + &key[1..];
        line(&label, value.to_owned());
    }
    line("Process", number(machine.process));
    line("Unit", machine.unit.clone().unwrap_or_default());
    line("Job", number(machine.job));
    let kept = if machine.transient {
        "forgotten when it ends"
    } else if machine.autostart {
        "started with the broker"
    } else {
        "kept"
    };
    line("Life", kept.into());
    if !machine.devices.is_empty() {
        text.push('\n');
        let table = devices(machine.devices.iter().map(DeviceLine::plain), true);
        for line in table.lines().take(machine.devices.len() + 1) {
            text.push_str(&format!("  {line}\n"));
        }
        for device in machine
            .devices
            .iter()
            .filter(|device| !device.reason.is_empty())
        {
            text.push_str(&format!("  {}: {}\n", device.id, device.reason));
        }
    }
    text
}

/// A device in a list.
pub struct DeviceLine<'a> {
    /// Its machine, where that is not known anyway.
    pub machine: Option<&'a str>,
    pub device: &'a Device,
    /// Requests that its process has answered, where somebody asked.
    pub requests: Option<u64>,
}

impl<'a> DeviceLine<'a> {
    fn plain(device: &'a Device) -> Self {
        Self {
            machine: None,
            device,
            requests: None,
        }
    }
}

/// A list of devices, with their machines and requests where they are given.
pub fn devices<'a>(devices: impl IntoIterator<Item = DeviceLine<'a>>, legend: bool) -> String {
    let devices: Vec<_> = devices.into_iter().collect();
    let with_machine = devices.iter().any(|line| line.machine.is_some());
    let with_requests = devices.iter().any(|line| line.requests.is_some());
    let mut columns = vec![
        Column::Left("DEVICE"),
        Column::Left("KIND"),
        Column::Left("STATE"),
        Column::Right("PID"),
        Column::Right("RECONNECTS"),
        Column::Left("SOURCE"),
    ];
    if with_requests {
        columns.insert(5, Column::Right("REQUESTS"));
    }
    if with_machine {
        columns.insert(0, Column::Left("MACHINE"));
    }
    let row = |line: DeviceLine<'_>| {
        let device = line.device;
        let mut row = vec![
            device.id.clone(),
            device.kind.clone(),
            device.state.clone(),
            number(device.process),
            device.reconnects.to_string(),
            device.source.clone(),
        ];
        if with_requests {
            row.insert(5, line.requests.map(|n| n.to_string()).unwrap_or_default());
        }
        if with_machine {
            row.insert(0, line.machine.unwrap_or_default().into());
        }
        row
    };
    table(legend, &columns, devices.into_iter().map(row), "device")
}

/// One device, and what its process counts.
pub fn device(machine: &str, device: &Device, counters: &Counters) -> String {
    let mut text = format!("{machine}/{}\n", device.id);
    let lines = [
        ("Kind", device.kind.clone()),
        ("State", device.state.clone()),
        ("Reason", device.reason.clone()),
        ("Source", device.source.clone()),
        ("Reconnects", device.reconnects.to_string()),
        ("Process", number(device.process)),
        ("Unit", device.unit.clone().unwrap_or_default()),
    ];
    for (label, value) in lines {
        if !value.is_empty() {
            text.push_str(&format!("  {label:>LABEL$}: {value}\n"));
        }
    }
    let width = counters.keys().map(String::len).max().unwrap_or_default();
    for (at, (name, count)) in counters.iter().enumerate() {
        let gap = if at == 0 { "\n" } else { "" };
        text.push_str(&format!("{gap}  {name:>width$}: {count}\n"));
    }
    text
}

/// A memory balloon.
pub fn balloon(balloon: &Balloon) -> String {
    let mut text = format!("{}/{}\n", balloon.machine, balloon.device);
    for (label, bytes) in [
        ("Target", balloon.target_bytes),
        ("Actual", balloon.actual_bytes),
    ] {
        text.push_str(&format!("  {label:>LABEL$}: {}\n", Size(bytes)));
    }
    let asked = match balloon.statistics_interval_s {
        0 => "never".to_owned(),
        seconds => format!("every {seconds} s"),
    };
    text.push_str(&format!("  {:>LABEL$}: {asked}\n", "Asked"));
    let width = balloon
        .guest
        .keys()
        .map(String::len)
        .max()
        .unwrap_or_default();
    for (at, (name, count)) in balloon.guest.iter().enumerate() {
        let gap = if at == 0 { "\n" } else { "" };
        text.push_str(&format!("{gap}  {name:>width$}: {count}\n"));
    }
    text
}

/// A list of jobs.
pub fn jobs(jobs: &[Job], legend: bool) -> String {
    let columns = [
        Column::Right("JOB"),
        Column::Left("KIND"),
        Column::Left("MACHINE"),
        Column::Left("STATE"),
        Column::Right("DONE"),
        Column::Left("DETAIL"),
    ];
    let row = |job: &Job| {
        vec![
            job.id.to_string(),
            job.kind.clone(),
            job.machine.clone(),
            job.state.clone(),
            percent(job.progress),
            match job.is_running() {
                true => job.phase.clone(),
                false => job.result_text(RESULT_MESSAGE),
            },
        ]
    };
    table(legend, &columns, jobs.iter().map(row), "job")
}

/// Columns of the picture of a blackout.
const PICTURE: usize = 40;

/// One job with its result.
pub fn job(job: &Job) -> String {
    let mut text = format!("job {}: {} of {}\n", job.id, job.kind, job.machine);
    let mut line = |label: &str, value: &str| {
        if !value.is_empty() {
            text.push_str(&format!("  {label:>LABEL$}: {value}\n"));
        }
    };
    line("State", &job.state);
    line("Phase", &job.phase);
    line("Done", &percent(job.progress));
    if job.is_running() {
        line("Cancellable", if job.cancellable { "yes" } else { "no" });
    }
    for (key, value) in &job.result {
        let value = value.as_str().map_or_else(|| value.to_string(), Into::into);
        line(key, &value);
    }
    if let Some(migration) = &job.migration {
        line("To", &migration.facts.uri);
        line("Sent", &mebibytes(migration.facts.bytes_sent));
        line("Left", &mebibytes(migration.facts.bytes_remaining));
        line("Rounds", &migration.facts.iteration.to_string());
        line(
            "Rate",
            &format!("{}/s", mebibytes(migration.facts.link_rate)),
        );
        line(
            "Dirty rate",
            &format!("{}/s", mebibytes(migration.facts.dirty_rate)),
        );
        if let Some(report) = migration.report() {
            text.push('\n');
            text.push_str(&picture::text(&report, PICTURE));
        }
    }
    text
}

fn number(value: Option<u32>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

fn mebibytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown to a person")]
    let mebibytes = bytes as f64 / f64::from(1 << 20);
    format!("{mebibytes:.1} MiB")
}

fn percent(part: f64) -> String {
    format!("{:.0}%", part.clamp(0.0, 1.0) * 100.0)
}

/// How long ago this moment was.
fn since(usec: u64) -> String {
    let then = UNIX_EPOCH + Duration::from_micros(usec);
    duration(SystemTime::now().duration_since(then).unwrap_or_default())
}

/// A duration by its two largest units.
fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let units = [(86400, "d"), (3600, "h"), (60, "min"), (1, "s")];
    let first = units
        .iter()
        .position(|(unit, _)| seconds >= *unit)
        .unwrap_or(3);
    let mut text = Vec::new();
    let mut rest = seconds;
    for (unit, name) in &units[first..units.len().min(first + 2)] {
        if rest / unit > 0 || text.is_empty() {
            text.push(format!("{}{name}", rest / unit));
        }
        rest %= unit;
    }
    text.join("")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::tests::{a_machine, device as a_device};

    #[test]
    fn a_machine_in_a_list() {
        let text = machines(&[a_machine()], false);
        let words: Vec<_> = text.split_whitespace().collect();
        assert_eq!(words[..6], ["vm1", "running", "2", "1G", "1", "42"]);
    }

    #[test]
    fn a_machine_with_all_it_has() {
        let mut shown = a_machine();
        shown.started_usec = None;
        shown.devices[0].reason = "killed by SIGKILL".into();
        let definition = serde_json::json!({"kernel": "/k", "cmdline": "quiet"});
        let text = machine(&shown, &definition);
        assert_eq!(
            text,
            "vm1 (u-u)
        State: running
        vCPUs: 2
       Memory: 1G
       Kernel: /k
      Cmdline: quiet
      Process: 42
          Job: 3
         Life: forgotten when it ends

  DEVICE  KIND  STATE    PID  RECONNECTS  SOURCE
  disk0   blk   running   43           1  /disk.img
  disk0: killed by SIGKILL
"
        );
    }

    #[test]
    fn devices_name_their_machine_when_there_are_several() {
        let shown = a_device();
        let text = devices(
            [DeviceLine {
                machine: Some("vm1"),
                requests: Some(77),
                ..DeviceLine::plain(&shown)
            }],
            true,
        );
        assert!(text.starts_with("MACHINE  DEVICE"), "{text}");
        let words: Vec<_> = text.split_whitespace().collect();
        assert_eq!(words[6..8], ["REQUESTS", "SOURCE"], "{text}");
        assert_eq!(words[14], "77", "{text}");
        let text = devices([DeviceLine::plain(&shown)], true);
        assert!(text.starts_with("DEVICE"), "{text}");
    }

    #[test]
    fn a_failed_job_says_why() {
        let shown = Job {
            id: 3,
            kind: "start".into(),
            machine: "vm1".into(),
            state: "failed".into(),
            phase: String::new(),
            progress: 0.25,
            cancellable: false,
            result: serde_json::from_str(r#"{"Error": "E", "Message": "no tap"}"#).unwrap(),
            migration: None,
        };
        let text = job(&shown);
        assert!(text.starts_with("job 3: start of vm1\n"), "{text}");
        assert!(
            text.contains("Done: 25%") && text.contains("Message: no tap"),
            "{text}"
        );
        assert!(!text.contains("Cancellable"), "{text}");
    }

    #[test]
    fn durations_have_two_units() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1min"),
            (3661, "1h1min"),
            (3605, "1h"),
            (90000, "1d1h"),
        ] {
            assert_eq!(duration(Duration::from_secs(seconds)), text);
        }
    }
}
