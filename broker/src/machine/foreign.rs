//! Back-ends of others: the broker connects to their sockets, as the core opens nothing, and
//! connects again when they come back.

use std::os::fd::OwnedFd;
use std::time::Duration;

use api::Error;
use api::core::CoreProxy;
use tokio::net::UnixStream;

use crate::name::DeviceId;

/// How long a back-end may take to accept a connection.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a core is asked whether it still has one: it tells by itself only what device
/// processes with a link say.
const GLANCE: Duration = Duration::from_millis(500);
/// How often a back-end that is gone is looked for.
const LOOK: Duration = Duration::from_millis(200);

/// Connects to a back-end's socket.
///
/// # Errors
/// Nobody listens there.
pub(super) async fn connect(id: &DeviceId, socket: &str) -> Result<OwnedFd, Error> {
    let unavailable = |why: &str| {
        Error::ResourceUnavailable(format!(
            "the back-end of device {id} cannot be reached at {socket} ({why}): start it first"
        ))
    };
    let connected = tokio::time::timeout(DEADLINE, UnixStream::connect(socket)).await;
    let stream = connected.map_err(|_| unavailable("it does not accept"))?;
    let stream = stream.and_then(UnixStream::into_std);
    let stream = stream.map_err(|error| unavailable(&error.to_string()))?;
    let blocking = stream.set_nonblocking(false);
    blocking.map_err(|error| unavailable(&error.to_string()))?;
    Ok(stream.into())
}

/// Reaches a lost back-end again, for ever. Tells when it is lost, and when another took over.
///
/// # Errors
/// The core cannot be asked any more.
pub(super) async fn keep<F: Future<Output = ()> + Send>(
    core: &CoreProxy<'static>,
    id: &DeviceId,
    socket: &str,
    tell: impl Fn(bool) -> F + Send + Sync,
) -> Result<(), Error> {
    loop {
        tokio::time::sleep(GLANCE).await;
        if is_lost(core, id).await? {
            tell(false).await;
            while is_lost(core, id).await? {
                tokio::time::sleep(LOOK).await;
                if let Ok(stream) = connect(id, socket).await
                    && let Err(error) = core.attach_backend(id.as_str(), stream.into()).await
                {
                    tracing::warn!(device = %id, %error, "its back-end does not take over");
                }
            }
            tell(true).await;
        }
    }
}

async fn is_lost(core: &CoreProxy<'static>, id: &DeviceId) -> Result<bool, Error> {
    Ok(!core.device_status(id.as_str()).await?.connected)
}
