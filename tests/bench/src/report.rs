//! What a benchmark says.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::Value;

use crate::machine::MachineInfo;
use crate::statistics::Summary;

/// The result of one benchmark.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Its name.
    pub bench: &'static str,
    /// The variant that was run.
    pub preset: String,
    /// Where.
    pub machine: MachineInfo,
    /// Every run as it was measured.
    pub runs: Vec<Value>,
    /// Each metric over all runs.
    pub summary: BTreeMap<String, Summary>,
    /// Ratios whose both sides were measured here.
    pub ratios: BTreeMap<String, f64>,
    /// What was to be reached.
    pub goals: Vec<Goal>,
    /// What a reader must know besides: a peer that is not installed.
    pub notes: Vec<String>,
}

/// Something to be reached: a value that may not be beyond a limit.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    /// What.
    pub name: String,
    /// As measured.
    pub value: f64,
    /// At most this, or at least.
    pub goal: f64,
    /// Unit of both.
    pub unit: &'static str,
    /// Whether more is better.
    #[serde(skip)]
    pub at_least: bool,
    /// Whether it was reached.
    pub met: bool,
}

impl Goal {
    /// `value` may be at most `goal`.
    pub fn at_most(name: impl Into<String>, value: f64, goal: f64, unit: &'static str) -> Self {
        Self {
            name: name.into(),
            value,
            goal,
            unit,
            at_least: false,
            met: value <= goal,
        }
    }

    /// `value` may be at least `goal`.
    pub fn at_least(name: impl Into<String>, value: f64, goal: f64, unit: &'static str) -> Self {
        Self {
            at_least: true,
            met: value >= goal,
            ..Self::at_most(name, value, goal, unit)
        }
    }
}

impl Report {
    /// Nothing measured yet.
    pub fn new(bench: &'static str, preset: impl Into<String>) -> Self {
        Self {
            bench,
            preset: preset.into(),
            machine: MachineInfo::here(),
            runs: Vec::new(),
            summary: BTreeMap::new(),
            ratios: BTreeMap::new(),
            goals: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Adds a metric over all its runs; nothing if there are none.
    pub fn summarise(&mut self, metric: impl Into<String>, values: &[f64], unit: &'static str) {
        if let Some(summary) = Summary::of(values, unit) {
            self.summary.insert(metric.into(), summary);
        }
    }

    /// Adds the ratio of two medians of this run.
    pub fn compare(&mut self, name: impl Into<String>, metric: &str, to: &str) {
        if let (Some(a), Some(b)) = (self.summary.get(metric), self.summary.get(to)) {
            self.ratios.insert(name.into(), a.median / b.median);
        }
    }
}

/// The table for a person.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MachineInfo {
            cores,
            kernel,
            load,
        } = &self.machine;
        writeln!(
            f,
            "{} ({}), {} runs",
            self.bench,
            self.preset,
            self.runs.len()
        )?;
        writeln!(f, "{cores} cores, Linux {kernel}, load {load:.2}\n")?;
        writeln!(
            f,
            "{:<40} {:>10} {:>10} {:>10}  unit",
            "metric", "median", "min", "max"
        )?;
        for (metric, s) in &self.summary {
            writeln!(
                f,
                "{metric:<40} {:>10.2} {:>10.2} {:>10.2}  {}",
                s.median, s.min, s.max, s.unit
            )?;
        }
        for (name, ratio) in &self.ratios {
            writeln!(f, "{name:<40} {ratio:>10.2}×")?;
        }
        for Goal {
            name,
            value,
            goal,
            unit,
            at_least,
            met,
        } in &self.goals
        {
            let met = if *met { "met" } else { "NOT met" };
            let most = if *at_least { "at least" } else { "at most" };
            writeln!(
                f,
                "goal {name}: {value:.2} {unit}, {most} {goal} {unit}: {met}"
            )?;
        }
        self.notes
            .iter()
            .try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_the_one_form() {
        let mut report = Report::new("boot", "default");
        report
            .runs
            .push(serde_json::json!({ "a_ms": 2.0, "b_ms": 4.0 }));
        report.summarise("a", &[2.0], "ms");
        report.summarise("b", &[4.0], "ms");
        report.summarise("absent", &[], "ms");
        report.compare("a to b", "a", "b");
        report.compare("a to absent", "a", "absent");
        report.goals.push(Goal::at_most("a", 2.0, 1.0, "ms"));
        report.goals.push(Goal::at_least("b", 4.0, 3.0, "ms"));
        let json = serde_json::to_value(&report).unwrap();
        let keys: Vec<_> = json
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let expected = [
            "bench", "goals", "machine", "notes", "preset", "ratios", "runs", "summary",
        ];
        assert_eq!(keys, expected);
        assert_eq!(json["summary"]["a"]["unit"], "ms");
        assert_eq!(json["ratios"], serde_json::json!({ "a to b": 0.5 }));
        assert_eq!(json["goals"][0]["met"], false);
        assert_eq!(json["goals"][1]["met"], true);
        let table = report.to_string();
        assert!(table.contains("goal a: 2.00 ms, at most 1 ms: NOT met"));
        assert!(table.contains("goal b: 4.00 ms, at least 3 ms: met"));
    }
}
