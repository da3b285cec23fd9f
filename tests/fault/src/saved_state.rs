//! What travels when the device moves: how far each queue has counted. The ballast follows it.

use device_kit::StateError;
use migration::schema::{Schema, SchemaError, decode_as};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

/// The state, schema 2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedState {
    /// By queue: the number of its next request.
    pub(crate) next: Vec<u64>,
    /// Bytes of ballast that follow.
    pub(crate) ballast: u64,
}

/// Schema 1, whose ballast was part of it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct First {
    next: Vec<u64>,
    #[serde(rename = "ballast")]
    _ballast: IgnoredAny,
}

impl SavedState {
    /// Refuses a state that no device with so many queues has saved. So many bytes of ballast have
    /// come with it.
    pub(crate) fn check(&self, queues: u16, ballast: u64) -> Result<(), StateError> {
        if self.next.len() != usize::from(queues) {
            let found = self.next.len();
            return Err(StateError(format!(
                "state of {found} queues, there are {queues}"
            )));
        }
        if self.ballast != ballast {
            return Err(StateError(format!(
                "{ballast} bytes of ballast came, {} were saved",
                self.ballast
            )));
        }
        Ok(())
    }
}

impl Schema for SavedState {
    const KIND: &'static str = "fault";
    const NUMBER: u32 = 2;

    fn from_old(number: u32, payload: &[u8]) -> Result<Self, SchemaError> {
        if number != 1 {
            return Err(SchemaError::unknown::<Self>(number));
        }
        let First { next, .. } = decode_as::<Self, _>(number, payload)?;
        Ok(Self { next, ballast: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_saved_is_refused() {
        let state = SavedState {
            next: vec![3, 4],
            ballast: 1000,
        };
        state.check(2, 1000).unwrap();
        assert!(state.check(3, 1000).is_err());
        assert!(state.check(2, 999).is_err());
    }
}
