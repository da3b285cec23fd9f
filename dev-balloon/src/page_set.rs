//! A set of guest pages, as large as what is in it: the pages in the balloon.

use std::collections::BTreeMap;

/// Pages of a block: 2 MiB.
pub(crate) const BLOCK_PAGES: u64 = 512;
/// Words of a block.
const WORDS: usize = 8;
const WORD_PAGES: u64 = u64::BITS as u64;
const FULL: [u64; WORDS] = [!0; WORDS];

/// A bit for each page of the blocks that have any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageSet {
    blocks: BTreeMap<u64, [u64; WORDS]>,
}

/// Its block, and the word and bit in there.
fn place(page: u64) -> (u64, usize, u64) {
    let within = page % BLOCK_PAGES;
    // Less than WORDS.
    let word = (within / WORD_PAGES) as usize;
    (page / BLOCK_PAGES, word, 1 << (within % WORD_PAGES))
}

impl PageSet {
    /// Adds a page.
    pub(crate) fn insert(&mut self, page: u64) {
        let (block, word, bit) = place(page);
        self.blocks.entry(block).or_default()[word] |= bit;
    }

    /// Takes a page out.
    pub(crate) fn remove(&mut self, page: u64) {
        let (block, word, bit) = place(page);
        if let Some(words) = self.blocks.get_mut(&block) {
            words[word] &= !bit;
            if *words == [0; WORDS] {
                self.blocks.remove(&block);
            }
        }
    }

    /// Whether `pages` pages from `first` on are all in it.
    pub(crate) fn has_all(&self, first: u64, pages: u64) -> bool {
        let end = first.saturating_add(pages);
        let mut page = first;
        while page < end {
            let (block, word, bit) = place(page);
            let Some(words) = self.blocks.get(&block) else {
                return false;
            };
            if page.is_multiple_of(BLOCK_PAGES) && end - page >= BLOCK_PAGES {
                if *words != FULL {
                    return false;
                }
                page += BLOCK_PAGES;
            } else {
                if words[word] & bit == 0 {
                    return false;
                }
                page += 1;
            }
        }
        true
    }

    /// The pages in it, in runs: first page and number of pages, ascending.
    pub(crate) fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut add = |first: u64, pages: u64| match runs.last_mut() {
            Some((start, len)) if *start + *len == first => *len += pages,
            _ => runs.push((first, pages)),
        };
        for (block, words) in &self.blocks {
            let first = block * BLOCK_PAGES;
            if *words == FULL {
                add(first, BLOCK_PAGES);
                continue;
            }
            for (at, word) in (0..).zip(words) {
                let start = first + at * WORD_PAGES;
                (0..WORD_PAGES)
                    .filter(|bit| word >> bit & 1 != 0)
                    .for_each(|bit| add(start + bit, 1));
            }
        }
        runs
    }

    /// Adds pages in a run.
    pub(crate) fn insert_run(&mut self, first: u64, pages: u64) {
        let end = first.saturating_add(pages);
        let mut page = first;
        while page < end {
            if page.is_multiple_of(BLOCK_PAGES) && end - page >= BLOCK_PAGES {
                self.blocks.insert(page / BLOCK_PAGES, FULL);
                page += BLOCK_PAGES;
            } else {
                self.insert(page);
                page += 1;
            }
        }
    }

    /// The blocks that have any page, with their words, ascending.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (u64, &[u64; WORDS])> {
        self.blocks.iter().map(|(block, words)| (*block, words))
    }

    /// Adds the pages of a block.
    pub(crate) fn insert_block(&mut self, block: u64, words: [u64; WORDS]) {
        let known = self.blocks.entry(block).or_default();
        known.iter_mut().zip(words).for_each(|(k, w)| *k |= w);
    }

    /// Pages in it.
    pub(crate) fn count(&self) -> u64 {
        let words = self.blocks.values().flatten();
        words.map(|word| u64::from(word.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_go_over_the_borders_of_words_and_blocks() {
        let mut set = PageSet::default();
        for page in [7, 62, 63, 64, 511, 512, 1025] {
            set.insert(page);
        }
        assert_eq!(set.runs(), [(7, 1), (62, 3), (511, 2), (1025, 1)]);
        assert_eq!(set.count(), 7);
        set.remove(63);
        set.remove(1025);
        set.remove(9999);
        assert_eq!(set.runs(), [(7, 1), (62, 1), (64, 1), (511, 2)]);
        assert_eq!(set.blocks.len(), 2);
    }

    #[test]
    fn a_run_goes_in_and_comes_out_as_it_was() {
        let mut set = PageSet::default();
        set.insert_run(500, 3000);
        assert_eq!(set.runs(), [(500, 3000)]);
        assert!(set.has_all(500, 3000) && set.has_all(512, 512) && set.has_all(1, 0));
        assert!(!set.has_all(499, 2) && !set.has_all(3000, 501));
        set.remove(1024);
        assert!(!set.has_all(1024, 512) && set.has_all(512, 512));
        assert_eq!(set.count(), 2999);
    }
}
