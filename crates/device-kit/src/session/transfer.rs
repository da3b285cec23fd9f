//! Saved state on its way.
//!
//! ```text
//! SET_DEVICE_STATE_FD ─▶ a thread of its own ─▶ CHECK_DEVICE_STATE asks for its end
//! STOP with a channel ─▶ on the control thread, at once
//! ```
//! A device that is to load may wait for its twin to stop, as long as that takes: only from the first
//! byte on there is a deadline.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use migration::channel::{Cancel, StateChannel};
use migration::frame::{FrameError, FrameReader, FrameWriter};
use migration::schema::UnitId;
use thiserror::Error;

use crate::device::{Device, StateError};

/// A peer that does not take or give all of the state within this time is given up.
const CHANNEL_DEADLINE: Duration = Duration::from_secs(60);
/// The twin's machine is copied before it stops. Whoever waits for it ends the session when it does
/// not come.
const TWIN_DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);
/// The thread ends within this time after the channel did.
const END_DEADLINE: Duration = Duration::from_secs(70);

/// Which way the state goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Save,
    Load,
}

#[derive(Debug, Error)]
pub(super) enum TransferError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Device(#[from] StateError),
    #[error("nothing came from the device's twin")]
    Twin(#[source] std::io::Error),
    #[error("the state thread cannot be started")]
    Thread(#[from] std::io::Error),
    #[error("the state thread did not end within {} s", END_DEADLINE.as_secs())]
    Timeout,
    #[error("the state thread died")]
    Died,
}

/// A transfer that was started and not yet checked.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) direction: Direction,
    cancel: Cancel,
    result: Receiver<Result<u64, TransferError>>,
}

impl Transfer {
    pub(super) fn start<D: Device>(
        direction: Direction,
        device: Arc<D>,
        unit: UnitId,
        fd: OwnedFd,
    ) -> Result<Self, TransferError> {
        let cancel = Cancel::new()?;
        let channel_end = StateChannel::new(fd, TWIN_DEADLINE, cancel.clone());
        let (report, result) = channel();
        let work = move || {
            let outcome = match direction {
                Direction::Save => save(&*device, &unit, channel_end),
                Direction::Load => load(&*device, &unit, channel_end),
            };
            // Nobody listens when the front-end went away meanwhile.
            let _ = report.send(outcome);
        };
        thread::Builder::new().name("state".into()).spawn(work)?;
        Ok(Transfer {
            direction,
            cancel,
            result,
        })
    }

    /// Waits for its end; returns the bytes moved.
    pub(super) fn finish(self) -> Result<u64, TransferError> {
        match self.result.recv_timeout(END_DEADLINE) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => Err(TransferError::Timeout),
            Err(RecvTimeoutError::Disconnected) => Err(TransferError::Died),
        }
    }

    /// Ends it early and waits for that.
    pub(super) fn abandon(self) -> Result<u64, TransferError> {
        self.cancel.cancel();
        self.finish()
    }
}

/// Saves a stopped device; the bytes moved.
pub(super) fn save_now<D: Device>(
    device: &D,
    unit: &UnitId,
    fd: OwnedFd,
) -> Result<u64, TransferError> {
    save(
        device,
        unit,
        StateChannel::new(fd, CHANNEL_DEADLINE, Cancel::new()?),
    )
}

fn save<D: Device>(
    device: &D,
    unit: &UnitId,
    mut channel: StateChannel,
) -> Result<u64, TransferError> {
    channel.set_deadline(CHANNEL_DEADLINE);
    let state = device.save()?;
    let mut frame = FrameWriter::begin(channel, unit, &state)?;
    if let Some(bulk) = device.bulk() {
        bulk.save(&mut |piece| frame.bulk(piece))?;
    }
    let (_, len) = frame.finish()?;
    Ok(len)
}

fn load<D: Device>(
    device: &D,
    unit: &UnitId,
    mut channel: StateChannel,
) -> Result<u64, TransferError> {
    channel.await_readable().map_err(TransferError::Twin)?;
    channel.set_deadline(CHANNEL_DEADLINE);
    let mut reader = FrameReader::begin(channel)?;
    let state = reader.structured::<D::SavedState>(unit)?;
    let len = match device.bulk() {
        None => reader.finish()?,
        Some(bulk) => {
            bulk.begin();
            let mut piece = Vec::new();
            while reader.bulk(&mut piece)?.is_some() {
                bulk.load(&piece)?;
            }
            reader.bytes()
        }
    };
    device.load(state)?;
    Ok(len)
}
