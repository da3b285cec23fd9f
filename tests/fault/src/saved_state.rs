//! What travels when the device moves: how far each queue has counted, and as many bytes besides
//! as it was told to save.

use device_kit::StateError;
use migration::schema::{Schema, SchemaError};
use serde::{Deserialize, Serialize};

/// The state, schema 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedState {
    /// By queue: the number of its next request.
    pub(crate) next: Vec<u64>,
    /// A pattern that the loading side knows.
    #[serde(with = "serde_bytes")]
    pub(crate) ballast: Vec<u8>,
}

impl SavedState {
    pub(crate) fn new(next: Vec<u64>, bytes: usize) -> Self {
        SavedState {
            next,
            ballast: ballast(bytes),
        }
    }

    /// Refuses a state that no device with so many queues has saved.
    pub(crate) fn check(&self, queues: u16) -> Result<(), StateError> {
        if self.next.len() != usize::from(queues) {
            let found = self.next.len();
            return Err(StateError(format!(
                "state of {found} queues, there are {queues}"
            )));
        }
        if self.ballast != ballast(self.ballast.len()) {
            return Err(StateError("the ballast is not what was saved".to_owned()));
        }
        Ok(())
    }
}

/// Bytes in no period that a page or a chunk has.
fn ballast(bytes: usize) -> Vec<u8> {
    (0..251).cycle().take(bytes).collect()
}

impl Schema for SavedState {
    const KIND: &'static str = "fault";
    const NUMBER: u32 = 1;

    fn from_old(number: u32, _payload: &[u8]) -> Result<Self, SchemaError> {
        Err(SchemaError::unknown::<Self>(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_saved_is_refused() {
        let state = SavedState::new(vec![3, 4], 1000);
        state.check(2).unwrap();
        assert!(state.check(3).is_err());
        let mut damaged = state;
        damaged.ballast[999] ^= 1;
        assert!(damaged.check(2).is_err());
    }
}
