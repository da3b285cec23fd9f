//! The balloon as the kit drives it.

use std::sync::Arc;
use std::time::Duration;

use device_kit::{
    Announcer, Assignment, BalloonProcess, BulkState, Capabilities, ConfigError, ConfigWriter,
    Device, Forecast, HostError, Keepsake, Kit, OptionError, QueueIndex, StateError,
};

use migration::state::DeviceState;

use crate::config::{ACTUAL_AT, Options, POISON_AT, QUEUE_SIZE, QUEUES, SPACE_LEN, feature};
use crate::metrics::Metrics;
use crate::saved_state::SavedState;
use crate::shared::Shared;
use crate::worker::BalloonWorker;

/// A virtio memory balloon.
#[derive(Debug)]
pub(crate) struct BalloonDevice {
    shared: Arc<Shared>,
}

impl Device for BalloonDevice {
    type Options = Options;
    type Worker = BalloonWorker;
    type SavedState = SavedState;

    const CAPABILITIES: Capabilities = Capabilities {
        device_type: "balloon",
        features: &[],
        program: "godwit-balloon",
        about: "A virtio memory balloon, as a vhost-user back-end",
    };
    const IOCTLS: &'static [u32] = &[];

    fn open(options: Options, kit: &mut Kit<'_>) -> Result<Self, OptionError> {
        let metrics = Metrics::register(kit.registry);
        let (health, change) = (kit.health.clone(), kit.config_change.clone());
        let shared = Shared::new(&options, metrics, health, change);
        let shared = shared.map_err(|error| OptionError {
            option: "--statistics-interval",
            value: options.statistics_interval.to_string(),
            problem: format!("there is no timer for it: {error}"),
        })?;
        Ok(BalloonDevice {
            shared: Arc::new(shared),
        })
    }

    fn workers(&self) -> Result<Vec<Assignment<BalloonWorker>>, HostError> {
        Ok(vec![Assignment {
            worker: BalloonWorker::new(Arc::clone(&self.shared)),
            queues: (0..QUEUES).map(QueueIndex::new).collect(),
        }])
    }

    fn queue_count(&self) -> u16 {
        QUEUES
    }

    fn max_queue_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        feature::ALL
    }

    fn accept_features(&self, features: u64) {
        self.shared.accept(features);
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let space = self.shared.space().bytes();
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, byte) in data.iter_mut().enumerate() {
            let place = offset.saturating_add(at);
            *byte = space.get(place).copied().unwrap_or(0);
        }
    }

    fn write_config(
        &self,
        offset: u32,
        data: &[u8],
        writer: ConfigWriter,
    ) -> Result<(), ConfigError> {
        let refuse = |reason| ConfigError {
            offset,
            len: data.len(),
            reason,
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if start.saturating_add(data.len()) > SPACE_LEN {
            return Err(refuse("it is outside"));
        }
        match writer {
            // What it could say is in the saved state.
            ConfigWriter::Migration => {}
            // Some front-ends write the whole space for each of its words: what is the host's stays.
            ConfigWriter::Driver => {
                let word = |at: usize| {
                    let bytes = data.get(at.checked_sub(start)?..)?;
                    bytes.first_chunk().map(|word| u32::from_le_bytes(*word))
                };
                let (actual, poison) = (word(ACTUAL_AT), word(POISON_AT));
                if (actual, poison) == (None, None) {
                    return Err(refuse(
                        "a driver may only write the size of the balloon and its poison, each whole",
                    ));
                }
                if let Some(pages) = actual {
                    self.shared.set_actual(pages);
                }
                if let Some(value) = poison {
                    self.shared.set_poison(value);
                }
            }
        }
        Ok(())
    }

    fn acquire(&self, _patience: Duration) -> Result<(), OptionError> {
        Ok(())
    }

    fn release(&self) -> Result<(), OptionError> {
        Ok(())
    }

    /// What is in the balloon is known at any time.
    fn transition(&self, _from: DeviceState, _to: DeviceState) -> Result<(), StateError> {
        Ok(())
    }

    /// Its frame is a few dozen bytes.
    fn forecast(&self) -> Forecast {
        Forecast::default()
    }

    fn save(&self) -> Result<SavedState, StateError> {
        Ok(self.shared.save())
    }

    fn load(&self, state: SavedState) -> Result<(), StateError> {
        self.shared.load(state).map_err(StateError)
    }

    fn bulk(&self) -> Option<&dyn BulkState> {
        None
    }

    fn reset(&self) {
        self.shared.reset();
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        self.shared.metrics.totals()
    }

    fn announcer(&self) -> Option<&dyn Announcer> {
        None
    }

    fn keepsake(&self) -> Option<&dyn Keepsake> {
        Some(&*self.shared)
    }

    fn balloon(&self) -> Option<Arc<dyn BalloonProcess>> {
        Some(Arc::clone(&self.shared) as _)
    }
}
