//! The device processes of one side: how they are started, and started again.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use test_framework::process::{Launch, Process};
use test_framework::programs::program;

use super::Spec;

/// A counting device, of `godwit-fault`.
#[derive(Clone, Debug, Default)]
pub struct Counter {
    /// Queues.
    pub queues: u16,
    /// Bytes of state besides the counters.
    pub state_bytes: u32,
    /// The script at its start, see `tests/fault`.
    pub script: String,
    /// Most MiB of memory that it can map.
    pub map_limit: Option<u64>,
}

/// How a device process is started.
#[derive(Debug)]
pub(super) struct Recipe {
    kind: &'static str,
    options: Vec<(&'static str, String)>,
    /// Where its front-end finds it.
    pub(super) socket: PathBuf,
}

impl Recipe {
    /// All of a machine, in the order of [`Spec::ids`]; sockets and scripts are in `folder`.
    pub(super) fn all(spec: &Spec, folder: &Path) -> Result<Vec<Self>> {
        let disks = spec.disks.iter().map(|(image, queues)| {
            // Both sides have it open for a while.
            let options = vec![
                ("--blk-file", image.display().to_string()),
                ("--num-queues", queues.to_string()),
                ("--lock", "off".to_owned()),
            ];
            ("blk", options)
        });
        let nics = spec.nics.iter().map(|(tap, pairs)| {
            let options = vec![
                ("--tap", tap.clone()),
                ("--queue-pairs", pairs.to_string()),
                ("--mac", "52:54:00:12:34:56".to_owned()),
            ];
            ("net", options)
        });
        let mut all: Vec<_> = disks.chain(nics).collect();
        for (number, counter) in spec.counters.iter().enumerate() {
            let script = script_path(folder, number);
            std::fs::write(&script, &counter.script)?;
            let mut options = vec![
                ("--num-queues", counter.queues.to_string()),
                ("--state-bytes", counter.state_bytes.to_string()),
                ("--script", script.display().to_string()),
            ];
            options.extend(
                counter
                    .map_limit
                    .map(|mib| ("--map-limit", mib.to_string())),
            );
            all.push(("fault", options));
        }
        let recipe = |(id, (kind, options))| Recipe {
            kind,
            options,
            socket: folder.join::<String>(id),
        };
        Ok(spec.ids().into_iter().zip(all).map(recipe).collect())
    }

    /// Starts it, or its successor.
    pub(super) fn start(&self) -> Result<Process> {
        let _ = std::fs::remove_file(&self.socket);
        let listener = UnixListener::bind(&self.socket).context("no socket for a device")?;
        let mut launch = Launch::new(&program(&format!("godwit-{}", self.kind))?);
        let number = launch.inherit(listener.into());
        launch = launch.option("--fd", number.to_string());
        for (option, value) in &self.options {
            launch = launch.option(option, value);
        }
        launch.start()
    }

    /// The core's option for it.
    pub(super) fn for_core(&self, id: &str) -> String {
        let kind = match self.kind {
            // A type of no specification.
            "fault" => "63",
            kind => kind,
        };
        format!("{kind},socket={},id={id}", self.socket.display())
    }
}

/// The script of a counting device.
pub(super) fn script_path(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("script{number}"))
}
