//! What every machine of this broker needs.

use std::path::PathBuf;

use crate::folder::Folder;
use crate::launch::Launcher;
use crate::metrics::Metrics;
use crate::migration::Arrivals;
use crate::migration::peer::Key;
use crate::publish::Publisher;

/// What every machine of this broker needs.
#[derive(Debug)]
pub struct Host {
    /// The broker's folder.
    pub folder: Folder,
    /// Where `godwit-vmm` and the device programs are.
    pub programs: PathBuf,
    /// How they are started.
    pub launcher: Launcher,
    /// To the bus.
    pub publisher: Publisher,
    /// What brokers have that machines may come from and go to by TCP.
    pub migration_key: Option<Key>,
    /// What became of machines that other brokers sent.
    pub arrivals: Arrivals,
    /// Counters.
    pub metrics: Metrics,
}
