//! What a blackout would consist of, by what was measured before it.

use std::time::Duration;

use migration::report::{Prediction, micros};

use super::saved_state::DeviceWiring;

/// Times that the link is crossed and back: the core's state, and the commit.
const LINK_TURNS: u32 = 2;
/// Times that all devices are asked and answer, one after the other: stop and save; the end of loading,
/// start.
const DEVICE_TURNS: u32 = 1;
const DEVICE_TURNS_THERE: u32 = 2;
/// What the cores do besides; fitted like the numbers below.
const CORES: Duration = Duration::from_micros(340);
/// What the rest costs, in times that somebody is woken and wakes in turn, as measured on this host:
/// the threads of memory if it is copied, the first of the devices, and each device and each ring
/// on whatever processor is free.
const MEMORY_WAKES: u32 = 48;
const FIRST_DEVICE_WAKES: u32 = 27;
const DEVICE_WAKES: u32 = 28;
const RING_WAKES: u32 = 2;
/// What one device saves and its twin loads, in bytes a second.
const STATE_RATE: u64 = 400 << 20;

/// What else a switchover consists of, as it is at the moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Around {
    /// The link, there and back.
    pub link: Duration,
    /// A thread that is woken and wakes the one that it was woken by.
    pub wake: Duration,
    /// Memory is copied, and not kept.
    pub copies_memory: bool,
    /// Devices that the guest uses, and their rings.
    pub devices_rings: (u32, u32),
    /// Processors of this host.
    pub processors: u32,
    /// The core's state: saved and loaded.
    pub core: Duration,
    /// All devices asked something at once: until the last has answered.
    pub devices: Duration,
    /// The same at the destination.
    pub devices_there: Duration,
    /// The slowest device's own time to stop, and the slowest one's to start.
    pub transitions: Duration,
    /// Bytes of the devices' states.
    pub state_bytes: u64,
    /// Bytes of the largest of them.
    pub largest_state: u64,
}

impl Around {
    /// Takes note of how much there is to stop and to start.
    pub(super) fn count(&mut self, devices: &[DeviceWiring]) {
        let rings = |device: &DeviceWiring| {
            let queues = device.state.transport.queues.iter();
            u32::try_from(queues.filter(|queue| queue.enabled).count()).unwrap_or(u32::MAX)
        };
        let used = devices.iter().map(rings).filter(|rings| *rings > 0);
        self.devices_rings = used.fold((0, 0), |(devices, all): (u32, u32), rings| {
            (devices + 1, all.saturating_add(rings))
        });
    }

    fn wakes(&self) -> Duration {
        let (devices, rings) = self.devices_rings;
        let memory = MEMORY_WAKES * u32::from(self.copies_memory);
        let first = FIRST_DEVICE_WAKES * devices.min(1);
        let spread = devices
            .saturating_mul(DEVICE_WAKES)
            .saturating_add(rings.saturating_mul(RING_WAKES));
        let spread = spread / self.processors.max(1);
        self.wake * (memory + first).saturating_add(spread)
    }

    /// The blackout with `remaining` bytes of memory left, over a link of `rate` bytes a second.
    pub(super) fn predict(&self, remaining: u64, rate: u64) -> Prediction {
        let devices = self.devices * DEVICE_TURNS;
        Prediction {
            memory_us: micros(transfer(remaining, rate)),
            states_us: micros(self.states(rate)),
            core_us: micros(self.core + CORES),
            wakes_us: micros(self.wakes()),
            link_us: micros(self.link * LINK_TURNS),
            devices_us: micros(devices.saturating_add(self.devices_there * DEVICE_TURNS_THERE)),
            transitions_us: micros(self.transitions),
        }
    }

    /// How long the devices' states take, over a link of this rate: as many at once as there are
    /// processors, and none faster than it is saved.
    fn states(&self, link: u64) -> Duration {
        let at_once = STATE_RATE.saturating_mul(self.processors.max(1).into());
        transfer(self.largest_state, STATE_RATE).max(transfer(self.state_bytes, at_once.min(link)))
    }
}

/// How long so many bytes take at a rate in bytes a second.
fn transfer(bytes: u64, rate: u64) -> Duration {
    let moved = u128::from(bytes) * 1_000_000 / u128::from(rate.max(1));
    Duration::from_micros(u64::try_from(moved).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_consists_of_all_that_must_happen() {
        let around = Around {
            link: Duration::from_micros(100),
            wake: Duration::from_micros(10),
            copies_memory: true,
            devices_rings: (3, 10),
            processors: 2,
            core: Duration::from_micros(400),
            devices: Duration::from_micros(1000),
            devices_there: Duration::from_micros(2000),
            transitions: Duration::from_millis(200),
            state_bytes: 10 << 20,
            largest_state: 10 << 20,
        };
        let predicted = around.predict(50 << 20, 100 << 20);
        let parts = Prediction {
            memory_us: 500_000,
            states_us: 100_000,
            core_us: 740,
            wakes_us: 1270,
            link_us: 200,
            devices_us: 1000 + 4000,
            transitions_us: 200_000,
        };
        assert_eq!(predicted, parts);
        assert_eq!(predicted.total_us(), 807_210);
    }
}
