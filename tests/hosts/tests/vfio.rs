//! A stock Linux guest that is given a PCI device of its host: an NVMe disk, which the emulator has.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use test_framework::programs::program;
use test_hosts::{Host, HostOptions};

const SCRIPT: &str = include_str!("vfio.sh");
const GUEST: &str = include_str!("vfio-guest.sh");
const PROGRAMS: [&str; 4] = ["godwit", "godwit-broker", "godwit-vmm", "godwit-vfio"];

/// Emulated hosts are slow, and slower on a busy machine.
const DEADLINE: Duration = Duration::from_secs(420);

/// A host with the programs and an NVMe disk, whose bytes are in the file `disk`.
fn host(disk: &Path) -> Result<Host> {
    let mut host = Host::start(&HostOptions::named("vfio"))?;
    for name in PROGRAMS {
        host.install(&[&program(name)?])?;
    }
    fs::write(host.share().join("vfio-guest.sh"), GUEST)?;
    File::create(disk)?.set_len(64 << 20)?;
    let file = json!({ "driver": "file", "filename": disk });
    let node = json!({ "driver": "raw", "node-name": "disk", "file": file });
    host.qmp("blockdev-add", node)?;
    let nvme =
        json!({ "driver": "nvme", "id": "nvme", "bus": "rp0", "drive": "disk", "serial": "1" });
    host.qmp("device_add", nvme)?;
    Ok(host)
}

#[test]
fn a_linux_guest_uses_an_nvme_disk_of_the_host() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut host = host(&folder.path().join("disk"))?;
    let said = host.call(SCRIPT, "uses", DEADLINE)?;
    let after = |word: &str| -> Result<Vec<&str>> {
        let lines = said.lines().filter_map(|line| line.strip_prefix(word));
        let found: Vec<_> = lines.map(str::trim).collect();
        ensure!(!found.is_empty(), "no {word}:\n{said}");
        Ok(found)
    };
    after("its driver is nvme: give it to vfio-pci")?;
    after("another machine or program has it")?;
    after("L2-BOOT 2 CPUs")?;
    after("L2-DONE")?;
    ensure!(!said.contains("L2-FAIL"), "{said}");
    let given = after("L2-GIVEN")?;
    ensure!(given[0].len() == 64, "{said}");
    ensure!(after("L2-READ")? == given, "{said}");
    ensure!(after("HOST-READ")? == given, "{said}");
    // Each of its queues has a vector of its own, and has been heard.
    let interrupts = after("L2-INTERRUPTS")?;
    let numbers: Vec<u64> = interrupts[0]
        .split(' ')
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    ensure!(numbers[0] >= 2 && numbers[1] > 8, "{said}");
    Ok(())
}
