//! Bytes that the device saves besides its counters, as many as it was told, in a pattern that the
//! loading side knows.

use std::sync::atomic::{AtomicU64, Ordering};

use device_kit::{BulkState, StateError};
use migration::frame::{FrameError, MAX_CHUNK};

/// The pattern's period, which is that of no page and no chunk.
const PERIOD: u8 = 251;

/// The bytes, and how many have come.
#[derive(Debug)]
pub(crate) struct Ballast {
    bytes: u64,
    loaded: AtomicU64,
}

impl Ballast {
    pub(crate) fn new(bytes: u64) -> Self {
        Ballast {
            bytes,
            loaded: AtomicU64::new(0),
        }
    }

    /// How many are saved.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many have come since the last state began.
    pub(crate) fn loaded(&self) -> u64 {
        self.loaded.load(Ordering::Acquire)
    }
}

impl BulkState for Ballast {
    fn save(
        &self,
        send: &mut dyn FnMut(&[u8]) -> Result<(), FrameError>,
    ) -> Result<(), FrameError> {
        // A whole number of periods, so that each piece begins with one.
        let longest = MAX_CHUNK - MAX_CHUNK % usize::from(PERIOD);
        let piece: Vec<u8> = pattern(0).take(longest).collect();
        let mut left = self.bytes;
        while left > 0 {
            let len = usize::try_from(left).map_or(longest, |left| left.min(longest));
            send(&piece[..len])?;
            left -= len as u64;
        }
        Ok(())
    }

    fn begin(&self) {
        self.loaded.store(0, Ordering::Release);
    }

    fn load(&self, piece: &[u8]) -> Result<(), StateError> {
        let at = self.loaded();
        if !is_pattern(at, piece) {
            let what = format!("the ballast after {at} bytes is not what was saved");
            return Err(StateError(what));
        }
        self.loaded
            .store(at + piece.len() as u64, Ordering::Release);
        Ok(())
    }
}

/// Whether these bytes are the pattern from `at` on.
fn is_pattern(at: u64, bytes: &[u8]) -> bool {
    bytes.iter().copied().eq(pattern(at).take(bytes.len()))
}

fn pattern(at: u64) -> impl Iterator<Item = u8> {
    // Smaller than the period.
    let first = usize::try_from(at % u64::from(PERIOD)).unwrap_or(0);
    (0..PERIOD).cycle().skip(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_nothing_else() {
        let ballast = Ballast::new(3 << 20);
        let mut pieces = Vec::new();
        let send = &mut |piece: &[u8]| {
            pieces.push(piece.to_vec());
            Ok(())
        };
        ballast.save(send).unwrap();
        for _ in 0..2 {
            ballast.begin();
            pieces
                .iter()
                .try_for_each(|piece| ballast.load(piece))
                .unwrap();
            assert_eq!(ballast.loaded(), ballast.bytes());
        }
        ballast.begin();
        ballast.load(&pieces[0][..7]).unwrap();
        ballast.load(&pieces[0][7..]).unwrap();
        pieces[1][999] ^= 1;
        assert!(ballast.load(&pieces[1]).is_err());
    }
}
