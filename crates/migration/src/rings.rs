//! Messages that Godwit adds to vhost-user, so that a device's rings, which were wired ahead, start
//! and stop by one message each however many they are.
//!
//! Who offers [`FEATURE`] as a protocol feature and has it accepted knows these requests more. Like
//! all of vhost-user they have a header of three 32-bit words (request, flags, size) and are in the
//! host's byte order. Each has an answer.
//!
//! | request | body | answer |
//! |---|---|---|
//! | [`START`] | for each ring its index and base, u32 each | nothing, or why not, as text |
//! | [`STOP`] | u32 1 or 0 | for each ring that ran its index and base; with a descriptor a second one: nothing, or why not, as text |
//! | [`HOLD`] | u32 1 or 0 | nothing, or why not, as text |
//! | [`FORECAST`] | | bytes, microseconds to stop, microseconds to start, u64 each |
//! | [`PREFAULT`] | | nothing |
//!
//! - A ring is *wired* when it has size, addresses, call and kick descriptor and is not enabled.
//! - START takes what only one process may have, as HOLD 1 does; then it sets the bases, enables the
//!   rings, and lets them run. If it says why not, nothing runs.
//! - STOP stops all rings, drained, and leaves them wired. If it comes with a descriptor, the device
//!   then saves its state into it, as after SET_DEVICE_STATE_FD; with 1, which needs a descriptor, it
//!   then gives up what only one process may have, as HOLD 0 does. The second answer says how that
//!   ended.
//! - HOLD 1 takes what only one process may have (the lock of an image); HOLD 0 gives it up, while
//!   no ring runs. Asking for what is so already is fine.
//! - FORECAST says what the device's part in a switchover will take, as far as it is known: bytes of
//!   state, and the time of its own that it takes to stop and to start.
//! - PREFAULT is answered when all of guest memory that holds something is mapped, so that no ring
//!   waits for it.

use std::time::Duration;

use crate::report::micros;

/// Bit of the protocol features.
pub const FEATURE: u64 = 1 << 63;
/// Starts wired rings.
pub const START: u32 = 0x4757_0001;
/// Stops all rings.
pub const STOP: u32 = 0x4757_0002;
/// Takes or gives up what only one process may have.
pub const HOLD: u32 = 0x4757_0003;
/// Says what a switchover will take.
pub const FORECAST: u32 = 0x4757_0004;
/// Maps what is there of guest memory.
pub const PREFAULT: u32 = 0x4757_0005;

/// Most rings in a message.
pub const MAX_RINGS: usize = 256;
/// Longest reason, in bytes.
pub const MAX_REASON: usize = 1024;

/// Where a ring starts or has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingBase {
    /// The ring's index.
    pub index: u16,
    /// Index of the next chain to be taken.
    pub base: u16,
}

/// What a device's part in a switchover will take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forecast {
    /// Bytes of state.
    pub bytes: u64,
    /// Its own time to stop.
    pub stop: Duration,
    /// Its own time to start.
    pub start: Duration,
}

impl Forecast {
    /// Answer to FORECAST.
    pub fn encode(&self) -> Vec<u8> {
        let words = [self.bytes, micros(self.stop), micros(self.start)];
        words.into_iter().flat_map(u64::to_ne_bytes).collect()
    }

    /// Reads what [`Self::encode`] made; `None` if it has another length.
    pub fn decode(answer: &[u8]) -> Option<Self> {
        let (words, []) = answer.as_chunks() else {
            return None;
        };
        let &[bytes, stop, start] = words else {
            return None;
        };
        let time = |word| Duration::from_micros(u64::from_ne_bytes(word));
        Some(Self {
            bytes: u64::from_ne_bytes(bytes),
            stop: time(stop),
            start: time(start),
        })
    }
}

/// Body of START, or answer to STOP.
pub fn encode(rings: &[RingBase]) -> Vec<u8> {
    let words = rings.iter().flat_map(|ring| [ring.index, ring.base]);
    words
        .flat_map(|word| u32::from(word).to_ne_bytes())
        .collect()
}

/// Reads what [`encode`] made; `None` if it is too long, cut off, or has a number beyond 16 bits.
pub fn decode(body: &[u8]) -> Option<Vec<RingBase>> {
    if body.len() > MAX_RINGS * 8 || !body.len().is_multiple_of(8) {
        return None;
    }
    let word = |bytes: &[u8]| {
        let word = bytes.try_into().map(u32::from_ne_bytes).ok()?;
        u16::try_from(word).ok()
    };
    body.chunks_exact(8)
        .map(|ring| {
            Some(RingBase {
                index: word(&ring[..4])?,
                base: word(&ring[4..])?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bases_come_out_as_they_went_in() {
        let rings = [(0, 65535), (255, 0)].map(|(index, base)| RingBase { index, base });
        let body = encode(&rings);
        assert_eq!(body.len(), 16);
        assert_eq!(decode(&body).unwrap(), rings);
        assert_eq!(decode(&[]).unwrap(), []);
    }

    #[test]
    fn a_forecast_comes_out_as_it_went_in() {
        let forecast = Forecast {
            bytes: 1 << 40,
            stop: Duration::from_millis(100),
            start: Duration::from_micros(1),
        };
        let answer = forecast.encode();
        assert_eq!(Forecast::decode(&answer), Some(forecast));
        for length in 0..answer.len() {
            assert_eq!(Forecast::decode(&answer[..length]), None);
        }
        assert_eq!(Forecast::decode(&[0; 32]), None);
    }

    #[test]
    fn nonsense_is_no_list_of_rings() {
        let body = encode(&[RingBase { index: 1, base: 2 }]);
        for length in 1..body.len() {
            assert_eq!(decode(&body[..length]), None);
        }
        assert_eq!(decode(&vec![0; (MAX_RINGS + 1) * 8]), None);
        let mut wide = body;
        wide[..4].copy_from_slice(&0x1_0000_u32.to_ne_bytes());
        assert_eq!(decode(&wide), None);
    }
}
