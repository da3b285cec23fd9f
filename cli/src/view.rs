//! What the broker's objects are at one moment, read from their properties.
//!
//! These types are also the JSON forms: fields are only ever added. Numbers are numbers, times
//! are microseconds since 1970, sizes are bytes, and what there is not is `null` or empty.

use api::job_migration::{Facts, Place};
use api::{Dictionary, Error};
use migration::report::Report;
use serde::Serialize;
use serde_json::{Map, Value};
use zbus::{OwnedObjectPath, OwnedVariant, Variant};

use crate::connection::Counters;

/// A machine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    pub name: String,
    pub state: String,
    /// Why it is in this state, or empty.
    pub reason: String,
    pub uuid: String,
    pub vcpus: u32,
    pub memory: u64,
    pub started_usec: Option<u64>,
    pub transient: bool,
    pub autostart: bool,
    /// Process of its core.
    pub process: Option<u32>,
    /// systemd unit of its core.
    pub unit: Option<String>,
    /// Number of the job that works on it.
    pub job: Option<u32>,
    /// Its devices by order of their names.
    pub devices: Vec<Device>,
}

/// A memory balloon.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Balloon {
    pub machine: String,
    pub device: String,
    /// Bytes that the host wants.
    pub target_bytes: u64,
    /// Bytes that the guest has given.
    pub actual_bytes: u64,
    /// Seconds between two questions for what the guest says; 0: none is asked.
    pub statistics_interval_s: u32,
    /// What the guest says of its memory.
    pub guest: Counters,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Device {
    pub id: String,
    pub kind: String,
    pub state: String,
    /// Why it was restarted or failed last, or empty.
    pub reason: String,
    pub source: String,
    /// How many times a new process took over.
    pub reconnects: u32,
    pub process: Option<u32>,
    pub unit: Option<String>,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Job {
    pub id: u32,
    pub kind: String,
    pub machine: String,
    pub state: String,
    pub phase: String,
    /// From 0 to 1.
    pub progress: f64,
    pub cancellable: bool,
    /// What came of it; empty while it works.
    pub result: Map<String, Value>,
    /// How its machine moves, if it does.
    pub migration: Option<Migration>,
}

/// How a machine moves.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Migration {
    #[serde(flatten)]
    pub facts: Facts,
    /// All that was measured; `null` before the end.
    pub report: Value,
}

impl Machine {
    /// Of the properties of a machine; devices are added by who has them.
    ///
    /// # Errors
    /// A property is missing or of another type.
    pub fn read(properties: &Dictionary) -> Result<Self, Error> {
        let from = Properties(properties);
        Ok(Self {
            name: from.text("Name")?,
            state: from.text("State")?,
            reason: from.text("Reason")?,
            uuid: from.text("UUID")?,
            vcpus: from.number("Vcpus")?,
            memory: from.long("Memory")?,
            started_usec: Some(from.long("StartedUSec")?).filter(|&time| time != 0),
            transient: from.flag("Transient")?,
            autostart: from.flag("Autostart")?,
            process: Some(from.number("Process")?).filter(|&id| id != 0),
            unit: Some(from.text("Unit")?).filter(|unit| !unit.is_empty()),
            job: job_number(&from.path("Job")?),
            devices: Vec::new(),
        })
    }
}

impl Device {
    /// Of the properties of a device.
    ///
    /// # Errors
    /// A property is missing or of another type.
    pub fn read(properties: &Dictionary) -> Result<Self, Error> {
        let from = Properties(properties);
        Ok(Self {
            id: from.text("Id")?,
            kind: from.text("Kind")?,
            state: from.text("State")?,
            reason: from.text("Reason")?,
            source: from.text("Source")?,
            reconnects: from.number("Reconnects")?,
            process: Some(from.number("Process")?).filter(|&id| id != 0),
            unit: Some(from.text("Unit")?).filter(|unit| !unit.is_empty()),
        })
    }
}

impl Migration {
    /// Of the properties of a job that moves a machine.
    ///
    /// # Errors
    /// A property is missing or of another type.
    pub fn read(properties: &Dictionary) -> Result<Self, Error> {
        let from = Properties(properties);
        let report = from.text("Report")?;
        let place = |value| Place::of_word(<&str>::try_from(value).ok()?);
        let facts = Facts {
            uri: from.text("URI")?,
            place: from.get("Place", place)?,
            bytes_sent: from.long("BytesSent")?,
            bytes_remaining: from.long("BytesRemaining")?,
            dirty_rate: from.long("DirtyRate")?,
            link_rate: from.long("LinkRate")?,
            iteration: from.long("Iteration")?,
            max_downtime_usec: from.long("MaxDowntimeUSec")?,
            predicted_downtime_usec: from.long("PredictedDowntimeUSec")?,
            downtime_usec: from.long("DowntimeUSec")?,
            throttle: from.number("Throttle")?,
            ..Facts::default()
        };
        Ok(Self {
            facts,
            report: serde_json::from_str(&report).unwrap_or_default(),
        })
    }

