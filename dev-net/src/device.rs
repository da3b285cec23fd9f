//! The network device, as the kit drives it.

use std::sync::Arc;
use std::time::Duration;

use device_kit::{
    Announcer, Assignment, BalloonProcess, BulkState, Capabilities, ConfigError, ConfigWriter,
    Device, Forecast, HostError, Keepsake, Kit, MAX_QUEUE_SIZE, OptionError, QueueIndex,
    StateError,
};

use migration::state::DeviceState;

use crate::config::{NetConfig, Options};
use crate::features::Features;
use crate::metrics::Metrics;
use crate::saved_state::NetState;
use crate::shared::Shared;
use crate::worker::NetWorker;

/// More than the state's bytes.
const MOST_STATE: u64 = 2048;

/// A virtio network card whose other end is a tap.
#[derive(Debug)]
pub(crate) struct NetDevice {
    shared: Arc<Shared>,
}

impl Device for NetDevice {
    type Options = Options;
    type Worker = NetWorker;
    type SavedState = NetState;

    const CAPABILITIES: Capabilities = Capabilities {
        device_type: "net",
        features: &[],
        program: "godwit-net",
        about: "Serves a virtio network card by vhost-user, from a tap interface",
    };

    const IOCTLS: &'static [u32] = &crate::tap::IOCTLS;

    fn open(options: Options, kit: &mut Kit<'_>) -> Result<Self, OptionError> {
        let config = NetConfig::open(options)?;
        tracing::debug!(
            tap = config.tap.name(),
            queue_pairs = config.tap.pairs(),
            mac = %config.mac,
            "network card"
        );
        let metrics = Metrics::register(kit.registry);
        Ok(NetDevice {
            shared: Arc::new(Shared::new(config, metrics, kit.config_change.clone())),
        })
    }

    fn workers(&self) -> Result<Vec<Assignment<NetWorker>>, HostError> {
        let pairs = self.shared.tap().pairs();
        let assignments = (0..pairs).map(|pair| {
            let mut queues = vec![QueueIndex::new(2 * pair), QueueIndex::new(2 * pair + 1)];
            if pair == 0 {
                queues.push(QueueIndex::new(2 * pairs));
            }
            Assignment {
                worker: NetWorker::new(Arc::clone(&self.shared), pair),
                queues,
            }
        });
        Ok(assignments.collect())
    }

    fn queue_count(&self) -> u16 {
        2 * self.shared.tap().pairs() + 1
    }

    fn max_queue_size(&self) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.shared.offered().bits()
    }

    fn accept_features(&self, features: u64) {
        self.shared.accept(Features::from_bits_truncate(features));
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        self.shared.config_space().read(offset, data);
    }

    fn write_config(
        &self,
        offset: u32,
        data: &[u8],
        writer: ConfigWriter,
    ) -> Result<(), ConfigError> {
        match writer {
            // What it could say is in the saved state.
            ConfigWriter::Migration => Ok(()),
            ConfigWriter::Driver => Err(ConfigError {
                offset,
                len: data.len(),
                reason: "the configuration space of a network card is read-only",
            }),
        }
    }

    /// A tap may be open in two processes for a moment: a queue that nobody reads only waits.
    fn acquire(&self, _patience: Duration) -> Result<(), OptionError> {
        Ok(())
    }

    fn release(&self) -> Result<(), OptionError> {
        Ok(())
    }

    /// The state is under two kilobytes and always at hand.
    fn transition(&self, _from: DeviceState, _to: DeviceState) -> Result<(), StateError> {
        Ok(())
    }

    fn forecast(&self) -> Forecast {
        Forecast {
            bytes: MOST_STATE,
            ..Forecast::default()
        }
    }

    fn save(&self) -> Result<NetState, StateError> {
        Ok(self.shared.save())
    }

    fn load(&self, state: NetState) -> Result<(), StateError> {
        self.shared.load(state)
    }

    fn bulk(&self) -> Option<&dyn BulkState> {
        None
    }

    fn reset(&self) {
        self.shared.reset();
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let pairs = self.shared.tap().pairs();
        self.shared.metrics().totals(pairs)
    }

    fn announcer(&self) -> Option<&dyn Announcer> {
        Some(&*self.shared)
    }

    fn keepsake(&self) -> Option<&dyn Keepsake> {
        None
    }

    fn balloon(&self) -> Option<Arc<dyn BalloonProcess>> {
        None
    }
}
