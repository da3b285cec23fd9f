//! `org.godwit.Vmm1.Balloon` at `/org/godwit/Vmm1/machine/NAME/device/ID`: a device that is a
//! memory balloon, beside [`crate::device`].

use std::collections::BTreeMap;
use std::future::Future;

use zbus::message::Header;
use zbus::object_server::SignalEmitter;

use crate::balloon1::Status;
use crate::{Caller, Error};

/// Name of the interface.
pub const INTERFACE: &str = "org.godwit.Vmm1.Balloon";

/// What a broker does for one balloon.
pub trait OneBalloon: Send + Sync + 'static {
    /// Target, actual size and statistics, in this order; see [`BalloonProxy`].
    fn look(&self)
    -> impl Future<Output = Result<(u64, u64, BTreeMap<String, u64>), Error>> + Send;
    /// See [`BalloonProxy::set_target`].
    fn set_target(
        &self,
        caller: Caller,
        bytes: u64,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// See [`BalloonProxy::statistics_interval`].
    fn statistics_interval(&self) -> impl Future<Output = Result<u32, Error>> + Send;
    /// See [`BalloonProxy::set_statistics_interval`].
    fn set_statistics_interval(
        &self,
        caller: Caller,
        seconds: u32,
    ) -> impl Future<Output = Result<(), Error>> + Send;
}

/// The interface on [`OneBalloon`].
#[derive(Debug)]
pub struct Balloon<B>(pub B);

/// The memory balloon of a machine that runs: memory that its guest gives to the host. The guest
/// follows a new target by and by, as far as it can spare memory; changes of what it is, other than
/// `Statistics`, are signalled, at most four times a second.
#[zbus::interface(
    name = "org.godwit.Vmm1.Balloon",
    proxy(default_service = "org.godwit.Vmm1")
)]
impl<B: OneBalloon> Balloon<B> {
    /// Bytes that the guest shall give, a multiple of 4096. It counts until the machine ends.
    #[zbus(property)]
    async fn target(&self) -> Result<u64, Error> {
        Ok(self.0.look().await?.0)
    }

    /// Asks the guest for so many.
    #[zbus(property)]
    async fn set_target(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        bytes: u64,
    ) -> Result<(), Error> {
        let caller = Caller::of_property(header.as_ref())?;
        self.0.set_target(caller, bytes).await
    }

    /// Bytes that the guest has given, as it says.
    #[zbus(property)]
    async fn actual(&self) -> Result<u64, Error> {
        Ok(self.0.look().await?.1)
    }

    /// What the guest said of its memory last, by name: bytes (`free_bytes`, `total_bytes`,
    /// `available_bytes`, `disk_cache_bytes`, …) and counts (`major_faults`, `oom_kills`, …). Empty
    /// when it never did. Its changes are not signalled.
    #[zbus(property(emits_changed_signal = "false"))]
    async fn statistics(&self) -> Result<BTreeMap<String, u64>, Error> {
        Ok(self.0.look().await?.2)
    }

    /// Seconds between two questions for `Statistics`, at most 3600; 0: none is asked. It counts
    /// until the machine ends.
    #[zbus(property)]
    async fn statistics_interval(&self) -> Result<u32, Error> {
        self.0.statistics_interval().await
    }

    /// Asks as often from now on.
    #[zbus(property)]
    async fn set_statistics_interval(
        &self,
        #[zbus(header)] header: Option<Header<'_>>,
        seconds: u32,
    ) -> Result<(), Error> {
        let caller = Caller::of_property(header.as_ref())?;
        self.0.set_statistics_interval(caller, seconds).await
    }
}

/// Tells in one PropertiesChanged what is different in `now`, if anything is.
///
/// # Errors
/// The connection is over.
pub async fn tell_changes(
    emitter: &SignalEmitter<'_>,
    told: Status,
    now: Status,
) -> zbus::Result<()> {
    crate::balloon1::tell_status(emitter, INTERFACE, told, now).await
}
