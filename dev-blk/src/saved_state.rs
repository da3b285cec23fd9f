//! What travels when the block device moves.
//!
//! It is little: requests are drained before it is saved, ring indices travel with the front-end,
//! and the image, its size and the number of queues are what the device *is*.

use migration::schema::{Schema, SchemaError};
use serde::{Deserialize, Serialize};

/// The state, schema 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedState {
    /// Whether the driver chose a write-back cache (CONFIG_WCE); it does so at any time.
    pub(crate) writeback: bool,
}

impl Schema for SavedState {
    const KIND: &'static str = "blk";
    const NUMBER: u32 = 1;

    fn from_old(number: u32, _payload: &[u8]) -> Result<Self, SchemaError> {
        Err(SchemaError::unknown::<Self>(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schema_1_is_as_it_was_first_written() {
        // MessagePack: a map of one, "writeback": true. A change of these bytes is a new schema.
        let golden = b"\x81\xa9writeback\xc3";
        let state = SavedState { writeback: true };
        assert_eq!(state.encode().unwrap(), golden);
        assert_eq!(SavedState::decode(1, golden).unwrap(), state);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert!(SavedState::decode(2, b"\x81\xa9writeback\xc3").is_err());
        assert!(SavedState::decode(1, b"\x82\xa9writeback\xc3\xa1x\x01").is_err());
        assert!(SavedState::decode(1, b"\x80").is_err());
    }
}
