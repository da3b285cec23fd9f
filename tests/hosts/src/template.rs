//! A booted host on disk, from which others start in well under a second.
//!
//! ```text
//! template/memory      its RAM, mapped copy-on-write by every host
//! template/state       the rest of the machine, QEMU's migration stream without RAM
//! template/disk.qcow2  what it has written since its first boot, over the prepared disk
//! template/stamp       what it was saved with; another stamp means that it does not fit
//! ```
//! A template fits one machine: QEMU's command line, the files' place (the disk names its backing
//! file), and the processor, whose kind TCG does not hide in full.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::machine::{Files, Machine, Memory, Storage, Wire, fixed_arguments};
use crate::qmp::Qmp;
use crate::{Assets, Error, Result};

/// A first boot takes 10 to 25 seconds on two busy cores.
const BOOT_DEADLINE: Duration = Duration::from_secs(180);
const STATE_DEADLINE: Duration = Duration::from_secs(60);

/// The files of a template that fits.
#[derive(Debug)]
pub(crate) struct Template {
    folder: PathBuf,
}

impl Template {
    /// Finds the template, or boots a host and saves it.
    pub(crate) fn ensure(assets: &Assets) -> Result<Self> {
        let template = Self {
            folder: assets.folder().join("template"),
        };
        let stamp = stamp(assets);
        if !template.fits(&stamp) {
            let _lock = assets.lock()?;
            if !template.fits(&stamp) {
                template.make(assets, &stamp)?;
            }
        }
        Ok(template)
    }

    /// Makes a new template although the stamp fits, because restoring from it failed.
    pub(crate) fn renew(assets: &Assets) -> Result<Self> {
        let template = Self {
            folder: assets.folder().join("template"),
        };
        let _lock = assets.lock()?;
        template.make(assets, &stamp(assets))?;
        Ok(template)
    }

    pub(crate) fn memory(&self) -> PathBuf {
        self.folder.join("memory")
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.join("disk.qcow2")
    }

    /// Loads the saved state into a machine that waits for it, and lets it run.
    pub(crate) fn load_into(&self, machine: &Machine) -> Result<()> {
        let mut qmp = machine.qmp()?;
        ignore_shared_memory(&mut qmp)?;
        qmp.execute("migrate-incoming", json!({ "uri": self.state_uri() }))?;
        wait_for_state(&mut qmp)?;
        // It was saved while it was stopped, so it does not go on by itself.
        qmp.execute("cont", json!({}))?;
        Ok(())
    }

    fn state_uri(&self) -> String {
        format!("file:{}/state", self.folder.display())
    }

    fn fits(&self, stamp: &str) -> bool {
        fs::read_to_string(self.folder.join("stamp")).is_ok_and(|found| found == stamp)
    }

    fn make(&self, assets: &Assets, stamp: &str) -> Result<()> {
        let start = Instant::now();
        eprintln!("hosts: booting the first host");
        // A Unix socket's path is too short for many a cache folder's.
        let folder = tempfile::Builder::new()
            .prefix("godwit-template-")
            .tempdir()
            .map_err(Error::io("creating a folder in", &std::env::temp_dir()))?;
        let partial = Self {
            folder: self.folder.with_extension("partial"),
        };
        for stale in [&partial.folder, &self.folder] {
            if stale.exists() {
                fs::remove_dir_all(stale).map_err(Error::io("removing", stale))?;
            }
        }
        fs::create_dir(&partial.folder).map_err(Error::io("creating", &partial.folder))?;

        create_overlay(assets, &partial.disk())?;
        let mut machine = Machine::spawn(
            assets,
            "template",
            Files::new(folder.path().to_owned()),
            &Storage {
                memory: Memory::New(partial.memory()),
                disk: partial.disk(),
            },
            &Wire::None,
            false,
        )?;
        machine.wait_for_agent(BOOT_DEADLINE)?;
        let mut qmp = machine.qmp()?;
        qmp.execute("stop", json!({}))?;
        ignore_shared_memory(&mut qmp)?;
        qmp.execute("migrate", json!({ "uri": partial.state_uri() }))?;
        wait_for_state(&mut qmp)?;
        drop(qmp);
        machine.quit()?;

        let stamp_path = partial.folder.join("stamp");
        fs::write(&stamp_path, stamp).map_err(Error::io("writing", &stamp_path))?;
        fs::rename(&partial.folder, &self.folder)
            .map_err(Error::io("renaming", &partial.folder))?;
        eprintln!(
            "hosts: template saved after {} s",
            start.elapsed().as_secs()
        );
        Ok(())
    }
}

/// RAM stays in its file; only the rest of the machine goes into the stream.
fn ignore_shared_memory(qmp: &mut Qmp) -> Result<()> {
    let capabilities = json!([{ "capability": "x-ignore-shared", "state": true }]);
    qmp.execute(
        "migrate-set-capabilities",
        json!({ "capabilities": capabilities }),
    )?;
    Ok(())
}

fn wait_for_state(qmp: &mut Qmp) -> Result<()> {
    let start = Instant::now();
    loop {
        let answer = qmp.execute("query-migrate", json!({}))?;
        match answer["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                return Err(Error::State {
                    reason: reason(&answer),
                });
            }
            status if start.elapsed() > STATE_DEADLINE => {
                return Err(Error::State {
                    reason: format!("still {status:?} after {STATE_DEADLINE:?}"),
                });
            }
            _ => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn reason(answer: &Value) -> String {
    answer["error-desc"]
        .as_str()
        .unwrap_or("QEMU gives no reason")
        .to_owned()
}

fn create_overlay(assets: &Assets, disk: &Path) -> Result<()> {
    let output = assets
        .qemu("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(assets.folder().join("host.ext4"))
        .arg(disk)
        .output()
        .map_err(Error::io("running qemu-img for", disk))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Program {
        program: "qemu-img",
        status: output.status,
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

fn stamp(assets: &Assets) -> String {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = processor
        .lines()
        .find(|line| line.starts_with("model name"))
        .unwrap_or("unknown processor");
    format!("{processor}\n{}\n", fixed_arguments(assets).join(" "))
}
