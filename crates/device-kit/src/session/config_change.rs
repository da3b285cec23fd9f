//! Tells the front-end that the configuration space changed.
//!
//! The back-end channel (SET_BACKEND_REQ_FD) carries one message in this direction that a device
//! needs, CONFIG_CHANGE_MSG. It is written here because the `vhost` crate's type for the channel
//! does not have it.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A front-end that does not read its channel for this long is not told.
const DEADLINE: Duration = Duration::from_millis(100);

const CONFIG_CHANGE_MSG: u32 = 2;
const VERSION_1: u32 = 1;

/// Handle by which a device, from any thread, tells its front-end to read the configuration space
/// again. Without a front-end, or with one that does not care, nothing happens: a new front-end
/// reads it anyway.
#[derive(Clone, Debug, Default)]
pub struct ConfigChange {
    channel: Arc<Mutex<Option<UnixStream>>>,
}

impl ConfigChange {
    /// Tells it.
    pub fn notify(&self) {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = channel.as_mut() else {
            return;
        };
        let mut message = [0; 12];
        message[..4].copy_from_slice(&CONFIG_CHANGE_MSG.to_ne_bytes());
        message[4..8].copy_from_slice(&VERSION_1.to_ne_bytes());
        if let Err(error) = stream.write_all(&message) {
            tracing::warn!(%error, "the front-end was not told of a configuration change");
            *channel = None;
        }
    }

    /// The front-end's channel, or none any more.
    pub(crate) fn set_channel(&self, stream: Option<UnixStream>) {
        if let Some(Err(error)) = stream.as_ref().map(|s| s.set_write_timeout(Some(DEADLINE))) {
            tracing::warn!(%error, "the back-end channel has no write deadline");
        }
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}
