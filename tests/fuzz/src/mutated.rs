//! Bytes that are almost right.

use fastrand::Rng;

/// Values at which something ends.
const EDGES: [u64; 9] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff_ffff,
    0xffff_ffff,
    i64::MAX as u64,
    u64::MAX - 1,
    u64::MAX,
];

/// `right` with one to six things wrong.
pub fn mutated(right: &[u8], random: &mut Rng) -> Vec<u8> {
    let mut bytes = right.to_vec();
    for _ in 0..random.usize(1..=6) {
        mutate(&mut bytes, random);
    }
    bytes
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Rng) {
    let at = random.usize(0..=bytes.len());
    let rest = bytes.len() - at;
    match random.u8(0..6) {
        0 if rest > 0 => bytes[at] ^= 1 << random.u8(0..8),
        1 if rest > 0 => bytes[at] = random.u8(..),
        2 => bytes.truncate(at),
        3 => {
            let more: Vec<u8> = (0..random.usize(0..64)).map(|_| random.u8(..)).collect();
            bytes.splice(at..at, more);
        }
        4 => {
            // A part of it a second time.
            let part = bytes[at..at + random.usize(0..=rest.min(256))].to_vec();
            let to = random.usize(0..=bytes.len());
            bytes.splice(to..to, part);
        }
        _ => {
            let edge = EDGES[random.usize(..EDGES.len())];
            let edge = if random.bool() {
                edge.to_le_bytes()
            } else {
                edge.to_be_bytes()
            };
            let width = [1, 2, 4, 8][random.usize(..4)].min(rest);
            bytes[at..at + width].copy_from_slice(&edge[..width]);
        }
    }
}
