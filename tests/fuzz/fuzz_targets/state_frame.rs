//! A saved-state stream from a hostile peer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::frame::FrameReader;
use migration::schema::{Schema, SchemaError, UnitId};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct State {
    text: String,
    numbers: Vec<u64>,
}

impl Schema for State {
    const KIND: &'static str = "blk";
    const NUMBER: u32 = 1;

    fn from_old(number: u32, _: &[u8]) -> Result<Self, SchemaError> {
        Err(SchemaError::unknown::<Self>(number))
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(mut reader) = FrameReader::begin(data) else { return };
    let Ok(unit) = UnitId::new("disk0") else { return };
    if reader.structured::<State>(&unit).is_err() {
        return;
    }
    let mut bulk = Vec::new();
    while let Ok(Some(_)) = reader.bulk(&mut bulk) {}
    let _ = reader.finish();
});
