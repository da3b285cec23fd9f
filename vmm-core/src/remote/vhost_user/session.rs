//! A session: a connection on which features are agreed, and what the back-end has been
//! told since.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use migration::rings::Forecast;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::channel::Channel;
use super::connection::Connection;
use super::inflight::Inflight;
use super::log::DirtyLog;
use super::negotiation::{self, LOG_ALL, Negotiated, PROTOCOL_FEATURES, WIRED_RINGS};
use super::rings::Place;
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
    /// How the rings of a back-end of ours are wired.
    wired: Option<Wired>,
}

/// What rings are wired with.
#[derive(PartialEq, Eq)]
struct Wired {
    features: u64,
    places: Vec<Place>,
}

/// What a session needs to know of its device to wire its rings.
pub(super) struct Surroundings<'a> {
    /// Memory as it is.
    pub(super) regions: &'a [Region],
    /// Where writes are logged.
    pub(super) log: Option<&'a DirtyLog>,
    /// Made if the back-end wants one.
    pub(super) inflight: &'a mut Option<Inflight>,
    /// Rings that the back-end serves.
    pub(super) served: u16,
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
            wired: None,
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

    /// Tells the back-end everything that it needs to serve the rings, as far as it can be told
    /// before they run; nothing that it knows already.
    pub(super) fn wire(
        &mut self,
        wanted: &Wanted,
        around: Surroundings<'_>,
    ) -> Result<(), VhostUserError> {
        if !self.is_ours() {
            return self.set_memory(around.regions, around.log);
        }
        let wired = self.place(wanted, &around)?;
        if self.wired.as_ref() == Some(&wired) {
            return Ok(());
        }
        self.wired = None;
        self.prepare(wanted, wired.features, around)?;
        rings::wire(&mut self.connection, &wanted.queues, &wired.places)?;
        self.connection.sync("the wiring of its rings")?;
        self.wired = Some(wired);
        Ok(())
    }

    /// Has a back-end of ours start its rings; [`Self::started`] awaits it.
    pub(super) fn order_start(
        &mut self,
        wanted: &Wanted,
        around: Surroundings<'_>,
    ) -> Result<(), VhostUserError> {
        self.wire(wanted, around)?;
        rings::order_start(&mut self.connection, &wanted.queues)
    }

    /// Waits until rings run whose start was ordered, if one was.
    pub(super) fn started(&mut self, deadline: Duration) -> Result<(), VhostUserError> {
        match self.connection.is_owed() {
            true => rings::started(&mut self.connection, deadline),
            false => Ok(()),
        }
    }

    /// Starts the rings; the order is in the module's header.
    pub(super) fn start(
        &mut self,
        wanted: &Wanted,
        around: Surroundings<'_>,
    ) -> Result<(), VhostUserError> {
        if self.is_ours() {
            self.order_start(wanted, around)?;
            return self.started(self.connection.deadline());
        }
        let Wired { features, places } = self.place(wanted, &around)?;
        self.prepare(wanted, features, around)?;
        let queues = &wanted.queues;
        rings::start(&mut self.connection, &self.negotiated, queues, &places)?;
        self.connection.sync("the start of its rings")
    }

    fn place(&self, wanted: &Wanted, around: &Surroundings<'_>) -> Result<Wired, VhostUserError> {
        let log = around.log.is_some();
        let device = self.connection.device();
        Ok(Wired {
            features: self.features(wanted.features, log),
            places: rings::locate(device, around.regions, &wanted.queues, log)?,
        })
    }

    /// Features, memory, log and inflight: what comes before rings.
    fn prepare(
        &mut self,
        wanted: &Wanted,
        features: u64,
        around: Surroundings<'_>,
    ) -> Result<(), VhostUserError> {
        self.connection
            .call("SET_FEATURES", |f| f.set_features(features))?;
        self.set_memory(around.regions, None)?;
        self.set_log_base(around.log)?;
        let queue_size = wanted.queues.iter().map(|q| q.size).max();
        if let Some(queue_size) = queue_size
            && self.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            let served = around.served;
            let inflight = match around.inflight {
                Some(inflight) if inflight.fits(served, queue_size) => inflight,
                inflight => {
                    inflight.insert(Inflight::get(&mut self.connection, served, queue_size)?)
                }
            };
            inflight.set(&mut self.connection)?;
        }
        Ok(())
    }

    /// Whether the back-end is of ours: rings are wired ahead, and start and stop at once.
    pub(super) fn is_ours(&self) -> bool {
        self.has(WIRED_RINGS)
    }

    /// Has the back-end take what only one process may have, or give it up. Others take it when
    /// they start.
    pub(super) fn hold(&mut self, hold: bool) -> Result<(), VhostUserError> {
        if self.is_ours() {
            rings::hold(&mut self.connection, hold)?;
        }
        Ok(())
    }

    /// What a switchover will take, as far as the back-end can say. Its answer also shows how long
    /// one takes.
    pub(super) fn forecast(&mut self) -> Result<Forecast, VhostUserError> {
        if self.is_ours() {
            return rings::forecast(&mut self.connection);
        }
        self.connection.sync("a question")?;
        Ok(Forecast::default())
    }

    /// Maps what guest memory holds, where the back-end can be asked to.
    pub(super) fn prefault(&mut self, deadline: Duration) -> Result<(), VhostUserError> {
        if self.is_ours() {
            rings::prefault(&mut self.connection, deadline)?;
        }
        Ok(())
    }

    /// Has a back-end of ours stop and save into `channel`; [`Self::stop`] awaits the first.
    pub(super) fn order_stop(
        &mut self,
        channel: &OwnedFd,
        goes: bool,
    ) -> Result<(), VhostUserError> {
        rings::order_stop(&mut self.connection, Some(channel), goes)
    }

    /// Stops the rings, drained; if that was ordered, by a deadline of its own.
    pub(super) fn stop(
        &mut self,
        wanted: &Wanted,
        ordered: Option<Duration>,
    ) -> Result<Vec<StoppedQueue>, VhostUserError> {
        let (connection, queues) = (&mut self.connection, &wanted.queues);
        if !self.negotiated.has(WIRED_RINGS) {
            return rings::stop(connection, queues);
        }
        if ordered.is_none() {
            rings::order_stop(connection, None, false)?;
        }
        let deadline = ordered.unwrap_or(connection.deadline());
        rings::stopped(connection, queues, deadline)
    }

    /// RESET_DEVICE, where the back-end has it; its rings are stopped already.
    pub(super) fn reset(&mut self) -> Result<(), VhostUserError> {
        self.wired = None;
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
        let device = self.connection.device();
        let places = rings::locate(device, regions, &wanted.queues, log.is_some())?;
        let features = self.features(wanted.features, log.is_some());
        self.wired = None;
        self.connection
            .call("SET_FEATURES", |f| f.set_features(features))?;
        rings::set_log(&mut self.connection, &places)?;
        self.connection.sync("the change of its dirty log")?;
        self.wired = self.is_ours().then_some(Wired { features, places });
        Ok(())
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
