//! The thread that notices when the process goes away.

use std::os::fd::AsFd as _;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::function::Function;

pub(super) fn run(function: &Function) {
    let wake = function.wake();
    while !function.has_ended() {
        let client = function.process().client();
        let mut fds = vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        if let Some(client) = &client {
            // A hang-up is told without being asked for; answers are not read here.
            fds.push(PollFd::new(client.as_fd(), PollFlags::empty()));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => {
                let device = function.process().id();
                tracing::error!(%error, device, "a device's process is no longer watched");
                return;
            }
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let hung_up = fds.get(1).is_some_and(is_ready);
        if is_ready(&fds[0]) {
            // Empty is what it shall be.
            let _ = wake.read();
        }
        if hung_up && let Some(client) = &client {
            function.lose(client);
        }
    }
}
