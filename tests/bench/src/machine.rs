//! The computer that a benchmark ran on.

use std::fs;
use std::thread;

use serde::Serialize;

/// What a figure depends on.
#[derive(Clone, Debug, Serialize)]
pub struct MachineInfo {
    /// Processors.
    pub cores: usize,
    /// Kernel release.
    pub kernel: String,
    /// Load average of the last minute, before the benchmark.
    pub load: f64,
}

impl MachineInfo {
    /// Of this computer, now.
    pub fn here() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let load = read("/proc/loadavg")
            .split(' ')
            .next()
            .and_then(|l| l.parse().ok());
        Self {
            cores: thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: load.unwrap_or(0.0),
        }
    }
}
