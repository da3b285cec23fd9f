//! Options of what shows what machines do, and talks to them.

use clap::Args;

use crate::value::{Escape, Size};

/// Attaches to a machine's console; ^] leaves it.
#[derive(Debug, Args)]
pub struct Console {
    /// The machine
    pub name: String,
    /// Only reads
    #[arg(long, short)]
    pub read_only: bool,
    /// Takes the console from whoever writes to it now
    #[arg(long, short, conflicts_with = "read_only")]
    pub force: bool,
    /// Does not begin with what was printed lately
    #[arg(long)]
    pub no_replay: bool,
    /// The key that leaves the console
    #[arg(long, value_name = "KEY", default_value = "^]")]
    pub escape: Escape,
}

/// Shows a machine's memory balloon, or changes its size.
#[derive(Debug, Args)]
pub struct Balloon {
    /// The machine
    pub name: String,
    /// How much memory the guest shall give to the host, with K, M, G or T
    pub size: Option<Size>,
    /// Seconds after which the guest is asked for its statistics again, up to 3600; 0: never
    #[arg(long, value_name = "SECONDS")]
    pub statistics_interval: Option<u32>,
}

/// Prints what a machine's processes said.
#[derive(Debug, Args)]
pub struct Logs {
    /// The machine
    pub name: String,
    /// Whose log: core, console, or a device; by default of the core and all devices
    #[arg(value_name = "SOURCE")]
    pub sources: Vec<String>,
    /// Goes on with what they will say
    #[arg(long, short)]
    pub follow: bool,
}

/// Shows what machines and devices use, again and again.
#[derive(Debug, Args)]
pub struct Top {
    /// Machines; all when none is named
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Seconds between two looks
    #[arg(long, short, value_name = "SECONDS", default_value_t = 2.0, value_parser = crate::value::interval)]
    pub interval: f64,
    /// How often to look
    #[arg(long, short = 'n', value_name = "N")]
    pub count: Option<u64>,
}