    /// What was measured, if the machine was stopped.
    pub fn report(&self) -> Option<Report> {
        let report: Report = serde_json::from_value(self.report.clone()).ok()?;
        (report.blackout_us > 0).then_some(report)
    }
}

impl Job {
    /// Of the properties of a job.
    ///
    /// # Errors
    /// A property is missing or of another type.
    pub fn read(properties: &Dictionary) -> Result<Self, Error> {
        let from = Properties(properties);
        let result = properties.get("Result").map(|value| json(value));
        Ok(Self {
            id: from.number("Id")?,
            kind: from.text("Kind")?,
            machine: from.text("Machine")?,
            state: from.text("State")?,
            phase: from.text("Phase")?,
            progress: from.get("Progress", |value| f64::try_from(value).ok())?,
            cancellable: from.flag("Cancellable")?,
            result: match result {
                Some(Value::Object(result)) => result,
                _ => Map::new(),
            },
            migration: None,
        })
    }

    /// Whether it works still.
    pub fn is_running(&self) -> bool {
        self.state == api::job::State::Running.as_str()
    }

    /// A text of its result, or nothing.
    pub fn result_text(&self, key: &str) -> String {
        let text = self.result.get(key).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    }
}

/// The number of the job at this path; none at `/`.
fn job_number(path: &OwnedObjectPath) -> Option<u32> {
    path.as_str().rsplit('/').next()?.parse().ok()
}

/// Properties that are looked up and checked.
struct Properties<'a>(&'a Dictionary);

impl<'a> Properties<'a> {
    fn get<T>(
        &self,
        name: &str,
        convert: impl FnOnce(&'a OwnedVariant) -> Option<T>,
    ) -> Result<T, Error> {
        let value = self.0.get(name).and_then(convert);
        value.ok_or_else(|| {
            Error::Internal(format!(
                "the broker's property {name} is missing or of another type"
            ))
        })
    }

    fn text(&self, name: &str) -> Result<String, Error> {
        self.get(name, |value| <&str>::try_from(value).ok().map(Into::into))
    }

    fn number(&self, name: &str) -> Result<u32, Error> {
        self.get(name, |value| u32::try_from(value).ok())
    }

    fn long(&self, name: &str) -> Result<u64, Error> {
        self.get(name, |value| u64::try_from(value).ok())
    }

    fn flag(&self, name: &str) -> Result<bool, Error> {
        self.get(name, |value| bool::try_from(value).ok())
    }

    fn path(&self, name: &str) -> Result<OwnedObjectPath, Error> {
        self.get(name, |value| {
            let path = <&zbus::ObjectPath<'_>>::try_from(value).ok()?;
            Some(path.to_owned().into())
        })
    }
}

/// Any D-Bus value as JSON: dictionaries are objects, structures are arrays.
pub fn json(value: &Variant<'_>) -> Value {
    match value {
        Variant::U8(number) => (*number).into(),
        Variant::Bool(flag) => (*flag).into(),
        Variant::I16(number) => (*number).into(),
        Variant::U16(number) => (*number).into(),
        Variant::I32(number) => (*number).into(),
        Variant::U32(number) => (*number).into(),
        Variant::I64(number) => (*number).into(),
        Variant::U64(number) => (*number).into(),
        Variant::F64(number) => (*number).into(),
        Variant::Str(text) => text.as_str().into(),
        Variant::Signature(signature) => signature.to_string().into(),
        Variant::ObjectPath(path) => path.as_str().into(),
        Variant::Variant(inner) => json(inner),
        Variant::Array(array) => array.inner().iter().map(json).collect(),
        Variant::Dict(dict) => {
            let pair = |(key, value): (&Variant<'_>, &Variant<'_>)| {
                let key = match json(key) {
                    Value::String(text) => text,
                    other => other.to_string(),
                };
                (key, json(value))
            };
            Value::Object(dict.iter().map(pair).collect())
        }
        Variant::Structure(structure) => structure.fields().iter().map(json).collect(),
        // A descriptor is nothing outside this process.
        Variant::Fd(_) => Value::Null,
    }
}

/// A dictionary as JSON.
pub fn json_object(dictionary: &Dictionary) -> Value {
    let pair = |(key, value): (&String, &OwnedVariant)| (key.clone(), json(value));
    Value::Object(dictionary.iter().map(pair).collect())
}

#[cfg(test)]
pub mod tests {
    use std::collections::HashMap;

    use super::*;

    fn owned<'a>(value: impl Into<Variant<'a>>) -> OwnedVariant {
        value.into().try_into_owned().unwrap()
    }

