//! `cargo xtask bench NAME`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use test_bench::{
    Boot, BootPreset, Bulk, FreePages, FreePagesPreset, Lifecycle, LifecyclePreset, Report,
    Switchover, SwitchoverPreset,
};
use test_framework::{network, programs};

use crate::cargo;

/// A benchmark.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Start of the processes to the guest's first instruction and first disk read.
    Boot {
        /// Which machines.
        #[arg(long, value_enum, default_value = "all")]
        preset: BootPreset,
        /// Runs of each.
        #[arg(long, default_value_t = 10)]
        runs: usize,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// How fast memory is copied, and how much slower its guest is meanwhile.
    Bulk {
        /// Runs of each.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// What it saves not to send pages that the guest does not use.
    FreePages {
        /// How much memory the machine has.
        #[arg(long, value_enum, default_value = "1g")]
        preset: FreePagesPreset,
        /// Moves of each.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Machines under a broker: from creation until they run, their end, their processes' memory.
    Lifecycle {
        /// How many machines.
        #[arg(long, value_enum, default_value = "all")]
        preset: LifecyclePreset,
        /// Runs of each.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// How long a guest stands still while its machine moves.
    Switchover {
        /// Which machines.
        #[arg(long, value_enum, default_value = "one-each")]
        preset: SwitchoverPreset,
        /// Moves of each.
        #[arg(long, default_value_t = 10)]
        runs: usize,
        /// Only machines whose names contain this, as "1 GiB".
        #[arg(
            long,
            value_name = "TEXT",
            default_value = "",
            hide_default_value = true
        )]
        only: String,
        /// Moves each machine also without each of these: early-map, layout, parallel, channels.
        #[arg(long, value_name = "LIST", value_delimiter = ',')]
        without: Vec<String>,
        /// Writes the timeline of a typical move here, for Perfetto's viewer.
        #[arg(long, value_name = "FILE")]
        trace: Option<PathBuf>,
        /// Draws the blackout of the same move here.
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
}

/// Runs a benchmark on release builds and prints what it says.
pub fn bench(bench: Bench) -> Result<()> {
    let built = cargo::build(true)?;
    programs::use_folder(built);
    match bench {
        Bench::Boot { preset, runs, json } => {
            network::enter()?;
            print(&Boot { preset, runs }.run()?, json)
        }
        Bench::Lifecycle { preset, runs, json } => {
            network::enter()?;
            print(&Lifecycle { preset, runs }.run()?, json)
        }
        Bench::Bulk { runs, json } => print(&Bulk { runs }.run()?, json),
        Bench::FreePages { preset, runs, json } => print(&FreePages { preset, runs }.run()?, json),
        Bench::Switchover {
            preset,
            runs,
            only,
            without,
            trace,
            svg,
            json,
        } => {
            network::enter()?;
            let switchover = Switchover {
                preset,
                runs,
                only,
                without,
                trace,
                svg,
            };
            print(&switchover.run()?, json)
        }
    }
}

fn print(report: &Report, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        println!("{report}");
    }
    Ok(())
}
