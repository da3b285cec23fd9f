//! What the device is: its command-line options and its configuration space.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::image::Image;

/// Bytes of a sector, the unit of all positions in the protocol.
pub(crate) const SECTOR: u64 = 512;
/// Bytes of the answer to GET_ID.
pub(crate) const ID_LEN: usize = 20;
/// Most sectors that one discard or write-zeroes request may name: 2 GiB.
pub(crate) const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// Options of `godwit-blk`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) source: Source,

    /// Let the guest only read
    #[arg(long)]
    pub(crate) read_only: bool,

    /// Number of virtqueues
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) num_queues: u16,

    /// Entries of each virtqueue: a power of two, 4 to 1024
    #[arg(long, default_value_t = 256, value_parser = queue_size)]
    pub(crate) queue_size: u16,

    /// What the guest sees as the disk's serial number, up to 20 ASCII characters
    #[arg(long, default_value = "", value_parser = serial, value_name = "ID")]
    pub(crate) serial: Serial,

    /// Lock the image against other users: exclusively, or shared with --read-only
    #[arg(long, value_enum, default_value_t = Lock::On, value_name = "on|off")]
    pub(crate) lock: Lock,
}

/// Where the image is.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Source {
    /// Raw image, or block device
    #[arg(long, value_name = "PATH")]
    pub(crate) blk_file: Option<PathBuf>,

    /// Raw image that was handed over, open, as descriptor N
    #[arg(long, value_name = "N")]
    pub(crate) blk_fd: Option<i32>,
}

/// Whether the image is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Lock {
    On,
    Off,
}

/// A serial number as GET_ID answers it, padded with zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Serial(pub(crate) [u8; ID_LEN]);

fn queue_size(text: &str) -> Result<u16, String> {
    text.parse()
        .ok()
        .filter(|size: &u16| size.is_power_of_two() && (4..=1024).contains(size))
        .ok_or_else(|| "give a power of two from 4 to 1024".to_owned())
}

fn serial(text: &str) -> Result<Serial, String> {
    if text.len() > ID_LEN || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!(
            "give at most {ID_LEN} printable ASCII characters without spaces"
        ));
    }
    let mut id = [0; ID_LEN];
    id[..text.len()].copy_from_slice(text.as_bytes());
    Ok(Serial(id))
}

/// Feature bits of virtio-blk (virtio 1.2, 5.2.3).
pub(crate) mod feature {
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const CONFIG_WCE: u64 = 1 << 11;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Byte offset of the `writeback` field, the only one that a driver may write.
pub(crate) const WRITEBACK_AT: usize = 32;

/// Bytes of the configuration space.
pub(crate) const SPACE_LEN: usize = 60;

/// The configuration space, `struct virtio_blk_config` (virtio 1.2, 5.2.4), little-endian.
pub(crate) fn space(
    image: &Image,
    queues: u16,
    queue_size: u16,
    writeback: bool,
) -> [u8; SPACE_LEN] {
    let mut space = [0; SPACE_LEN];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &image.sectors().to_le_bytes());
    // Header and status take a descriptor each.
    put(12, &u32::from(queue_size - 2).to_le_bytes());
    put(20, &image.block_size().to_le_bytes());
    put(24, &[image.physical_block_exponent()]);
    // Smallest sensible transfer, in blocks.
    put(26, &1u16.to_le_bytes());
    put(WRITEBACK_AT, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    if image.can_discard() {
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        let alignment = u64::from(image.block_size()) << image.physical_block_exponent();
        let sectors = u32::try_from(alignment / SECTOR).unwrap_or(1);
        put(44, &sectors.to_le_bytes());
    }
    if image.can_write_zeroes() {
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_values_are_checked() {
        assert_eq!(queue_size("1024"), Ok(1024));
        for bad in ["0", "2", "100", "2048", "x", "-1"] {
            assert!(queue_size(bad).is_err(), "{bad}");
        }
        assert_eq!(&serial("disk7").unwrap().0[..6], b"disk7\0");
        assert!(serial("123456789012345678901").is_err());
        assert!(serial("with space").is_err());
    }
}
