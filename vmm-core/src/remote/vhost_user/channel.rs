//! Requests of the back-end: a second socket on which it speaks first.
#![expect(
    unsafe_code,
    reason = "the vhost crate lends its socket only as a number"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{
    FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
};

use super::VhostUserError;
use super::config::system;
use super::connection::Connection;
use super::negotiation::Negotiated;
use super::watchdog::Watchdog;

/// A message whose first byte is there must be there whole within this time.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(1);

/// Notes what the back-end said. It is answered before anything is done about it, as the
/// back-end may answer nothing else until then.
struct Notes {
    config_stale: Arc<AtomicBool>,
}

impl VhostUserFrontendReqHandler for Notes {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.config_stale.store(true, Ordering::Release);
        Ok(0)
    }
}

/// This end of the back-end's channel.
pub(super) struct Channel {
    handler: Mutex<FrontendReqHandler<Notes>>,
    socket: Arc<UnixStream>,
}

impl Channel {
    /// SET_BACKEND_REQ_FD, if the back-end has something to say. A change of the
    /// configuration sets `config_stale`.
    pub(super) fn open(
        connection: &mut Connection,
        negotiated: &Negotiated,
        config_stale: Arc<AtomicBool>,
    ) -> Result<Option<Arc<Self>>, VhostUserError> {
        if !negotiated.has(VhostUserProtocolFeatures::BACKEND_REQ) {
            return Ok(None);
        }
        let failed = |source| {
            system(
                connection.device(),
                "make a channel for its requests",
                source,
            )
        };
        let mut handler = FrontendReqHandler::new(Arc::new(Notes { config_stale }))
            .map_err(|e| failed(io::Error::other(e)))?;
        handler.set_reply_ack_flag(negotiated.has(VhostUserProtocolFeatures::REPLY_ACK));
        // SAFETY: the handler owns the descriptor and outlives this borrow, which ends
        // with its duplication.
        let socket = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) }
            .try_clone_to_owned()
            .map_err(failed)?;
        let theirs = handler.get_tx_raw_fd();
        connection.call_acked("SET_BACKEND_REQ_FD", |f| f.set_backend_request_fd(&theirs))?;
        Ok(Some(Arc::new(Self {
            handler: Mutex::new(handler),
            socket: Arc::new(UnixStream::from(socket)),
        })))
    }

    /// Handles one request that has begun to arrive.
    pub(super) fn serve(&self, watchdog: &Watchdog) -> Result<(), vhost::vhost_user::Error> {
        let _guard = watchdog.guard(&self.socket, MESSAGE_DEADLINE);
        let mut handler = self.handler.lock().unwrap_or_else(PoisonError::into_inner);
        match handler.handle_request() {
            // Requests that this front-end does not have were answered with an error.
            Ok(_) | Err(vhost::vhost_user::Error::ReqHandlerError(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
