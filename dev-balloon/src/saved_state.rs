//! What travels when the balloon moves.
//!
//! Rings are drained, and what hangs in them is a request of statistics that was put back. A round
//! of free page hints does not travel: it ends with the move.

use migration::schema::{Schema, SchemaError};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteArray;

use crate::page_set::{BLOCK_PAGES, PageSet};
use crate::statistics::{self, MAX_INTERVAL};

/// Pages beyond this have no address in the protocol.
const MAX_PAGE: u64 = 1 << 32;
/// Bytes of a block's bitmap.
const BLOCK_BYTES: usize = 64;

/// The state, schema 1. Sizes are in pages of 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedState {
    /// What the host wants.
    pub(crate) target: u32,
    /// What the guest says it has given.
    pub(crate) actual: u32,
    /// What the guest fills free pages with.
    pub(crate) poison: u32,
    /// The last round of free page hints; 0: there was none.
    pub(crate) last_round: u32,
    /// What the guest said of its memory last.
    pub(crate) statistics: Vec<(u16, u64)>,
    /// Seconds between two questions for that, when they are others than the options say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) statistics_interval: Option<u32>,
    /// The pages in the balloon.
    pub(crate) pages: SavedPages,
}

/// Pages: blocks of 512 that are whole, in runs, and bitmaps of the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedPages {
    /// First block and number of blocks.
    whole: Vec<(u64, u64)>,
    /// Block and a bit for each of its pages.
    parts: Vec<(u64, ByteArray<BLOCK_BYTES>)>,
}

impl Schema for SavedState {
    const KIND: &'static str = "balloon";
    const NUMBER: u32 = 1;

    fn from_old(number: u32, _payload: &[u8]) -> Result<Self, SchemaError> {
        Err(SchemaError::unknown::<Self>(number))
    }
}

impl From<&PageSet> for SavedPages {
    fn from(set: &PageSet) -> Self {
        let mut saved = Self::default();
        for (block, words) in set.blocks() {
            if words.iter().all(|word| *word == !0) {
                match saved.whole.last_mut() {
                    Some((first, count)) if *first + *count == block => *count += 1,
                    _ => saved.whole.push((block, 1)),
                }
                continue;
            }
            let mut bytes = [0; BLOCK_BYTES];
            for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
                place.copy_from_slice(&word.to_le_bytes());
            }
            saved.parts.push((block, ByteArray::new(bytes)));
        }
        saved
    }
}

impl TryFrom<&SavedPages> for PageSet {
    type Error = String;

    fn try_from(saved: &SavedPages) -> Result<Self, String> {
        let mut set = Self::default();
        let mut next = 0;
        for (first, count) in &saved.whole {
            let end = first.saturating_add(*count);
            if *first < next || *count == 0 || end > MAX_PAGE / BLOCK_PAGES {
                return Err(format!("{count} blocks of pages from {first} on cannot be"));
            }
            next = end;
            set.insert_run(first * BLOCK_PAGES, count * BLOCK_PAGES);
        }
        let mut next = 0;
        for (block, bytes) in &saved.parts {
            let known = set.has_all(block.saturating_mul(BLOCK_PAGES), 1);
            if *block < next || *block >= MAX_PAGE / BLOCK_PAGES || known {
                return Err(format!("block {block} of pages cannot be"));
            }
            next = block + 1;
            let mut words = [0; 8];
            for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            if words == [0; 8] {
                return Err(format!("block {block} has no pages"));
            }
            set.insert_block(*block, words);
        }
        Ok(set)
    }
}

impl SavedState {
    /// The pages in the balloon, when all of the state is sound.
    pub(crate) fn check(&self) -> Result<PageSet, String> {
        if self.statistics.len() > statistics::MOST {
            return Err(format!("{} statistics", self.statistics.len()));
        }
        if let Some((tag, _)) = self
            .statistics
            .iter()
            .find(|(tag, _)| statistics::name(*tag).is_none())
        {
            return Err(format!("statistic {tag} is unknown"));
        }
        if let Some(seconds) = self.statistics_interval.filter(|s| *s > MAX_INTERVAL) {
            return Err(format!("statistics every {seconds} s"));
        }
        PageSet::try_from(&self.pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> SavedState {
        let mut set = PageSet::default();
        set.insert_run(512, 1024);
        set.insert(7);
        SavedState {
            target: 2000,
            actual: 1025,
            poison: 0xaaaa_aaaa,
            last_round: 5,
            statistics: vec![(4, 1 << 40)],
            statistics_interval: None,
            pages: SavedPages::from(&set),
        }
    }

    #[test]
    fn schema_1_is_as_it_was_first_written() {
        let mut golden = Vec::new();
        golden.extend(b"\x86\xa6target\xcd\x07\xd0\xa6actual\xcd\x04\x01");
        golden.extend(b"\xa6poison\xce\xaa\xaa\xaa\xaa\xaalast_round\x05");
        golden.extend(b"\xaastatistics\x91\x92\x04\xcf\0\0\x01\0\0\0\0\0");
        golden.extend(b"\xa5pages\x82\xa5whole\x91\x92\x01\x02");
        golden.extend(b"\xa5parts\x91\x92\x00\xc4\x40\x80");
        golden.extend([0; 63]);
        assert_eq!(state().encode().unwrap(), golden);
        let decoded = SavedState::decode(1, &golden).unwrap();
        assert_eq!(decoded, state());
        assert_eq!(decoded.check().unwrap().runs(), [(7, 1), (512, 1024)]);
        assert!(SavedState::decode(2, &golden).is_err());
    }

    #[test]
    fn an_interval_is_there_when_it_was_set() {
        let state = SavedState {
            statistics_interval: Some(60),
            ..state()
        };
        let written = state.encode().unwrap();
        assert_eq!(SavedState::decode(1, &written).unwrap(), state);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let block = |block, byte| {
            let mut bytes = [0; BLOCK_BYTES];
            bytes[9] = byte;
            (block, ByteArray::new(bytes))
        };
        let mut bad = Vec::new();
        for whole in [
            vec![(1, 0)],
            vec![(5, 1), (5, 1)],
            vec![(0, u64::MAX)],
            vec![(u64::MAX, 1)],
        ] {
            bad.push(SavedPages {
                whole,
                parts: vec![],
            });
        }
        for parts in [
            vec![block(3, 0)],
            vec![block(3, 1), block(3, 2)],
            vec![block(1 << 23, 1)],
            vec![block(u64::MAX, 1)],
            vec![block(8, 1)],
        ] {
            bad.push(SavedPages {
                whole: vec![(8, 1)],
                parts,
            });
        }
        for pages in bad {
            let state = SavedState { pages, ..state() };
            assert!(state.check().is_err(), "{state:?}");
        }
        let unknown = SavedState {
            statistics: vec![(99, 1)],
            ..state()
        };
        assert_eq!(unknown.check().unwrap_err(), "statistic 99 is unknown");
        let seldom = SavedState {
            statistics_interval: Some(3601),
            ..state()
        };
        assert_eq!(seldom.check().unwrap_err(), "statistics every 3601 s");
    }
}
