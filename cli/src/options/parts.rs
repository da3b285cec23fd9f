//! Options for jobs and devices.

use clap::Subcommand;

use super::{Wait, examples};
use crate::value::Milliseconds;

/// Lists, shows, awaits, changes and cancels jobs.
#[derive(Debug, Subcommand)]
pub enum Job {
    /// Lists jobs, those that ended lately included
    #[command(after_long_help = examples::JOB_LIST)]
    List,
    /// Shows jobs with their results
    #[command(after_long_help = examples::JOB_SHOW)]
    Show {
        /// Numbers of jobs
        #[arg(required = true, value_name = "ID")]
        ids: Vec<u32>,
    },
    /// Waits for the end of jobs; their results are the exit status
    #[command(after_long_help = examples::JOB_WAIT)]
    Wait {
        /// Numbers of jobs
        #[arg(required = true, value_name = "ID")]
        ids: Vec<u32>,
        /// Waits for so many seconds at most
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
    },
    /// Changes what a migration that is under way may do to its machine
    #[command(after_long_help = examples::JOB_SET)]
    Set {
        /// Number of the job
        id: u32,
        /// The machine is stopped when the stop is predicted to be shorter, as 20ms or 1s
        #[arg(long, value_name = "TIME")]
        max_downtime: Milliseconds,
    },
    /// Cancels jobs
    #[command(after_long_help = examples::JOB_CANCEL)]
    Cancel {
        /// Numbers of jobs
        #[arg(required = true, value_name = "ID")]
        ids: Vec<u32>,
    },
}

/// Lists, shows and restarts devices.
#[derive(Debug, Subcommand)]
pub enum Device {
    /// Lists the devices of machines; of all machines when none is named
    #[command(after_long_help = examples::DEVICE_LIST)]
    List {
        /// Machines
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
    /// Shows a device
    #[command(after_long_help = examples::DEVICE_SHOW)]
    Show {
        /// Its machine
        name: String,
        /// The device
        device: String,
    },
    /// Replaces a device's process under the running machine; no request is lost
    #[command(after_long_help = examples::DEVICE_RESTART)]
    Restart {
        /// Its machine
        name: String,
        /// The device
        device: String,
        #[command(flatten)]
        wait: Wait,
    },
}
