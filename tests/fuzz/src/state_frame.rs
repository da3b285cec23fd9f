//! A saved-state stream from a hostile peer.

use migration::frame::{FrameReader, FrameWriter};
use migration::schema::{Schema, SchemaError, UnitId};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct State {
    text: String,
    numbers: Vec<u64>,
}

/// A right one, with some bulk.
pub fn frame() -> Vec<u8> {
    let state = State {
        text: "a state".into(),
        numbers: (0..40).map(|n| n << n).collect(),
    };
    let whole = || {
        let unit = UnitId::new("disk0").ok()?;
        let mut writer = FrameWriter::begin(Vec::new(), &unit, &state).ok()?;
        writer.bulk(&[7; 300]).ok()?;
        Some(writer.finish().ok()?.0)
    };
    whole().unwrap_or_default()
}

impl Schema for State {
    const KIND: &'static str = "blk";
    const NUMBER: u32 = 1;

    fn from_old(number: u32, _: &[u8]) -> Result<Self, SchemaError> {
        Err(SchemaError::unknown::<Self>(number))
    }
}

/// See the module.
pub fn state_frame(data: &[u8]) {
    let Ok(mut reader) = FrameReader::begin(data) else {
        return;
    };
    let Ok(unit) = UnitId::new("disk0") else {
        return;
    };
    if reader.structured::<State>(&unit).is_err() {
        return;
    }
    let mut bulk = Vec::new();
    while let Ok(Some(_)) = reader.bulk(&mut bulk) {}
    let _ = reader.finish();
}
