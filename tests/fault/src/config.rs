//! Command-line options.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use device_kit::OptionError;
use nix::sys::resource::{Resource, setrlimit};

use crate::script::Script;

/// Most bytes of state.
const MAX_STATE: u64 = 1 << 30;

/// Options of `godwit-fault`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Number of virtqueues
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,

    /// Bytes that it saves besides its counters
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=MAX_STATE))]
    state_bytes: u64,

    /// File with the script of what goes wrong; it may change at any time
    #[arg(long, value_name = "PATH")]
    script: Option<PathBuf>,

    /// Let it map so many MiB of memory, and no more
    #[arg(long, value_name = "MIB")]
    map_limit: Option<u64>,
}

/// What the device is.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) queues: u16,
    pub(crate) state_bytes: u64,
    pub(crate) script: Script,
}

impl Config {
    pub(crate) fn open(options: Options) -> Result<Self, OptionError> {
        if let Some(limit) = options.map_limit {
            limit_mappings(limit).map_err(|problem| OptionError {
                option: "--map-limit",
                value: limit.to_string(),
                problem,
            })?;
        }
        Ok(Config {
            queues: options.num_queues,
            state_bytes: options.state_bytes,
            script: Script::open(options.script)?,
        })
    }
}

/// Limits the process's address space to what it has and `mib` MiB.
fn limit_mappings(mib: u64) -> Result<(), String> {
    let say = |error: &dyn std::error::Error| format!("cannot be set: {error}");
    let status = fs::read_to_string("/proc/self/status").map_err(|error| say(&error))?;
    let kib: u64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmSize:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .ok_or("cannot be set: /proc/self/status has no VmSize")?;
    let limit = (kib << 10).saturating_add(mib.saturating_mul(1 << 20));
    setrlimit(Resource::RLIMIT_AS, limit, limit).map_err(|error| say(&error))
}
