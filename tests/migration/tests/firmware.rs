//! A machine that starts in a firmware, Debian's SeaBIOS, and boots from its disk: the boot sector,
//! which lives by the firmware's services and interrupts, goes on wherever the machine moves.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;
use test_guest::Workload;
use test_migration::{Kind, Side, Spec};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/boot-sector.S");
/// A BIOS of 256 KiB and one of 128.
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";
const SMALL: &str = "/usr/share/seabios/bios.bin";
/// The first word of the second sector.
const WORD: u64 = u32::from_le_bytes(*b"GODW") as u64;
/// A BIOS runs in real mode, which is slow where KVM emulates it.
const DEADLINE: Duration = Duration::from_secs(300);

/// A machine with two vCPUs that boots from a disk in `folder`.
fn spec(folder: &Path) -> Result<Spec> {
    let image = folder.join("disk");
    let built = Command::new("cc")
        .args(["-m32", "-nostdlib", "-static", "-no-pie", "-o"])
        .arg(&image)
        .args(["-Wl,--build-id=none,-Ttext=0x7c00,--oformat=binary", SOURCE])
        .output()
        .context("cc cannot be run")?;
    ensure!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let disk = File::options().write(true).open(&image)?;
    ensure!(disk.metadata()?.len() == 512, "it is no boot sector");
    disk.write_all_at(&WORD.to_le_bytes(), 512)?;
    disk.set_len(1 << 20)?;
    let mut spec = Spec::of(Workload::default());
    spec.firmware = Some(SEABIOS.into());
    spec.cpus = 2;
    spec.disks.push((image, 1));
    Ok(spec)
}

/// The same machine on a host where the file of its firmware has become another of its size.
fn elsewhere(spec: &Spec, folder: &Path) -> Result<Spec> {
    let firmware = folder.join("another");
    let size = std::fs::metadata(SEABIOS)?.len();
    std::fs::write(&firmware, vec![0xf4; usize::try_from(size)?])?;
    Ok(Spec {
        firmware: Some(firmware),
        ..spec.clone()
    })
}

/// The next whole line that begins with `kind` and came after `begin`: its numbers of so many
/// hexadecimal digits.
fn numbers<const N: usize>(
    side: &mut Side,
    kind: char,
    digits: [usize; N],
    begin: Instant,
) -> Result<[u64; N]> {
    let end = Instant::now() + DEADLINE;
    loop {
        let line = side.console.line(end)?;
        ensure!(!line.text.contains('!'), "a read failed");
        let Some(mut rest) = line.text.strip_prefix(kind) else {
            continue;
        };
        // The first line may be the end of one that was begun elsewhere.
        if line.at < begin || rest.len() != digits.iter().sum::<usize>() {
            continue;
        }
        let mut found = [0; N];
        for (number, digits) in found.iter_mut().zip(digits) {
            let (this, next) = rest.split_at(digits);
            *number = u64::from_str_radix(this, 16).context(line.text.clone())?;
            rest = next;
        }
        return Ok(found);
    }
}

/// Waits for two reads from now on, which must be right and come after read `last`; the second.
fn reads(side: &mut Side, last: u64) -> Result<u64> {
    let begin = Instant::now();
    let [first, word] = numbers(side, 'r', [8, 8], begin)?;
    ensure!(word == WORD, "{word:#x} was read");
    ensure!(first > last, "read {first} after {last}");
    let [second, word] = numbers(side, 'r', [8, 8], begin)?;
    ensure!(word == WORD, "{word:#x} was read");
    ensure!(second == first + 1, "read {second} after {first}");
    Ok(second)
}

/// Waits until the disk has booted since `begin`: the memory map must be that of 64 MiB.
fn booted(side: &mut Side, begin: Instant) -> Result<()> {
    let mut ram = 0;
    loop {
        let [start, length, kind] = numbers(side, 'm', [16, 16, 8], begin)?;
        match (start, kind) {
            (_, 1) => ram += length,
            // The last one.
            (0xfeff_c000, 2) => break,
            _ => {}
        }
    }
    ensure!((63 << 20..64 << 20).contains(&ram), "{ram} bytes of RAM");
    let [first, _] = numbers(side, 'r', [8, 8], begin)?;
    ensure!(first == 1, "it begins with read {first}");
    reads(side, first).map(drop)
}

#[test]
fn a_bios_boots_a_disk_and_keeps_working_wherever_it_moves() -> Result<()> {
    let folder = TempDir::new()?;
    let mut here = spec(folder.path())?;
    let mut there = elsewhere(&here, folder.path())?;
    let begin = Instant::now();
    let mut side = Side::boot(&here)?;
    booted(&mut side, begin)?;
    let mut last = reads(&mut side, 1)?;
    side = side.move_on(&there)?.side;
    last = reads(&mut side, last)?;
    // It came with its firmware.
    let begin = Instant::now();
    side.reset()?;
    booted(&mut side, begin)?;
    ensure!(reads(&mut side, 1)? < last + 1000, "it did not begin anew");
    (here.kind, there.kind) = (Kind::Shared, Kind::Shared);
    let last = reads(&mut side, 1)?;
    side = side.move_on(&here)?.side;
    let last = reads(&mut side, last)?;
    let files = folder.path().join("files");
    std::fs::create_dir(&files)?;
    side.snapshot(&here, &files)?;
    let last = reads(&mut side, last)?;
    side.terminate()?;
    // With the lock of its disk.
    drop(side);
    let mut side = Side::restore(&there, &files)?;
    side.resume()?;
    let again = reads(&mut side, 1)?;
    ensure!(again < last + 1000, "read {again} after {last}");
    side.terminate()
}

#[test]
fn a_firmware_of_another_size_is_refused_before_anything_is_copied() -> Result<()> {
    let folder = TempDir::new()?;
    let here = spec(folder.path())?;
    let small = Spec {
        firmware: Some(PathBuf::from(SMALL)),
        ..here.clone()
    };
    let begin = Instant::now();
    let side = Side::boot(&here)?;
    let (mut side, _, outcome) = side.try_move(&small, None)?;
    let reason = outcome["reason"].as_str().unwrap_or_default();
    let said =
        "memory is 67371008 bytes in 2 regions at the source and 67239936 bytes in 2 regions";
    if outcome["result"] != "kept" || !reason.contains(said) {
        bail!("{outcome:#}");
    }
    booted(&mut side, begin)?;
    side.terminate()
}

#[test]
#[ignore = "writes into tests/compat, see its README"]
fn write_golden_snapshot() -> Result<()> {
    let compat = concat!(env!("CARGO_MANIFEST_DIR"), "/../compat");
    let path = Path::new(compat).join("snapshot-2.state");
    ensure!(!path.exists(), "{} must not change", path.display());
    let folder = TempDir::new()?;
    let spec = spec(folder.path())?;
    let begin = Instant::now();
    let mut side = Side::boot(&spec)?;
    booted(&mut side, begin)?;
    let files = folder.path().join("files");
    std::fs::create_dir(&files)?;
    side.snapshot(&spec, &files)?;
    std::fs::copy(files.join("core"), path)?;
    Ok(())
}
