//! The map of free pages, which a core and its machine's balloon share while the machine moves.
//!
//! The core makes the file, as long as [`length`] says, and sealed against any other length; the
//! balloon sets bits, the core takes them. A bit says: *what this page held when the round began
//! is not needed.* The core may then leave the page out, unless somebody has written it since.
//!
//! ```text
//! 0      u32   the round that the guest has ended of its own accord, or 0
//! 8      u64   pages marked since the file was made
//! 4096   a bit for each page from guest-physical 0 on, in words of 64, lowest bit first
//! ```
//! Rounds have numbers from 2 on ([`FIRST_ROUND`]), those of virtio-balloon's command ids; each is
//! begun by the core, and after it was stopped nothing is marked before the next one.

/// Bytes of guest memory for a bit.
pub const PAGE: u64 = 4096;
/// Where the round is that the guest has ended.
pub const ENDED_AT: usize = 0;
/// Where the number of marked pages is.
pub const MARKED_AT: usize = 8;
/// Where the bitmap begins.
pub const BITMAP_AT: usize = 4096;
/// The lowest number of a round (virtio 1.3, 5.5.6.7: 0 is *stop* and 1 is *done*).
pub const FIRST_ROUND: u32 = 2;

/// Bytes of the file for guest memory that ends at guest-physical address `end`.
pub fn length(end: u64) -> u64 {
    let words = end.div_ceil(PAGE).div_ceil(u64::BITS.into());
    BITMAP_AT as u64 + words * 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_page_has_a_bit() {
        assert_eq!(length(0), 4096);
        assert_eq!(length(1), 4096 + 8);
        assert_eq!(length(64 * PAGE), 4096 + 8);
        assert_eq!(length(64 * PAGE + 1), 4096 + 16);
    }
}
