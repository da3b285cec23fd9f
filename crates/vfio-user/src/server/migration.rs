//! Commands about a device that moves.

use nix::errno::Errno;

use super::Device;
use super::session::Session;
use crate::migration::{DeviceState, DmaLog, DmaRange, Migration, MigrationFlags};
use crate::wire::{
    DEVICE_STATE, FEATURE, Feature, GET, LOG_REPORT, LOG_START, LOG_STOP, Layout as _, LogRange,
    LogReport, LogStart, MIGRATION, MOST_TRANSFER, MigrationData, NO_DESCRIPTOR, PROBE, SET,
    StateBytes, StateData,
};

impl<D: Device> Session<'_, D> {
    fn migration(&mut self) -> Result<&mut dyn Migration, Errno> {
        self.device.migration().ok_or(Errno::EOPNOTSUPP)
    }

    fn log(&mut self) -> Result<&mut dyn DmaLog, Errno> {
        self.device.dma_log().ok_or(Errno::EOPNOTSUPP)
    }

    /// Which states this client may ask for.
    fn states(&mut self) -> Result<MigrationFlags, Errno> {
        let has_p2p = self.has_p2p;
        let mut flags = self.migration()?.flags();
        flags.set(
            MigrationFlags::P2P,
            flags.contains(MigrationFlags::P2P) && has_p2p,
        );
        Ok(flags)
    }

    /// DEVICE_FEATURE.
    pub(super) fn feature(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let (feature, data) = Feature::split(payload).ok_or(Errno::EINVAL)?;
        let number = feature.flags & FEATURE;
        let ways = feature.flags & !FEATURE;
        let possible = match number {
            MIGRATION => self.migration().map(|_| GET)?,
            DEVICE_STATE => self.migration().map(|_| GET | SET)?,
            LOG_START | LOG_STOP => self.log().map(|_| SET)?,
            LOG_REPORT => self.log().map(|_| GET)?,
            _ => return Err(Errno::EOPNOTSUPP),
        };
        if ways & PROBE != 0 {
            let is_possible = ways & !PROBE & !possible == 0;
            return is_possible.then(|| payload.to_vec()).ok_or(Errno::EINVAL);
        }
        if ways != GET && ways != SET || ways & possible == 0 {
            return Err(Errno::EINVAL);
        }
        // What a client does not wait for it is not sent.
        let room = (feature.argsz as usize)
            .checked_sub(Feature::SIZE)
            .ok_or(Errno::EINVAL)?;
        let data = match (number, ways) {
            (MIGRATION, _) => {
                expect(data.is_empty())?;
                let flags = self.states()?.bits();
                MigrationData { flags }.bytes()
            }
            (DEVICE_STATE, GET) => {
                expect(data.is_empty())?;
                let state = self.migration()?.state()? as u32;
                let descriptor = NO_DESCRIPTOR;
                StateData { state, descriptor }.bytes()
            }
            (DEVICE_STATE, _) => {
                self.set_state(data)?;
                data.to_vec()
            }
            (LOG_START, _) => self.start_log(data)?,
            (LOG_STOP, _) => {
                expect(data.is_empty() && self.is_logging)?;
                self.stop_log()?;
                Vec::new()
            }
            (_, _) => self.report(data, room)?,
        };
        if ways == GET {
            expect(data.len() <= room)?;
        }
        Ok([Feature::with(feature.flags, data.len()).bytes(), data].concat())
    }

    fn set_state(&mut self, data: &[u8]) -> Result<(), Errno> {
        let data = StateData::whole(data).ok_or(Errno::EINVAL)?;
        let state = DeviceState::from_number(data.state).ok_or(Errno::EINVAL)?;
        // A device falls into it.
        expect(state != DeviceState::Error && self.states()?.contains(state.needs()))?;
        self.migration()?.set_state(state)
    }

    fn start_log(&mut self, data: &[u8]) -> Result<Vec<u8>, Errno> {
        let (start, rest) = LogStart::split(data).ok_or(Errno::EINVAL)?;
        let (ranges, none) = rest.as_chunks::<{ LogRange::SIZE }>();
        expect(none.is_empty() && ranges.len() == start.ranges as usize)?;
        expect(start.page.is_power_of_two())?;
        let range =
            |bytes: &[u8; LogRange::SIZE]| LogRange::whole(bytes).ok_or(Errno::EINVAL)?.range();
        let ranges: Vec<DmaRange> = ranges.iter().map(range).collect::<Result<_, _>>()?;
        if self.is_logging {
            return Err(Errno::EBUSY);
        }
        let page = self.log()?.start(start.page, &ranges)?;
        self.is_logging = true;
        Ok([&LogStart { page, ..start }.bytes(), rest].concat())
    }

    /// Has the device note no more writes.
    pub(super) fn stop_log(&mut self) -> Result<(), Errno> {
        self.is_logging = false;
        self.log()?.stop()
    }

    fn report(&mut self, data: &[u8], room: usize) -> Result<Vec<u8>, Errno> {
        let asked = LogReport::whole(data).ok_or(Errno::EINVAL)?;
        let LogReport {
            address,
            size,
            page,
        } = asked;
        let range = LogRange { address, size }.range()?;
        let words = asked.words();
        let bytes = words.saturating_mul(8);
        expect(page.is_power_of_two() && self.is_logging)?;
        expect(bytes <= MOST_TRANSFER as usize && LogReport::SIZE + bytes <= room)?;
        let mut bitmap = vec![0; words];
        self.log()?.report(range, page, &mut bitmap)?;
        let mut data = asked.bytes();
        data.extend(bitmap.into_iter().flat_map(u64::to_le_bytes));
        Ok(data)
    }

    /// MIG_DATA_READ.
    pub(super) fn read_state(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let asked = StateBytes::whole(payload).ok_or(Errno::EINVAL)?;
        let size = asked.size as usize;
        expect(asked.size <= MOST_TRANSFER)?;
        expect((asked.argsz as usize).checked_sub(StateBytes::SIZE) >= Some(size))?;
        let migration = self.migration()?;
        let mut reply = vec![0; StateBytes::SIZE + size];
        let count = migration.read_state(&mut reply[StateBytes::SIZE..])?;
        reply.truncate(StateBytes::SIZE + count);
        reply[..StateBytes::SIZE].copy_from_slice(&StateBytes::of(count).bytes());
        Ok(reply)
    }

    /// MIG_DATA_WRITE.
    pub(super) fn write_state(&mut self, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        let (given, data) = StateBytes::split(payload).ok_or(Errno::EINVAL)?;
        expect(given.size <= MOST_TRANSFER && given.has(data.len()))?;
        self.migration()?.write_state(data)?;
        Ok(Vec::new())
    }
}

fn expect(is_so: bool) -> Result<(), Errno> {
    if is_so { Ok(()) } else { Err(Errno::EINVAL) }
}
