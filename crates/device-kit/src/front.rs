//! Front-ends, one after the other.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use crate::device::{HostError, OptionError};
use crate::listen::{self, Front};
use crate::options::ProcessOptions;
use crate::server::{ServeResult, Server};

/// The connection that is being served, for whoever must end it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connection(Arc<Mutex<Option<UnixStream>>>);

impl Connection {
    /// Ends the connection; the session follows. False when there is none.
    pub(crate) fn shut_down(&self) -> bool {
        let current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = current.as_ref() {
            // It fails only when the front-end is gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        current.is_some()
    }

    fn set(&self, stream: Option<UnixStream>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }
}

/// Takes over the socket that was handed over, if one was. To be called before anything is opened: what
/// is open then was handed over, too.
pub(crate) fn inherit(options: &ProcessOptions) -> Result<Option<Front>, OptionError> {
    if options.socket.fd.is_some() && options.socket.fd == options.control_fd {
        return Err(OptionError {
            option: "--control-fd",
            value: options.control_fd.unwrap_or(-1).to_string(),
            problem: "is the descriptor of --fd too; hand over two sockets".to_owned(),
        });
    }
    let inherit = |fd| listen::inherit("--fd", fd);
    options.socket.fd.map(inherit).transpose()
}

/// Listens at the path, which the command line has if no socket was handed over.
pub(crate) fn bind(options: &ProcessOptions) -> Result<Front, OptionError> {
    let path = options.socket.socket_path.as_deref();
    listen::bind("--socket-path", path.unwrap_or(Path::new(""))).map(Front::Listening)
}

/// Serves all that come, until `stopping`.
pub(crate) fn serve<S: Server>(
    front: Front,
    server: &Arc<S>,
    connection: &Connection,
    stopping: &AtomicBool,
) -> ServeResult {
    let one = |stream: UnixStream| {
        connection.set(Some(stream.try_clone()?));
        let ended = server.serve(stream);
        connection.set(None);
        ended
    };
    let listener = match front {
        Front::Connected(stream) => return one(stream),
        Front::Listening(listener) => listener,
    };
    while !stopping.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((stream, _)) => one(stream)?,
            Err(error) if is_passing(&error) => {
                tracing::warn!(%error, "a front-end could not connect");
                thread::sleep(Duration::from_millis(100));
            }
            Err(error) => return Err(HostError::new("cannot accept front-ends", error).into()),
        }
    }
    Ok(())
}

/// Whether another `accept` may succeed.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EINTR | Errno::ECONNABORTED | Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)
    )
}
