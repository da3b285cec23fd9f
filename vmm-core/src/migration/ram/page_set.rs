//! A set of the machine's pages.

use super::{PAGE, WORD_PAGES};
use crate::memory::Region;

/// A bit for each page of each region.
#[derive(Clone, Debug)]
pub struct PageSet {
    /// By guest-physical address.
    regions: Vec<Bits>,
}

#[derive(Clone, Debug)]
struct Bits {
    first: u64,
    pages: u64,
    words: Vec<u64>,
}

impl Bits {
    /// The bits of word `at` that are pages.
    fn mask(&self, at: usize) -> u64 {
        let before = at as u64 * WORD_PAGES;
        match self.pages.saturating_sub(before) {
            0 => 0,
            n @ 1..WORD_PAGES => (1 << n) - 1,
            _ => !0,
        }
    }

    /// Which word has `page`, and which of its bits.
    fn position(&self, page: u64) -> Option<(usize, u32)> {
        let offset = page.checked_sub(self.first)?;
        if offset >= self.pages {
            return None;
        }
        // Inside the region, which is mapped.
        let word = usize::try_from(offset / WORD_PAGES).ok()?;
        Some((word, (offset % WORD_PAGES) as u32))
    }
}

impl PageSet {
    /// No page of `regions`, which are in the order of their addresses.
    pub fn new(regions: &[Region]) -> Self {
        let bits = |region: &Region| {
            let pages = region.size() / PAGE;
            let words = usize::try_from(pages.div_ceil(WORD_PAGES)).unwrap_or(0);
            Bits {
                first: region.gpa() / PAGE,
                pages,
                words: vec![0; words],
            }
        };
        Self {
            regions: regions.iter().map(bits).collect(),
        }
    }

    /// Adds every page.
    pub fn fill(&mut self) {
        for region in &mut self.regions {
            for at in 0..region.words.len() {
                region.words[at] = region.mask(at);
            }
        }
    }

    /// Adds pages: `words` of bits from page `first` on, which is a multiple of 64 pages from the
    /// start of a region. Bits that are no page are dropped.
    pub fn insert(&mut self, first: u64, words: &[u64]) {
        let region = self
            .regions
            .iter_mut()
            .find_map(|region| Some((region.position(first)?.0, region)));
        let Some((start, region)) = region else {
            return;
        };
        for (at, word) in (start..region.words.len()).zip(words) {
            region.words[at] |= word & region.mask(at);
        }
    }

    /// Whether the page is in it.
    pub fn contains(&self, page: u64) -> bool {
        let found = self.regions.iter().find_map(|region| {
            let (word, bit) = region.position(page)?;
            Some(region.words[word] >> bit & 1 != 0)
        });
        found.unwrap_or(false)
    }

    /// Pages in it.
    pub fn count(&self) -> u64 {
        let words = self.regions.iter().flat_map(|region| &region.words);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        let mut words = self.regions.iter().flat_map(|region| &region.words);
        words.all(|word| *word == 0)
    }

    /// Takes out up to `words` words' pages of one region, from the first word that has any: the
    /// number of the first page, and the words. `None` when it is empty.
    pub fn take_chunk(&mut self, words: usize) -> Option<(u64, Vec<u64>)> {
        let (region, start) = self.regions.iter_mut().find_map(|region| {
            let start = region.words.iter().position(|word| *word != 0)?;
            Some((region, start))
        })?;
        let end = region.words.len().min(start + words);
        let first = region.first + start as u64 * WORD_PAGES;
        let chunk = region.words[start..end].to_vec();
        region.words[start..end].fill(0);
        Some((first, chunk))
    }

    /// Takes these pages out: `words` of bits from page `first` on; those that were in it.
    pub fn take(&mut self, first: u64, words: &[u64]) -> Vec<u64> {
        let region = self
            .regions
            .iter_mut()
            .find_map(|region| Some((region.position(first)?.0, region)));
        let Some((start, region)) = region else {
            return Vec::new();
        };
        let taken = region.words[start..].iter_mut().zip(words);
        taken
            .map(|(word, wanted)| {
                let both = *word & wanted;
                *word &= !wanted;
                both
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Ram;
    use std::sync::Arc;

    /// 70 pages at 0, 64 at 4 GiB.
    fn set() -> PageSet {
        let ram = Ram::allocate(134 * PAGE, None).unwrap();
        let file = Arc::clone(ram.file());
        let low = Region::map(0, 70 * PAGE, Arc::clone(&file), 0).unwrap();
        let high = Region::map(1 << 32, 64 * PAGE, file, 70 * PAGE).unwrap();
        PageSet::new(&[low, high])
    }

    #[test]
    fn only_pages_that_there_are_are_in_it() {
        let mut set = set();
        set.insert(64, &[!0, !0]);
        assert_eq!(set.count(), 6);
        set.insert(1 << 20, &[1]);
        set.insert(5 << 20, &[1]);
        assert_eq!(set.count(), 7);
        assert!(set.contains(69) && set.contains(1 << 20));
        assert!(!set.contains(70) && !set.contains(63));
        set.fill();
        assert_eq!(set.count(), 134);
    }

    #[test]
    fn chunks_come_out_in_order_until_it_is_empty() {
        let mut set = set();
        set.insert(0, &[0b100]);
        set.insert(64, &[0b10]);
        set.insert(1 << 20, &[1 << 63]);
        assert_eq!(set.take_chunk(1), Some((0, vec![0b100])));
        assert_eq!(set.take_chunk(16), Some((64, vec![0b10])));
        assert_eq!(set.take_chunk(16), Some((1 << 20, vec![1 << 63])));
        assert!(set.is_empty());
        assert_eq!(set.take_chunk(16), None);
    }

    #[test]
    fn what_is_taken_is_out_and_the_rest_stays() {
        let mut set = set();
        set.insert(0, &[0b111, 1]);
        assert_eq!(set.take(0, &[0b101, 0]), [0b101, 0]);
        assert_eq!(set.count(), 2);
        assert!(set.contains(1) && set.contains(64));
    }
}
