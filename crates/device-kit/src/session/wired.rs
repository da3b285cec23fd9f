//! The messages of [`migration::rings`]: wired rings start and stop by one message each.

use std::io::Write;
use std::os::unix::net::UnixStream;

use migration::rings::{self, MAX_REASON, MAX_RINGS, RingBase};

use super::connection::{FLAG_REPLY, HEADER, Message, VERSION_1, take_message};
use super::error::SessionError;
use super::{Session, State};
use crate::device::{Device, OptionError};

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    Start(Vec<RingBase>),
    Stop { leaves: bool },
    Hold(bool),
    Forecast,
    Prefault,
}

/// Whether a request is one of these.
pub(super) fn is_one(request: u32) -> bool {
    [
        rings::START,
        rings::STOP,
        rings::HOLD,
        rings::FORECAST,
        rings::PREFAULT,
    ]
    .contains(&request)
}

impl<D: Device> Session<D> {
    /// Takes one of these messages from the socket, does it, and answers.
    pub(super) fn wired_rings(&self, stream: &UnixStream) -> Result<(), SessionError> {
        let Message {
            request,
            body,
            mut fds,
            ..
        } = take_message(stream, 0..=MAX_RINGS * 8)?;
        let channel = fds.pop();
        if !fds.is_empty() || (channel.is_some() && request != rings::STOP) {
            return Err(SessionError::WiredRings("has descriptors"));
        }
        if self.protocol_features() & rings::FEATURE == 0 {
            return Err(SessionError::WiredRings("was not negotiated"));
        }
        let asked = parse(request, &body)?;
        let leaves = asked == Request::Stop { leaves: true };
        if leaves && channel.is_none() {
            return Err(SessionError::WiredRings("has no descriptor"));
        }
        let body = match asked {
            Request::Start(rings) => self.start_wired(&rings)?,
            Request::Stop { .. } => rings::encode(&self.stop_wired()?),
            Request::Hold(hold) => self.hold(hold)?,
            Request::Forecast => self.services.device.forecast().encode(),
            Request::Prefault => {
                self.services.prefault.finish();
                Vec::new()
            }
        };
        answer(stream, request, body)?;
        let Some(channel) = channel else {
            return Ok(());
        };
        let problem = match self.save_now(channel) {
            Err(reason) => {
                self.transfer_failed(&reason);
                cut(reason)
            }
            Ok(()) if leaves => self.hold(false)?,
            Ok(()) => Vec::new(),
        };
        answer(stream, request, problem)
    }

    /// Why not, or nothing.
    fn start_wired(&self, rings: &[RingBase]) -> Result<Vec<u8>, SessionError> {
        let state = &mut *self.state();
        let mut places = Vec::with_capacity(rings.len());
        for ring in rings {
            let at = self.vring_at(ring.index.into())?;
            let vring = &mut state.vrings[at];
            if vring.running || !vring.kick || vring.addresses.is_none() {
                return Err(SessionError::NotWired { queue: vring.index });
            }
            vring.base = ring.base;
            places.push(at);
        }
        if let Err(error) = self.services.acquire() {
            return Ok(self.reason(&error));
        }
        for at in places {
            state.vrings[at].enabled = true;
            self.update_ring(state, at)?;
        }
        Ok(Vec::new())
    }

    fn stop_wired(&self) -> Result<Vec<RingBase>, SessionError> {
        let state: &mut State = &mut self.state();
        let ran: Vec<usize> = (0..state.vrings.len())
            .filter(|&at| state.vrings[at].running)
            .collect();
        self.stop_rings(state, &ran)?;
        for vring in &mut state.vrings {
            vring.enabled = false;
        }
        let stopped = ran.iter().map(|&at| RingBase {
            index: state.vrings[at].index.get(),
            base: state.vrings[at].base,
        });
        Ok(stopped.collect())
    }

    /// Why not, or nothing.
    fn hold(&self, hold: bool) -> Result<Vec<u8>, SessionError> {
        let result = if hold {
            self.services.acquire()
        } else if let Some(vring) = self.state().vrings.iter().find(|vring| vring.running) {
            return Err(SessionError::Running {
                queue: vring.index,
                what: "what only one process may have",
            });
        } else {
            self.services.release()
        };
        Ok(result.map_or_else(|error| self.reason(&error), |()| Vec::new()))
    }

    fn reason(&self, error: &OptionError) -> Vec<u8> {
        tracing::warn!(%error, "the machine cannot be served here");
        self.services.health.error(error);
        cut(error.to_string())
    }
}

fn cut(mut reason: String) -> Vec<u8> {
    reason.truncate(reason.floor_char_boundary(MAX_REASON));
    reason.into_bytes()
}

fn answer(mut stream: &UnixStream, request: u32, body: Vec<u8>) -> Result<(), SessionError> {
    let mut answer = Vec::with_capacity(HEADER + body.len());
    // Bounded by the number of rings and the length of a reason.
    let size = u32::try_from(body.len()).unwrap_or(0);
    for word in [request, VERSION_1 | FLAG_REPLY, size] {
        answer.extend(word.to_ne_bytes());
    }
    answer.extend(body);
    stream.write_all(&answer).map_err(SessionError::Connection)
}

fn parse(request: u32, body: &[u8]) -> Result<Request, SessionError> {
    let parsed = match (request, body) {
        (rings::START, body) => rings::decode(body).map(Request::Start),
        (rings::STOP, body) => yes_or_no(body).map(|leaves| Request::Stop { leaves }),
        (rings::FORECAST, []) => Some(Request::Forecast),
        (rings::PREFAULT, []) => Some(Request::Prefault),
        (rings::HOLD, body) => yes_or_no(body).map(Request::Hold),
        _ => None,
    };
    parsed.ok_or(SessionError::WiredRings("has an impossible body"))
}

fn yes_or_no(body: &[u8]) -> Option<bool> {
    match u32::from_ne_bytes(body.try_into().ok()?) {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_known_by_their_bodies_too() {
        let ring = RingBase { index: 3, base: 9 };
        let start = parse(rings::START, &rings::encode(&[ring])).unwrap();
        assert_eq!(start, Request::Start(vec![ring]));
        assert_eq!(parse(rings::FORECAST, &[]).unwrap(), Request::Forecast);
        let one = 1u32.to_ne_bytes();
        assert_eq!(parse(rings::HOLD, &one).unwrap(), Request::Hold(true));
        let leaves = true;
        assert_eq!(parse(rings::STOP, &one).unwrap(), Request::Stop { leaves });
        for (request, body) in [
            (rings::START, &one[..]),
            (rings::STOP, &[]),
            (rings::HOLD, &[]),
            (rings::HOLD, &2u32.to_ne_bytes()),
            (0, &[]),
        ] {
            assert!(parse(request, body).is_err(), "{request:#x} {body:?}");
        }
    }
}
