//! Every target with what is right, and with as many mutants of it as `GODWIT_FUZZ_RUNS` says, which
//! are the same each time.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use migration::frame::FrameReader;
use migration::ram::{PAGE, PageRead, RamWriter};
use migration::rings::{self, Forecast, RingBase};
use migration::schema::{Schema, SchemaError, UnitId};
use migration::wire::{Blob, Definition, Hello, MemoryTransfer, PROTOCOL, ToDestination, ToSource};
use serde::{Deserialize, Serialize};
use vmm_core::migration::saved_state::WiringState;

/// Mutants of each seed, unless somebody wants more.
const RUNS: u64 = 1000;

fn hostile(target: impl Fn(&[u8]), seeds: &[Vec<u8>]) -> Result<()> {
    some(target, seeds, 1)
}

/// The same with so many times fewer mutants.
fn some(target: impl Fn(&[u8]), seeds: &[Vec<u8>], fewer: u64) -> Result<()> {
    ensure!(!seeds.is_empty(), "nothing to begin with");
    let runs = match std::env::var("GODWIT_FUZZ_RUNS") {
        Ok(runs) => runs.parse().context("GODWIT_FUZZ_RUNS is no number")?,
        Err(_) => RUNS,
    };
    let mut random = Rng::with_seed(1);
    for seed in seeds {
        target(seed);
        for _ in 0..runs / fewer {
            target(&test_fuzz::mutated(seed, &mut random));
        }
    }
    Ok(())
}

fn compat(name: &str) -> Result<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../compat")
        .join(name);
    fs::read(&path).with_context(|| path.display().to_string())
}

/// What is in the golden snapshot.
#[derive(Serialize, Deserialize)]
struct Snapshot {
    definition: Definition,
    core: Blob,
}

impl Schema for Snapshot {
    const KIND: &'static str = "snapshot";
    const NUMBER: u32 = 1;

    fn from_old(number: u32, _: &[u8]) -> Result<Self, SchemaError> {
        Err(SchemaError::unknown::<Self>(number))
    }
}

fn snapshot() -> Result<Snapshot> {
    let golden = compat("snapshot-1.state")?;
    let mut reader = FrameReader::begin(golden.as_slice())?;
    Ok(reader.structured(&UnitId::new("core")?)?)
}

#[test]
fn saved_state() -> Result<()> {
    let golden = ["balloon", "blk", "fault", "net", "snapshot"];
    let golden = golden.map(|kind| compat(&format!("{kind}-1.state")));
    let mut seeds = golden.into_iter().collect::<Result<Vec<_>>>()?;
    seeds.push(test_fuzz::frame());
    hostile(test_fuzz::state_frame, &seeds)
}

#[test]
fn messages_between_cores() -> Result<()> {
    let Snapshot { definition, core } = snapshot()?;
    let hello = Hello {
        protocol: PROTOCOL,
        definition,
        memory: MemoryTransfer::Copied { channels: 4 },
        memory_used: 1 << 20,
    };
    let wiring = core.clone();
    let to_destination = [
        ToDestination::Hello(hello),
        ToDestination::Wiring(wiring),
        ToDestination::Commit,
    ];
    let to_source = [
        ToSource::Prepared {
            core_us: 1,
            devices_us: 2,
        },
        ToSource::Refused {
            reasons: vec!["none".into()],
        },
    ];
    let mut seeds = Vec::new();
    for message in &to_destination {
        seeds.push(rmp_serde::to_vec_named(message)?);
    }
    for message in &to_source {
        seeds.push(rmp_serde::to_vec_named(message)?);
    }
    let framed: Vec<_> = seeds.iter().map(|seed| test_fuzz::framed(seed)).collect();
    seeds.extend(framed);
    hostile(test_fuzz::link, &seeds)
}

#[test]
fn memory_channels() -> Result<()> {
    let mut channel = Vec::new();
    let mut writer = RamWriter::begin(&mut channel, 1)?;
    let read = |page: u64, into: &mut [u8]| {
        into.fill(page.to_le_bytes()[0] | 1);
        Ok(PageRead::Filled)
    };
    // The second record, and the fifth, are this channel's.
    writer.pages(64, 0b1011, read, |_| false)?;
    writer.pages(256, 0b1, read, |_| false)?;
    writer.end()?;
    assert!(channel.len() > 4 * PAGE);
    // Records as the target makes them: a kind, a page, pages with content, and such that are zero.
    let record: Vec<u8> = [&1u32.to_le_bytes()[..], &64u64.to_le_bytes()]
        .concat()
        .into_iter()
        .chain(5u64.to_le_bytes())
        .chain(2u64.to_le_bytes())
        .collect();
    some(test_fuzz::ram, &[channel, record.repeat(3)], 2)
}

#[test]
fn state_of_a_core() -> Result<()> {
    let wiring = WiringState {
        devices: Vec::new(),
    };
    let seeds = [
        snapshot()?.core.payload,
        wiring.encode()?,
        rings::encode(&[RingBase { index: 1, base: 2 }]),
        Forecast::default().encode(),
    ];
    hostile(test_fuzz::core_state, &seeds)
}

#[test]
fn state_of_a_platform() -> Result<()> {
    hostile(test_fuzz::platform_state, &test_fuzz::platform_seeds())
}

#[test]
fn clients_of_a_device() -> Result<()> {
    // A server each.
    let seeds = test_fuzz::vfio_user_requests();
    some(test_fuzz::vfio_user_server, &seeds, 4)
}

#[test]
fn servers_of_a_device() -> Result<()> {
    hostile(test_fuzz::vfio_user_client, &test_fuzz::vfio_user_replies())
}

#[test]
fn kernels() -> Result<()> {
    let guest = fs::read(test_guest::program())?;
    // Its headers alone are refused early.
    let headers = guest[..guest.len().min(8192)].to_vec();
    hostile(test_fuzz::kernel, &[headers])?;
    some(test_fuzz::kernel, &[guest], 8)
}
