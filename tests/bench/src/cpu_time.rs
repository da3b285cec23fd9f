//! Processor time of processes that run guests.

use std::fs;

use anyhow::{Context as _, Result};

/// What the names of threads that are vCPUs begin with: ours, QEMU's.
const VCPUS: [&str; 2] = ["vcpu", "CPU "];
/// Milliseconds of a tick: a hundred ticks a second, on every x86 computer.
const TICK_MS: f64 = 10.0;

/// Processor time, in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CpuTime {
    /// Of all threads but the vCPUs'.
    pub host_ms: f64,
    /// Of the vCPUs' threads.
    pub guest_ms: f64,
}

impl CpuTime {
    /// Of a process so far, threads that have ended included.
    pub(crate) fn of(process: u32) -> Result<Self> {
        let mut guest_ms = 0.0;
        for task in fs::read_dir(format!("/proc/{process}/task"))? {
            // One that ends meanwhile is no vCPU.
            let stat = task?.path().join("stat");
            if let Ok((name, time)) = time(&stat.to_string_lossy())
                && VCPUS.iter().any(|vcpu| name.starts_with(vcpu))
            {
                guest_ms += time;
            }
        }
        let (_, all) = time(&format!("/proc/{process}/stat"))?;
        Ok(Self {
            // The kernel rounds the ticks of a process and of each of its threads by themselves.
            host_ms: (all - guest_ms).max(0.0),
            guest_ms,
        })
    }

    /// What was added since `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            host_ms: self.host_ms - before.host_ms,
            guest_ms: self.guest_ms - before.guest_ms,
        }
    }
}

/// Name and time of a process or thread, by its `stat` file.
fn time(path: &str) -> Result<(String, f64)> {
    let stat = fs::read_to_string(path)?;
    // After the name, which may hold anything: state is field 3, utime and stime 14 and 15.
    let (head, fields) = stat.rsplit_once(')').context("this is no stat")?;
    let name = head.split_once('(').context("this is no stat")?.1;
    let mut ms = 0.0;
    for ticks in fields.split_whitespace().skip(11).take(2) {
        ms += ticks.parse::<f64>()? * TICK_MS;
    }
    Ok((name.to_owned(), ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_named_as_vcpus_are_the_guest() {
        let spin = || {
            let mut sum = 0u64;
            for n in 0..50_000_000u64 {
                sum = std::hint::black_box(sum ^ n);
            }
            let time = CpuTime::of(std::process::id());
            std::hint::black_box(sum);
            time
        };
        let vcpu = std::thread::Builder::new().name("vcpu7".into());
        let time = vcpu.spawn(spin).unwrap().join().unwrap().unwrap();
        assert!(time.guest_ms > 0.0, "{time:?}");
        assert!(time.host_ms >= 0.0, "{time:?}");
        assert!(time.host_ms < time.guest_ms, "{time:?}");
    }
}
