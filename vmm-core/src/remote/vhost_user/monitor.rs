//! The thread that notices what a back-end does of its own accord: it asks for
//! something, or it goes away; then it is looked for until it is back.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::shared::Shared;

/// A back-end that is away is looked for after this time, then after twice as long.
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(1);
/// A changed configuration is read as soon as nobody else talks to the back-end.
const BUSY_RETRY: Duration = Duration::from_millis(5);

pub(super) fn run(shared: &Shared) {
    let mut retry = FIRST_RETRY;
    while !shared.has_ended() {
        let watched = shared.watched();
        let config_stale = shared.is_config_stale();
        let timeout = if watched.looks_for_backend {
            Some(retry)
        } else {
            config_stale.then_some(BUSY_RETRY)
        };
        let timeout = timeout.map_or(PollTimeout::NONE, |t| {
            PollTimeout::try_from(t).unwrap_or(PollTimeout::MAX)
        });

        let mut fds = vec![PollFd::new(shared.wake().as_fd(), PollFlags::POLLIN)];
        if let Some(socket) = &watched.socket {
            // A hang-up is told without being asked for; answers are not read here.
            fds.push(PollFd::new(socket.as_fd(), PollFlags::empty()));
        }
        if let Some(channel) = &watched.channel {
            fds.push(PollFd::new(channel.as_fd(), PollFlags::POLLIN));
        }
        let ready = match poll(&mut fds, timeout) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => continue,
            Err(error) => {
                tracing::error!(%error, device = shared.id(), "a back-end is no longer watched");
                return;
            }
        };
        let is_ready = |i: usize| {
            let events = fds.get(i).and_then(PollFd::revents);
            events.is_some_and(|e| !e.is_empty())
        };
        let woken = is_ready(0);
        let hung_up = watched.socket.is_some() && is_ready(1);
        let asked = watched.channel.is_some() && is_ready(2);

        if woken {
            shared.take_wake();
        }
        if asked && let Some(channel) = &watched.channel {
            shared.serve(channel);
        }
        if hung_up && let Some(socket) = &watched.socket {
            shared.note_hang_up(socket);
        }
        shared.refresh_config();
        if watched.looks_for_backend && ready == 0 {
            retry = match shared.look_for_backend() {
                Ok(()) => FIRST_RETRY,
                Err(error) => {
                    tracing::debug!(%error, "the back-end is not back yet");
                    (retry * 2).min(LAST_RETRY)
                }
            };
        }
    }
}
