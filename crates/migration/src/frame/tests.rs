use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Lamp {
    brightness: u64,
    history: Vec<u8>,
}

impl Schema for Lamp {
    const KIND: &'static str = "lamp";
    const NUMBER: u32 = 3;

    fn from_old(number: u32, _payload: &[u8]) -> Result<Self, SchemaError> {
        Err(SchemaError::unknown::<Self>(number))
    }
}

fn unit() -> UnitId {
    UnitId::new("lamp0").unwrap()
}

fn lamp() -> Lamp {
    Lamp {
        brightness: 77,
        history: vec![1, 2, 3],
    }
}

fn saved(state: &Lamp, bulk: &[&[u8]]) -> Vec<u8> {
    let mut writer = FrameWriter::begin(Vec::new(), &unit(), state).unwrap();
    for part in bulk {
        writer.bulk(part).unwrap();
    }
    let (bytes, len) = writer.finish().unwrap();
    assert_eq!(len, bytes.len() as u64);
    bytes
}

fn load(bytes: &[u8]) -> Result<(Lamp, Vec<u8>), FrameError> {
    let mut reader = FrameReader::begin(bytes)?;
    let lamp = reader.structured(&unit())?;
    let mut all = Vec::new();
    let mut chunk = Vec::new();
    while reader.bulk(&mut chunk)?.is_some() {
        all.extend_from_slice(&chunk);
    }
    Ok((lamp, all))
}

#[test]
fn what_is_written_is_read() {
    let big = vec![9; MAX_CHUNK + 5];
    let bytes = saved(&lamp(), &[b"abc", &big]);
    let (state, bulk) = load(&bytes).unwrap();
    assert_eq!(state, lamp());
    assert_eq!(bulk, [b"abc".as_slice(), &big].concat());
}

#[test]
fn a_structured_part_of_several_chunks_is_one() {
    let state = Lamp {
        brightness: 1,
        history: vec![5; 2 * MAX_CHUNK],
    };
    assert_eq!(load(&saved(&state, &[])).unwrap().0, state);
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = saved(&lamp(), &[b"bulk"]);
    for end in 0..bytes.len() {
        let error = load(&bytes[..end]).unwrap_err();
        assert!(
            matches!(error, FrameError::Truncated { .. }),
            "{end}: {error}"
        );
    }
}

#[test]
fn every_flipped_bit_is_an_error() {
    let bytes = saved(&lamp(), &[b"bulk"]);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            assert!(load(&damaged).is_err(), "byte {at} bit {bit}");
        }
    }
}

#[test]
fn what_follows_the_end_is_an_error() {
    let mut bytes = saved(&lamp(), &[]);
    bytes.push(0);
    assert!(matches!(load(&bytes), Err(FrameError::Surplus { .. })));
}

#[test]
fn state_of_another_unit_or_kind_is_refused_by_name() {
    let bytes = saved(&lamp(), &[]);
    let mut reader = FrameReader::begin(bytes.as_slice()).unwrap();
    let other = UnitId::new("lamp1").unwrap();
    let error = reader.structured::<Lamp>(&other).unwrap_err().to_string();
    assert_eq!(
        error,
        r#"state of "lamp" unit "lamp0" was given to "lamp" unit "lamp1""#
    );
}

#[test]
fn an_unknown_schema_is_named() {
    let mut bytes = saved(&lamp(), &[]);
    bytes[12] = 9;
    let error = load(&bytes).unwrap_err().to_string();
    assert_eq!(
        error,
        "schema 9 of lamp is unknown here, the newest known is 3"
    );
}

#[test]
fn bulk_that_nobody_takes_is_an_error() {
    let bytes = saved(&lamp(), &[b"x"]);
    let mut reader = FrameReader::begin(bytes.as_slice()).unwrap();
    reader.structured::<Lamp>(&unit()).unwrap();
    assert!(matches!(
        reader.finish(),
        Err(FrameError::Unconsumed { .. })
    ));
}

#[test]
fn a_huge_length_is_refused_before_it_is_allocated() {
    let mut bytes = saved(&lamp(), &[]);
    bytes[HEADER_LEN + 4..HEADER_LEN + 8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(
        load(&bytes),
        Err(FrameError::TooLong { what: "chunk", .. })
    ));
}

#[test]
fn structured_chunks_without_end_are_refused() {
    let header = saved(&lamp(), &[])[..HEADER_LEN].to_vec();
    let mut chunk = Vec::new();
    chunk.extend_from_slice(&STRUCTURED.to_le_bytes());
    chunk.extend_from_slice(&u32::try_from(MAX_CHUNK).unwrap().to_le_bytes());
    chunk.resize(CHUNK_HEADER_LEN + MAX_CHUNK, 0);
    let bytes = [header, chunk.repeat(MAX_STRUCTURED / MAX_CHUNK + 1)].concat();
    assert!(matches!(
        load(&bytes),
        Err(FrameError::TooLong {
            what: "structured part",
            ..
        })
    ));
}

#[test]
fn the_structured_part_comes_first() {
    let bytes = saved(&lamp(), &[]);
    let mut damaged = bytes.clone();
    damaged[HEADER_LEN] = 2;
    assert!(matches!(
        load(&damaged),
        Err(FrameError::Chunk { found: 2, .. })
    ));
}
