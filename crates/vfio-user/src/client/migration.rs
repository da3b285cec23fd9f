//! Requests about a device that moves.

use super::{Client, nothing};
use crate::error::Error;
use crate::migration::{DeviceState, DmaRange, MigrationFlags};
use crate::wire::{
    Command, DEVICE_STATE, Feature, GET, LOG_REPORT, LOG_START, LOG_STOP, Layout as _, LogRange,
    LogReport, LogStart, MIGRATION, MigrationData, NO_DESCRIPTOR, SET, StateBytes, StateData,
};

impl Client {
    /// Whether both sides know the states [`DeviceState::RunningP2p`] and [`DeviceState::PreCopyP2p`],
    /// which the specification does not use.
    pub fn has_p2p(&self) -> bool {
        self.server.has_p2p()
    }

    /// Which states the device has.
    ///
    /// # Errors
    /// [`Error::Remote`] if it cannot be moved.
    pub fn migration(&self) -> Result<MigrationFlags, Error> {
        let room = MigrationData::SIZE;
        let data = self.feature(MIGRATION | GET, &[], room, MigrationData::whole)?;
        let mut flags = MigrationFlags::from_bits_truncate(data.flags);
        flags.set(
            MigrationFlags::P2P,
            flags.contains(MigrationFlags::P2P) && self.has_p2p(),
        );
        Ok(flags)
    }

    /// In which state the device is.
    ///
    /// # Errors
    /// [`Error::Remote`] if it cannot be moved.
    pub fn state(&self) -> Result<DeviceState, Error> {
        self.feature(DEVICE_STATE | GET, &[], StateData::SIZE, |data| {
            DeviceState::from_number(StateData::whole(data)?.state)
        })
    }

    /// Has the device go to a state, in which it is when this returns.
    ///
    /// # Errors
    /// [`Error::Remote`] if it cannot; where it is then, [`Self::state`] says.
    pub fn set_state(&self, state: DeviceState) -> Result<(), Error> {
        let data = StateData {
            state: state as u32,
            descriptor: NO_DESCRIPTOR,
        };
        self.feature(DEVICE_STATE | SET, &data.bytes(), 0, |_| Some(()))
    }

    /// Reads more of the device's state, in a state that saves, in as many messages as it takes. Less
    /// is read when there is no more: for the moment while it runs, and for good once it is stopped.
    ///
    /// # Errors
    /// [`Error::Remote`] in another state.
    pub fn read_state(&self, data: &mut [u8]) -> Result<usize, Error> {
        let mut count = 0;
        for part in data.chunks_mut(self.transfer()) {
            let asked = StateBytes::of(part.len());
            let command = Command::MIG_DATA_READ;
            let read =
                self.request(
                    command,
                    &[&asked.bytes()],
                    &[],
                    |reply| match StateBytes::split(&reply.payload) {
                        Some((read, data)) if read.has(data.len()) && data.len() <= part.len() => {
                            part[..data.len()].copy_from_slice(data);
                            Ok(data.len())
                        }
                        _ => Err(format!("another reply than to {asked:?}")),
                    },
                )?;
            count += read;
            if read < part.len() {
                break;
            }
        }
        Ok(count)
    }

    /// Gives the device more of another's state, in as many messages as it takes.
    ///
    /// # Errors
    /// [`Error::Remote`] if it does not take that, or is not in [`DeviceState::Resuming`].
    pub fn write_state(&self, data: &[u8]) -> Result<(), Error> {
        for part in data.chunks(self.transfer()) {
            let parts = [&StateBytes::of(part.len()).bytes(), part];
            self.request(Command::MIG_DATA_WRITE, &parts, &[], nothing)?;
        }
        Ok(())
    }

    /// Has the device note from now on which pages, of `page` bytes or another size, it writes, in these
    /// ranges or, without any, in all memory. The size is returned.
    ///
    /// # Errors
    /// [`Error::Remote`] if it cannot, or does so already.
    pub fn start_dma_log(&self, page: u64, ranges: &[DmaRange]) -> Result<u64, Error> {
        let start = LogStart {
            page,
            ranges: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
            reserved: 0,
        };
        let mut data = start.bytes();
        for &DmaRange { address, size } in ranges {
            data.extend(LogRange { address, size }.bytes());
        }
        self.feature(LOG_START | SET, &data, 0, |data| {
            let (started, rest) = LogStart::split(data)?;
            let is_whole = rest.len() == ranges.len() * LogRange::SIZE;
            (is_whole && started.page.is_power_of_two()).then_some(started.page)
        })
    }

    /// The device notes nothing any more.
    ///
    /// # Errors
    /// [`Error::Remote`] if it did not.
    pub fn stop_dma_log(&self) -> Result<(), Error> {
        self.feature(LOG_STOP | SET, &[], 0, |_| Some(()))
    }

    /// A bit for each page of `page` bytes, a power of two, that the device has written in a range
    /// since the last time, from the lowest bit of the first number on; in as many messages as it takes.
    ///
    /// # Errors
    /// [`Error::Remote`] if it does not know: then all may be written.
    pub fn dma_log(&self, range: DmaRange, page: u64) -> Result<Vec<u64>, Error> {
        let pages_at_once = (self.transfer() / 8).max(1) as u64 * 64;
        // The server refuses pages of no bytes.
        let bytes_at_once = pages_at_once.saturating_mul(page.max(1));
        let mut bitmap = Vec::new();
        let mut at = 0;
        while at < range.size {
            let size = bytes_at_once.min(range.size - at);
            let asked = LogReport {
                address: range.address.wrapping_add(at),
                size,
                page,
            };
            let pages = size.div_ceil(page.max(1));
            let room = LogReport::SIZE + asked.words() * 8;
            let part = self.feature(LOG_REPORT | GET, &asked.bytes(), room, |data| {
                let (report, bits) = LogReport::split(data)?;
                let (words, rest) = bits.as_chunks::<8>();
                let is_whole = report == asked && rest.is_empty() && words.len() == asked.words();
                let words: Vec<_> = words.iter().map(|it| u64::from_le_bytes(*it)).collect();
                let none_beyond = pages.is_multiple_of(64)
                    || words.last().is_none_or(|it| it >> (pages % 64) == 0);
                (is_whole && none_beyond).then_some(words)
            })?;
            bitmap.extend(part);
            at += size;
        }
        Ok(bitmap)
    }

    /// Gets or sets a feature, whose data take `room` bytes at most in the reply, or as many as in the
    /// request.
    fn feature<T>(
        &self,
        flags: u32,
        data: &[u8],
        room: usize,
        read: impl FnOnce(&[u8]) -> Option<T>,
    ) -> Result<T, Error> {
        let feature = Feature::with(flags, room.max(data.len()));
        let parts = [&feature.bytes(), data];
        self.request(Command::DEVICE_FEATURE, &parts, &[], |reply| {
            Feature::split(&reply.payload)
                .filter(|(replied, _)| replied.flags == flags)
                .and_then(|(_, data)| read(data))
                .ok_or_else(|| format!("another reply than to {feature:?}"))
        })
    }
}
