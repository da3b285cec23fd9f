//! The block device as a whole: features, configuration space, state.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use device_kit::{
    Announcer, Assignment, BalloonProcess, BulkState, Capabilities, ConfigError, ConfigWriter,
    Device, Forecast, Health, HostError, Keepsake, Kit, OptionError, QueueIndex, StateError,
};

use migration::state::DeviceState;

use crate::config::{self, Options, SPACE_LEN, Serial, WRITEBACK_AT, feature};
use crate::engine::Engine;
use crate::image::Image;
use crate::metrics::BlkMetrics;
use crate::saved_state::SavedState;
use crate::uring::Uring;

/// What the device and its queue threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) image: Image,
    pub(crate) serial: Serial,
    pub(crate) metrics: BlkMetrics,
    pub(crate) health: Health,
    features: AtomicU64,
    /// The driver's choice; it counts only with CONFIG_WCE.
    writeback: AtomicBool,
}

impl Shared {
    /// Whether written data may stay in the host's cache until the guest flushes
    /// (virtio 1.2, 5.2.6.2).
    pub(crate) fn writeback(&self) -> bool {
        let features = self.features.load(Ordering::Acquire);
        if features & feature::CONFIG_WCE != 0 {
            self.writeback.load(Ordering::Acquire)
        } else {
            features & feature::FLUSH != 0
        }
    }
}

/// The block device.
#[derive(Debug)]
pub(crate) struct Blk {
    shared: Arc<Shared>,
    queues: u16,
    queue_size: u16,
}

impl Blk {
    fn space(&self) -> [u8; SPACE_LEN] {
        let writeback = self.shared.writeback.load(Ordering::Acquire);
        config::space(&self.shared.image, self.queues, self.queue_size, writeback)
    }
}

impl Device for Blk {
    type Options = Options;
    type Worker = Engine;
    type SavedState = SavedState;

    const CAPABILITIES: Capabilities = Capabilities {
        device_type: "block",
        features: &["read-only", "blk-file"],
        program: "godwit-blk",
        about: "A virtio block device over a raw image, as a vhost-user back-end",
    };
    const IOCTLS: &'static [u32] = &[];

    fn open(options: Options, kit: &mut Kit<'_>) -> Result<Self, OptionError> {
        Ok(Blk {
            shared: Arc::new(Shared {
                image: Image::open(&options)?,
                serial: options.serial,
                metrics: BlkMetrics::register(kit.registry),
                health: kit.health.clone(),
                features: AtomicU64::new(0),
                writeback: AtomicBool::new(true),
            }),
            queues: options.num_queues,
            queue_size: options.queue_size,
        })
    }

    fn workers(&self) -> Result<Vec<Assignment<Engine>>, HostError> {
        (0..self.queues)
            .map(|queue| {
                let ring = Uring::new(self.shared.image.fd(), self.queue_size)?;
                let queue = QueueIndex::new(queue);
                Ok(Assignment {
                    worker: Engine::new(queue, self.queue_size, ring, Arc::clone(&self.shared)),
                    queues: vec![queue],
                })
            })
            .collect()
    }

    fn queue_count(&self) -> u16 {
        self.queues
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    fn features(&self) -> u64 {
        let image = &self.shared.image;
        let when = |condition, bits| if condition { bits } else { 0 };
        feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::TOPOLOGY
            | feature::FLUSH
            | feature::CONFIG_WCE
            | when(self.queues > 1, feature::MQ)
            | when(image.read_only(), feature::RO)
            | when(image.can_discard(), feature::DISCARD)
            | when(image.can_write_zeroes(), feature::WRITE_ZEROES)
    }

    fn accept_features(&self, features: u64) {
        self.shared.features.store(features, Ordering::Release);
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let space = self.space();
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
        let end = start.saturating_add(data.len());
        let mut space = self.space();
        let known = space
            .get_mut(start..end)
            .ok_or_else(|| refuse("it is outside"))?;
        match writer {
            ConfigWriter::Driver if (start, end) != (WRITEBACK_AT, WRITEBACK_AT + 1) => {
                return Err(refuse("a driver may only write the cache mode"));
            }
            ConfigWriter::Driver => {}
            // All of it may come, but what the device is comes from its options.
            ConfigWriter::Migration => {
                let fixed = |at: &usize| start + at != WRITEBACK_AT;
                if (0..data.len())
                    .filter(fixed)
                    .any(|at| known[at] != data[at])
                {
                    return Err(refuse("this device is another one"));
                }
            }
        }
        known.copy_from_slice(data);
        match space[WRITEBACK_AT] {
            mode @ 0..=1 => {
                self.shared.writeback.store(mode == 1, Ordering::Release);
                Ok(())
            }
            _ => Err(refuse("the cache mode is 0 or 1")),
        }
    }

    fn acquire(&self, patience: Duration) -> Result<(), OptionError> {
        self.shared.image.lock(patience)
    }

    fn release(&self) -> Result<(), OptionError> {
        self.shared.image.unlock()
    }

    /// Nothing is made ahead: the state is one field.
    fn transition(&self, _from: DeviceState, _to: DeviceState) -> Result<(), StateError> {
        Ok(())
    }

    /// Its frame is a few dozen bytes.
    fn forecast(&self) -> Forecast {
        Forecast::default()
    }

    fn save(&self) -> Result<SavedState, StateError> {
        Ok(SavedState {
            writeback: self.shared.writeback.load(Ordering::Acquire),
        })
    }

    fn load(&self, state: SavedState) -> Result<(), StateError> {
        self.shared
            .writeback
            .store(state.writeback, Ordering::Release);
        Ok(())
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        self.shared.metrics.totals()
    }

    fn bulk(&self) -> Option<&dyn BulkState> {
        None
    }

    fn reset(&self) {
        self.shared.features.store(0, Ordering::Release);
        self.shared.writeback.store(true, Ordering::Release);
    }

    fn announcer(&self) -> Option<&dyn Announcer> {
        None
    }

    fn keepsake(&self) -> Option<&dyn Keepsake> {
        None
    }

    fn balloon(&self) -> Option<Arc<dyn BalloonProcess>> {
        None
    }
}
