//! Options of what moves machines.

use std::path::PathBuf;

use clap::Args;

use super::Wait;
use crate::value::{Milliseconds, Size};

/// Moves a machine while it runs.
#[derive(Debug, Args)]
pub struct Migrate {
    /// The machine
    pub name: String,
    /// tcp://HOST:PORT or unix:/PATH of a broker that listens, or local:
    pub uri: String,
    /// It is stopped when the stop is predicted to be shorter, as 20ms or 1s [default: 300ms]
    #[arg(long, value_name = "TIME")]
    pub max_downtime: Option<Milliseconds>,
    /// A stop that lasts longer is given up, and the machine goes on where it was [default: 10s]
    #[arg(long, value_name = "TIME")]
    pub blackout_limit: Option<Milliseconds>,
    /// Most memory to send a second while the guest runs, as 100M; at least 1M
    #[arg(long, value_name = "SIZE")]
    pub max_bandwidth: Option<Size>,
    /// Connections for memory, 1 to 16 [default: 2]
    #[arg(long, value_name = "N")]
    pub channels: Option<u32>,
    /// Slows a guest down that writes faster than its memory can be sent
    #[arg(long)]
    pub auto_converge: bool,
    /// Gives up after so many seconds of a guest that is too fast [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub patience: Option<u64>,
    /// Writes what took how long on both hosts, for Perfetto and other viewers of traces
    #[arg(long, value_name = "FILE", conflicts_with = "no_wait")]
    pub trace: Option<PathBuf>,
    #[command(flatten)]
    pub wait: Wait,
}

/// Says where a machine is.
#[derive(Debug, Args)]
pub struct Decide {
    /// The machine
    pub name: String,
    /// It runs at the destination: it is forgotten here
    #[arg(long, required_unless_present = "here", conflicts_with = "here")]
    pub there: bool,
    /// It does not run at the destination and never will: it goes on here
    #[arg(long)]
    pub here: bool,
}

/// Writes a running machine into a new folder.
#[derive(Debug, Args)]
pub struct Snapshot {
    /// The machine
    pub name: String,
    /// The folder, which must not be there yet
    pub folder: PathBuf,
    #[command(flatten)]
    pub wait: Wait,
}

/// Makes a machine of a snapshot.
#[derive(Debug, Args)]
pub struct Restore {
    /// The folder
    pub folder: PathBuf,
    /// Name of the machine; by default the one that it had
    #[arg(long)]
    pub name: Option<String>,
    /// Leaves the machine paused
    #[arg(long)]
    pub paused: bool,
    /// Keeps the machine when it has ended, so that it can be started again
    #[arg(long)]
    pub keep: bool,
    #[command(flatten)]
    pub wait: Wait,
}
