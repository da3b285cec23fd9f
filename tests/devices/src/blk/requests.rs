//! Requests of a block device, right and wrong ones, and what its options do.

use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use test_framework::frontend::{DeviceProcess, DeviceSpec, Machine};
use vm_memory::GuestAddress;

use super::{Blk, IMAGE_SECTORS, Kind, SECTOR};
use crate::subject::{Subject, options, running};

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn blk() -> Result<(Blk, Machine)> {
    running::<Blk>()
}

#[test]
fn config_space_describes_the_image() -> Result<()> {
    let (_blk, mut machine) = blk()?;
    let space = machine.connection.config(0, 60)?;
    let number = |at: usize, len: usize| {
        space[at..at + len]
            .iter()
            .rev()
            .fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    assert_eq!(number(0, 8), IMAGE_SECTORS);
    assert_eq!(number(12, 4), 254, "segments in a chain of 256");
    assert_eq!(number(20, 4), 512, "block size");
    assert_eq!(number(32, 1), 1, "write-back");
    assert_eq!(number(34, 2), Blk::QUEUES as u64);
    Ok(())
}

#[test]
fn only_the_cache_mode_can_be_written() -> Result<()> {
    let (_blk, mut machine) = blk()?;
    machine.connection.set_config(32, &[0])?;
    assert_eq!(machine.connection.config(32, 1)?, [0]);
    let before = machine.connection.config(0, 60)?;
    for (offset, data) in [
        (0, [1; 8].as_slice()),
        (32, &[2]),
        (32, &[1, 1]),
        (59, &[1; 8]),
    ] {
        machine.connection.set_config(offset, data)?;
        let after = machine.connection.config(0, 60)?;
        assert_eq!(after, before, "{data:?} at {offset} had an effect");
    }
    Ok(())
}

#[test]
fn the_serial_number_is_told() -> Result<()> {
    let (mut blk, mut machine) = blk()?;
    let (status, id) = blk.request(&mut machine, 0, Kind::GetId, 0, &[], 20)?;
    assert_eq!(status, OK);
    assert_eq!(&id, b"conformance\0\0\0\0\0\0\0\0\0");
    Ok(())
}

#[test]
fn requests_past_the_end_fail_and_harm_nothing() -> Result<()> {
    let (mut blk, mut machine) = blk()?;
    let last = IMAGE_SECTORS - 1;
    for sector in [IMAGE_SECTORS, u64::MAX, u64::MAX / 512, last] {
        let two = vec![1; 2 * SECTOR];
        let (status, _) = blk.request(&mut machine, 0, Kind::Out, sector, &two, 0)?;
        assert_eq!(status, IO_ERROR, "write at {sector}");
        let (status, _) = blk.request(&mut machine, 0, Kind::In, sector, &[], 2 * SECTOR)?;
        assert_eq!(status, IO_ERROR, "read at {sector}");
    }
    let (status, _) = blk.request(&mut machine, 0, Kind::In, last, &[], SECTOR)?;
    assert_eq!(status, OK);
    blk.exchange(&mut machine)?;
    let size = blk.image.as_file().metadata()?.size();
    assert_eq!(size, IMAGE_SECTORS * SECTOR as u64);
    Ok(())
}

#[test]
fn parts_of_sectors_are_refused() -> Result<()> {
    let (mut blk, mut machine) = blk()?;
    for len in [1, 511, 513] {
        let (status, _) = blk.request(&mut machine, 0, Kind::In, 0, &[], len)?;
        assert_eq!(status, IO_ERROR, "{len}");
    }
    Ok(())
}

#[test]
fn discarded_ranges_are_given_back() -> Result<()> {
    let (mut blk, mut machine) = blk()?;
    let megabyte = vec![0x5a; 1 << 20];
    let (status, _) = blk.request(&mut machine, 0, Kind::Out, 0, &megabyte, 0)?;
    assert_eq!(status, OK);
    let full = blk.image.as_file().metadata()?.blocks();
    let mut range = [0; 16];
    range[8..12].copy_from_slice(&2048u32.to_le_bytes());
    let (status, _) = blk.request(&mut machine, 0, Kind::Discard, 0, &range, 0)?;
    if status == UNSUPPORTED {
        // The file system of the temporary folder cannot; then it is not offered either.
        return Ok(());
    }
    assert_eq!(status, OK);
    let left = blk.image.as_file().metadata()?.blocks();
    ensure!(left + 2048 <= full, "{full} blocks became {left}");
    range[12] = 1;
    let (status, _) = blk.request(&mut machine, 0, Kind::Discard, 0, &range, 0)?;
    assert_eq!(status, UNSUPPORTED, "unmap has no meaning for discard");
    range[12] = 0;
    range[..8].copy_from_slice(&IMAGE_SECTORS.to_le_bytes());
    let (status, _) = blk.request(&mut machine, 0, Kind::Discard, 0, &range, 0)?;
    assert_eq!(status, IO_ERROR, "past the end");
    Ok(())
}

#[test]
fn an_indirect_table_is_followed() -> Result<()> {
    let (mut blk, mut machine) = blk()?;
    blk.exchange(&mut machine)?;
    let head = blk.submit(
        &mut machine,
        0,
        Kind::In,
        Blk::sector_of(0, 1000),
        &[],
        SECTOR,
    )?;
    // The same buffers once more, through a table of their own.
    let pending = blk.pending.get(&(0, head)).context("just submitted")?;
    let (data, status) = (pending.data, pending.status);
    machine.rings[0].kick()?;
    blk.verify_one(&mut machine, 0)?;
    let header = machine.ram.allocate(16, 16)?;
    let sector = Blk::sector_of(0, 1001);
    machine.ram.write(header, &[0; 8])?;
    machine
        .ram
        .write(GuestAddress(header.0 + 8), &sector.to_le_bytes())?;
    let buffer = |address, len, writable| test_framework::frontend::Buffer {
        address,
        len,
        writable,
    };
    let table = machine.ram.allocate(64, 16)?;
    let buffers = [
        buffer(header, 16, false),
        buffer(data, 512, true),
        buffer(status, 1, true),
    ];
    let Machine { rings, ram, .. } = &mut machine;
    let head = rings[0].add_indirect(ram, table, &buffers)?;
    rings[0].kick()?;
    let used = rings[0].wait_used(ram, test_framework::frontend::PATIENCE)?;
    assert_eq!((used.head, used.len), (head, 513));
    assert_eq!(ram.read(data, 1)?[0], blk.expected[&sector]);
    Ok(())
}

#[test]
fn read_only_is_offered_and_kept() -> Result<()> {
    let mut blk = Blk::new()?;
    let mut options = options(&blk);
    options.device.arguments.push("--read-only".to_owned());
    options.features |= 1 << 5;
    let mut machine = Machine::start(options)?;
    assert_ne!(machine.connection.features() & 1 << 5, 0);
    let (status, _) = blk.request(&mut machine, 0, Kind::Out, 0, &[1; SECTOR], 0)?;
    assert_eq!(status, IO_ERROR);
    let (status, _) = blk.request(&mut machine, 0, Kind::In, 0, &[], SECTOR)?;
    assert_eq!(status, OK);
    Ok(())
}

#[test]
fn an_image_that_shrank_fails_requests_and_no_more() -> Result<()> {
    let (mut blk, mut machine) = blk()?;
    blk.image.as_file().set_len(4096)?;
    let (status, _) = blk.request(&mut machine, 0, Kind::In, 1000, &[], SECTOR)?;
    assert_eq!(status, IO_ERROR);
    let (status, _) = blk.request(&mut machine, 0, Kind::In, 0, &[], SECTOR)?;
    assert_eq!(status, OK);
    Ok(())
}

/// Starts the program, which must end at once; returns what it said.
fn refused(arguments: &[String]) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let spec = DeviceSpec {
        program: Blk::PROGRAM,
        arguments: arguments.to_vec(),
    };
    let mut process = DeviceProcess::spawn(&spec, folder.path())?;
    let status = process.wait()?;
    ensure!(!status.success(), "it should have failed");
    ensure!(!process.socket().exists(), "it left its socket behind");
    let log = process.log();
    ensure!(log.lines().count() == 1, "more than one line: {log}");
    Ok(log)
}

#[test]
fn bad_images_are_named_on_one_line() -> Result<()> {
    let blk = Blk::new()?;
    let missing = refused(&["--blk-file=/no/such/image".to_owned()])?;
    assert!(
        missing.contains("--blk-file /no/such/image: cannot be opened"),
        "{missing}"
    );
    blk.image.as_file().set_len(1000)?;
    let odd = refused(&[blk.image_argument()])?;
    assert!(odd.contains("is 1000 bytes long"), "{odd}");
    let none = refused(&[])?;
    assert!(none.contains("--blk-file"), "{none}");
    let fd = refused(&["--blk-fd=77".to_owned()])?;
    assert!(fd.contains("--blk-fd 77: is no open descriptor"), "{fd}");
    Ok(())
}

#[test]
fn a_locked_image_is_said_to_be() -> Result<()> {
    let (blk, _machine) = blk()?;
    let taken = refused(&[blk.image_argument()])?;
    assert!(taken.contains("is locked by another process"), "{taken}");
    Ok(())
}
