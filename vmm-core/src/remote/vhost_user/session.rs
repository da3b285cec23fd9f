//! A session: a connection on which features are agreed, and what the back-end has been
//! told since.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::channel::Channel;
use super::connection::Connection;
use super::inflight::Inflight;
use super::log::DirtyLog;
use super::negotiation::{self, LOG_ALL, Negotiated, PROTOCOL_FEATURES};
use super::watchdog::Watchdog;
use super::{VhostUserConfig, VhostUserError, memory, rings};
use crate::memory::Region;
use crate::transport::{ActivatedQueue, StoppedQueue};

/// What the guest wants of the device.
pub(super) struct Wanted {
    /// Features that the driver has accepted.
    pub(super) features: u64,
    /// Queues that it has enabled and the back-end serves.
    pub(super) queues: Vec<ActivatedQueue>,
}

/// A back-end that is there.
pub(super) struct Session {
    pub(super) connection: Connection,
    pub(super) negotiated: Negotiated,
    pub(super) channel: Option<Arc<Channel>>,
    /// Regions that the back-end has.
    told: Vec<Region>,
}

impl Session {
    /// Agrees on features with whoever is at the other end of `stream`.
    pub(super) fn open(
        config: &VhostUserConfig,
        stream: UnixStream,
        watchdog: &Arc<Watchdog>,
        config_stale: &Arc<AtomicBool>,
    ) -> Result<Self, VhostUserError> {
        let device = Arc::from(config.id.as_str());
        let watchdog = Arc::clone(watchdog);
        let mut connection = Connection::new(device, stream, watchdog, config.deadline)?;
        let negotiated = negotiation::negotiate(&mut connection)?;
        let stale = Arc::clone(config_stale);
        let channel = Channel::open(&mut connection, &negotiated, stale)?;
        Ok(Self {
            connection,
            negotiated,
            channel,
            told: Vec::new(),
        })
    }

    pub(super) fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.negotiated.has(feature)
    }

    /// Tells the back-end the memory layout, and the log again, which a back-end may
    /// forget with its old memory.
    pub(super) fn set_memory(
        &mut self,
        regions: &[Region],
        log: Option<&DirtyLog>,
    ) -> Result<(), VhostUserError> {
        if self.told == regions {
            return Ok(());
        }
        memory::update(&mut self.connection, &self.negotiated, &self.told, regions)?;
        self.told = regions.to_vec();
        self.set_log_base(log)
    }

    /// The feature bits that the back-end is told: its own of what the guest accepted.
    fn features(&self, accepted: u64, log: bool) -> u64 {
        let protocol = self.negotiated.features & PROTOCOL_FEATURES;
        accepted & self.negotiated.features | protocol | if log { LOG_ALL } else { 0 }
    }

    /// Starts the rings; the order is in the module's header. `inflight` is made if the
    /// back-end wants one.
    pub(super) fn start(
        &mut self,
        wanted: &Wanted,
        regions: &[Region],
        log: Option<&DirtyLog>,
        inflight: &mut Option<Inflight>,
        served: u16,
    ) -> Result<(), VhostUserError> {
        let device = self.connection.device().to_string();
        let rings = rings::locate(&device, regions, &wanted.queues, log.is_some())?;
        let features = self.features(wanted.features, log.is_some());
        self.connection
            .call("SET_FEATURES", |f| f.set_features(features))?;
        self.set_memory(regions, None)?;
        self.set_log_base(log)?;
        let queue_size = wanted.queues.iter().map(|q| q.size).max();
        if let Some(queue_size) = queue_size
            && self.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            let inflight = match inflight {
                Some(inflight) if inflight.fits(served, queue_size) => inflight,
                _ => inflight.insert(Inflight::get(&mut self.connection, served, queue_size)?),
            };
            inflight.set(&mut self.connection)?;
        }
        rings::start(&mut self.connection, &self.negotiated, &rings)?;
        self.connection.sync("the start of its rings")
    }

    /// Stops the rings, drained.
    pub(super) fn stop(&mut self, wanted: &Wanted) -> Result<Vec<StoppedQueue>, VhostUserError> {
        rings::stop(&mut self.connection, &wanted.queues)
    }

    /// RESET_DEVICE, where the back-end has it; its rings are stopped already.
    pub(super) fn reset(&mut self) -> Result<(), VhostUserError> {
        if self.has(VhostUserProtocolFeatures::RESET_DEVICE) {
            self.connection
                .call_acked("RESET_DEVICE", |f| f.reset_device())?;
        }
        Ok(())
    }

    /// Turns logging on or off under running rings.
    pub(super) fn set_log(
        &mut self,
        wanted: Option<&Wanted>,
        regions: &[Region],
        log: Option<&DirtyLog>,
    ) -> Result<(), VhostUserError> {
        self.set_log_base(log)?;
        let Some(wanted) = wanted else {
            return Ok(());
        };
        let device = self.connection.device().to_string();
        let rings = rings::locate(&device, regions, &wanted.queues, log.is_some())?;
        let features = self.features(wanted.features, log.is_some());
        self.connection
            .call("SET_FEATURES", |f| f.set_features(features))?;
        rings::set_log(&mut self.connection, &rings)?;
        self.connection.sync("the change of its dirty log")
    }

    /// Tells the back-end where the log is, if there is one and it can write one.
    fn set_log_base(&mut self, log: Option<&DirtyLog>) -> Result<(), VhostUserError> {
        let Some(log) = log else { return Ok(()) };
        if !self.has(VhostUserProtocolFeatures::LOG_SHMFD)
            || self.negotiated.features & LOG_ALL == 0
        {
            return Err(VhostUserError::Unsupported {
                device: self.connection.device().into(),
                what: "a dirty log in shared memory",
            });
        }
        log.set(&mut self.connection)
    }
}
