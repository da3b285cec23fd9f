//! A back-end that goes away, and the one that takes its place.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

use super::channel::Channel;
use super::negotiation::Negotiated;
use super::session::Session;
use super::shared::{Phase, Shared, Standing, State};
use super::{VhostUserError, device_config};
use crate::remote::endpoint::connect_to;

/// So many back-ends in a row may go away while they are set up, before the driver is
/// told to start anew.
const MAX_FAILURES: u32 = 5;

/// What the monitor has to look at.
pub(super) struct Watched {
    pub(super) socket: Option<Arc<UnixStream>>,
    pub(super) channel: Option<Arc<Channel>>,
    pub(super) looks_for_backend: bool,
}

impl Shared {
    /// What the monitor has to look at now.
    pub(super) fn watched(&self) -> Watched {
        match &self.state().phase {
            Phase::Connected(session) => Watched {
                socket: Some(Arc::clone(session.connection.socket())),
                channel: session.channel.clone(),
                looks_for_backend: false,
            },
            Phase::Away => Watched {
                socket: None,
                channel: None,
                looks_for_backend: self.path.is_some(),
            },
            Phase::Failed(_) => Watched {
                socket: None,
                channel: None,
                looks_for_backend: false,
            },
        }
    }

    /// The back-end at the other end of `socket` is gone.
    pub(super) fn note_hang_up(&self, socket: &Arc<UnixStream>) {
        let state = &mut *self.state();
        if let Phase::Connected(session) = &state.phase
            && Arc::ptr_eq(session.connection.socket(), socket)
        {
            tracing::warn!(device = self.id(), "the back-end hung up");
            self.set_phase(state, Phase::Away);
        }
    }

    /// Handles a request of the back-end, or closes a channel that carries none.
    pub(super) fn serve(&self, channel: &Arc<Channel>) {
        let Err(error) = channel.serve(&self.watchdog) else {
            return;
        };
        tracing::warn!(%error, device = self.id(), "the back-end's requests are no longer heard");
        if let Phase::Connected(session) = &mut self.state().phase
            && session
                .channel
                .as_ref()
                .is_some_and(|c| Arc::ptr_eq(c, channel))
        {
            session.channel = None;
        }
    }

    /// One attempt to find the back-end where it was.
    pub(super) fn look_for_backend(&self) -> Result<(), VhostUserError> {
        let path = self.path.as_ref().ok_or_else(|| self.away())?;
        let stream = connect_to(self.id(), path, self.config.deadline)?;
        self.attach(stream)
    }

    /// Puts a back-end into the place of the one that was there. One that cannot take it
    /// is an error for good; one that goes away again is not, but what makes several go
    /// away is taken for what the driver wants of them.
    pub(super) fn attach(&self, stream: UnixStream) -> Result<(), VhostUserError> {
        let state = &mut *self.state();
        self.set_phase(state, Phase::Away);
        let result = self.set_up(state, stream);
        let result = match result {
            Ok(()) => {
                *self.standing() = Standing::CONNECTED;
                state.failures = 0;
                self.reconnects.fetch_add(1, Ordering::Relaxed);
                tracing::info!(device = self.id(), "the back-end is back");
                Ok(())
            }
            Err(error) if error.may_pass() => {
                self.set_phase(state, Phase::Away);
                // One that only says nothing has not been harmed by what the driver wants.
                state.failures += u32::from(error.is_hang_up());
                if state.failures == MAX_FAILURES && state.wanted.take().is_some() {
                    self.report(&error);
                }
                Err(error)
            }
            Err(error) => {
                self.report(&error);
                let cause = Arc::new(error);
                self.set_phase(state, Phase::Failed(Arc::clone(&cause)));
                Err(VhostUserError::Failed {
                    device: self.id().into(),
                    source: cause,
                })
            }
        };
        self.wake_monitor();
        result
    }

    /// The driver and the machine are told that the device does not work.
    fn report(&self, error: &VhostUserError) {
        if let Some(notifier) = self.notifier.get() {
            notifier.trouble(error);
        }
    }

    fn set_up(&self, state: &mut State, stream: UnixStream) -> Result<(), VhostUserError> {
        let mut session = Session::open(&self.config, stream, &self.watchdog, &self.config_stale)?;
        self.check_same(&session.negotiated)?;
        for (&offset, data) in &state.unwritten {
            match device_config::write(&mut session.connection, offset, data) {
                // A driver may write what is read-only; nothing changes then.
                Ok(()) | Err(VhostUserError::Refused { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        session.set_memory(&state.regions, None)?;
        if let Some(wanted) = &mut state.wanted {
            let device = self.bases_from_memory(wanted);
            for (queue, stopped) in wanted.queues.iter_mut().zip(device) {
                queue.base = stopped.base;
            }
        }
        if let (None, Some(log)) = (&state.wanted, &state.log) {
            session.set_log(None, &state.regions, Some(log))?;
        }
        // Others hear of it when its rings run.
        state.phase = Phase::Connected(Box::new(session));
        let started = self.start(state);
        self.note(state, &started);
        started?;
        state.unwritten.clear();
        // Now that it has what its predecessor has left.
        let bytes = self.fetch_config(state)?;
        let same = |bytes: &Vec<u8>| *bytes == *self.config_bytes();
        if let Some(bytes) = bytes.filter(|bytes| !same(bytes)) {
            self.change_config(bytes);
        }
        // What the guest rang for, and what the back-end used before it could say so.
        for queue in state.wanted.iter().flat_map(|w| &w.queues) {
            for event in [&queue.kick, &queue.call] {
                // Fails only at 2^64 unheard signals, which one more would not change.
                let _ = event.write(1);
            }
        }
        Ok(())
    }

    fn check_same(&self, negotiated: &Negotiated) -> Result<(), VhostUserError> {
        let missing = self.needed & !negotiated.features;
        if missing != 0 {
            return Err(VhostUserError::FeaturesLost {
                device: self.id().into(),
                missing,
            });
        }
        if self.has_remote_config && !negotiated.has(Protocol::CONFIG) {
            return Err(VhostUserError::NoConfig {
                device: self.id().into(),
                hint: " any more",
            });
        }
        let served = u64::from(self.plan.served);
        match negotiated.rings {
            Some(offered) if offered < served => Err(VhostUserError::TooFewQueues {
                device: self.id().into(),
                wanted: self.plan.served,
                offered,
            }),
            _ => Ok(()),
        }
    }
}
