//! What is written to disks and memory: words that tell where they belong and when they were
//! written, so that a wrong one says what went wrong.

/// A well-mixed word of a number (the finaliser of SplitMix64).
pub fn mix(number: u64) -> u64 {
    let a = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let b = (a ^ a >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    b ^ b >> 31
}

/// A cheap random sequence.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) % limit as u64) as usize
    }
}

/// The content of one block of a disk.
#[derive(Clone, Copy)]
pub struct Content {
    base: u64,
}

impl Content {
    /// What the `generation`-th write of a block puts there.
    pub fn new(disk: u32, sector: u64, generation: u32) -> Self {
        Self {
            base: mix(mix(u64::from(disk) << 32 | u64::from(generation)) ^ sector),
        }
    }

    /// The n-th 64-bit word.
    pub fn word(self, n: u64) -> u64 {
        self.base
            .wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }
}