    fn properties(pairs: Vec<(&str, OwnedVariant)>) -> Dictionary {
        pairs.into_iter().map(|(k, v)| (k.into(), v)).collect()
    }

    fn machine() -> Dictionary {
        properties(vec![
            ("Name", owned("vm1")),
            ("State", owned("running")),
            ("Reason", owned("")),
            ("UUID", owned("u-u")),
            ("Vcpus", owned(2u32)),
            ("Memory", owned(1u64 << 30)),
            ("StartedUSec", owned(7u64)),
            ("Transient", owned(true)),
            ("Autostart", owned(false)),
            ("Process", owned(42u32)),
            ("Unit", owned("")),
            (
                "Job",
                owned(zbus::ObjectPath::try_from("/org/godwit/Vmm1/job/3").unwrap()),
            ),
        ])
    }

    /// A device for the tests of what shows it.
    pub fn device() -> Device {
        Device {
            id: "disk0".into(),
            kind: "blk".into(),
            state: "running".into(),
            reason: String::new(),
            source: "/disk.img".into(),
            reconnects: 1,
            process: Some(43),
            unit: None,
        }
    }

    /// A machine for the tests of what shows it.
    pub fn a_machine() -> Machine {
        let mut view = Machine::read(&machine()).unwrap();
        view.devices.push(device());
        view
    }

    #[test]
    fn the_json_of_a_machine_is_stable() {
        let expected = serde_json::json!({
            "name": "vm1", "state": "running", "reason": "", "uuid": "u-u", "vcpus": 2,
            "memory": 1u64 << 30, "started_usec": 7, "transient": true, "autostart": false,
            "process": 42, "unit": null, "job": 3,
            "devices": [{
                "id": "disk0", "kind": "blk", "state": "running", "reason": "",
                "source": "/disk.img", "reconnects": 1, "process": 43, "unit": null,
            }],
        });
        assert_eq!(serde_json::to_value(a_machine()).unwrap(), expected);
    }

    #[test]
    fn the_json_of_a_job_is_stable() {
        let result = HashMap::from([
            ("Message", Variant::new("oh")),
            ("Error", Variant::new("E")),
        ]);
        let job = Job::read(&properties(vec![
            ("Id", owned(3u32)),
            ("Kind", owned("start")),
            ("Machine", owned("vm1")),
            ("State", owned("failed")),
            ("Phase", owned("")),
            ("Progress", owned(0.5)),
            ("Cancellable", owned(false)),
            ("Result", owned(result)),
        ]));
        let job = job.unwrap();
        assert_eq!(job.result_text("Message"), "oh");
        let expected = serde_json::json!({
            "id": 3, "kind": "start", "machine": "vm1", "state": "failed", "phase": "",
            "progress": 0.5, "cancellable": false, "result": {"Message": "oh", "Error": "E"},
            "migration": null,
        });
        assert_eq!(serde_json::to_value(job).unwrap(), expected);
    }

    #[test]
    fn the_json_of_a_migration_is_stable() {
        let long = |name| (name, owned(7u64));
        let mut facts = properties(vec![
            ("URI", owned("local:")),
            ("Place", owned("destination")),
            long("BytesSent"),
            long("BytesRemaining"),
            long("DirtyRate"),
            long("LinkRate"),
            long("Iteration"),
            long("MaxDowntimeUSec"),
            long("PredictedDowntimeUSec"),
            long("DowntimeUSec"),
            ("Throttle", owned(20u32)),
            ("Report", owned("")),
        ]);
        let expected = serde_json::json!({
            "uri": "local:", "place": "destination", "bytes_sent": 7, "bytes_remaining": 7,
            "dirty_rate": 7, "link_rate": 7, "iteration": 7, "max_downtime_usec": 7,
            "predicted_downtime_usec": 7, "downtime_usec": 7, "throttle": 20, "report": null,
        });
        let read = Migration::read(&facts).unwrap();
        assert_eq!(serde_json::to_value(read).unwrap(), expected);
        facts.insert("Place".into(), owned("heaven"));
        assert!(Migration::read(&facts).is_err());
    }

    #[test]
    fn a_missing_property_is_named() {
        let mut properties = machine();
        properties.remove("Vcpus");
        let error = Machine::read(&properties).unwrap_err().to_string();
        assert!(error.contains("Vcpus"), "{error}");
        properties.insert("Vcpus".into(), owned("two"));
        assert!(Machine::read(&properties).is_err());
    }

    #[test]
    fn no_job_is_no_number() {
        let mut properties = machine();
        properties.insert(
            "Job".into(),
            owned(zbus::ObjectPath::try_from("/").unwrap()),
        );
        assert_eq!(Machine::read(&properties).unwrap().job, None);
    }
}
