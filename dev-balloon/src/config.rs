//! What the device is: its command-line options, its features, which queue is for what, and its
//! configuration space.

use clap::Args;
use device_kit::QueueIndex;

use crate::statistics::MAX_INTERVAL;

/// Bytes of a page of the protocol, whatever the guest's or the host's pages are.
pub(crate) const PAGE: u64 = 4096;
/// Queues, when every feature is in force.
pub(crate) const QUEUES: u16 = 5;
/// Entries of each queue, at most.
pub(crate) const QUEUE_SIZE: u16 = 256;

/// Options of `godwit-balloon`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// MiB that the guest shall give to the host from the beginning
    #[arg(long, default_value_t = 0, value_name = "MIB", value_parser = clap::value_parser!(u32).range(..=0x00ff_ffff))]
    pub(crate) target: u32,

    /// Ask the guest for its memory statistics every SECONDS; 0: never
    #[arg(long, default_value_t = 5, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=i64::from(MAX_INTERVAL)))]
    pub(crate) statistics_interval: u32,
}

/// Feature bits (virtio 1.3, 5.5.3).
pub(crate) mod feature {
    pub(crate) const MUST_TELL_HOST: u64 = 1 << 0;
    pub(crate) const STATS_VQ: u64 = 1 << 1;
    pub(crate) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(crate) const FREE_PAGE_HINT: u64 = 1 << 3;
    pub(crate) const PAGE_POISON: u64 = 1 << 4;
    pub(crate) const PAGE_REPORTING: u64 = 1 << 5;

    /// All of them.
    pub(crate) const ALL: u64 =
        MUST_TELL_HOST | STATS_VQ | DEFLATE_ON_OOM | FREE_PAGE_HINT | PAGE_POISON | PAGE_REPORTING;
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hints,
    Reports,
}

impl Role {
    /// What queue `index` is for with these features. A queue whose feature is not in force does
    /// not exist, and those after it move up: so the drivers count, and the other devices.
    pub(crate) fn of(index: QueueIndex, features: u64) -> Option<Self> {
        let optional = [
            (feature::STATS_VQ, Self::Statistics),
            (feature::FREE_PAGE_HINT, Self::Hints),
            (feature::PAGE_REPORTING, Self::Reports),
        ];
        let there = optional
            .into_iter()
            .filter(|(bit, _)| features & bit != 0)
            .map(|(_, role)| role);
        [Self::Inflate, Self::Deflate]
            .into_iter()
            .chain(there)
            .nth(index.get().into())
    }
}

/// Bytes of the configuration space.
pub(crate) const SPACE_LEN: usize = 16;
/// Where `actual` is, which the driver writes.
pub(crate) const ACTUAL_AT: usize = 4;
/// Where `poison_val` is, which the driver writes.
pub(crate) const POISON_AT: usize = 12;

/// `struct virtio_balloon_config` (virtio 1.3, 5.5.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Space {
    /// Pages that the host wants.
    pub(crate) target: u32,
    /// Pages that the guest has given, as it says.
    pub(crate) actual: u32,
    /// The command of free page hinting.
    pub(crate) hint_command: u32,
    /// What the guest fills free pages with, four bytes of it.
    pub(crate) poison: u32,
}

impl Space {
    /// As the driver sees it.
    pub(crate) fn bytes(self) -> [u8; SPACE_LEN] {
        let mut bytes = [0; SPACE_LEN];
        let words = [self.target, self.actual, self.hint_command, self.poison];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_move_up_when_a_feature_is_not_in_force() {
        let roles = |features| {
            (0..QUEUES)
                .map_while(|index| Role::of(QueueIndex::new(index), features))
                .collect::<Vec<_>>()
        };
        use Role::{Deflate, Hints, Inflate, Reports, Statistics};
        assert_eq!(roles(0), [Inflate, Deflate]);
        assert_eq!(
            roles(feature::ALL),
            [Inflate, Deflate, Statistics, Hints, Reports]
        );
        let without_statistics = feature::ALL & !feature::STATS_VQ;
        assert_eq!(
            roles(without_statistics),
            [Inflate, Deflate, Hints, Reports]
        );
        assert_eq!(roles(feature::PAGE_REPORTING), [Inflate, Deflate, Reports]);
    }

    #[test]
    fn the_space_is_laid_out_as_specified() {
        let space = Space {
            target: 1,
            actual: 2,
            hint_command: 3,
            poison: 0xaaaa_aaaa,
        };
        let expected = b"\x01\0\0\0\x02\0\0\0\x03\0\0\0\xaa\xaa\xaa\xaa";
        assert_eq!(&space.bytes(), expected);
    }
}
