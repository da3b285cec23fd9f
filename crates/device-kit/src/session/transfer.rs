//! Saved state on its way, on the control thread like all that a front-end asks for.
//!
//! ```text
//! SET_DEVICE_STATE_FD, save ─▶ answered ─▶ saved ─▶ CHECK_DEVICE_STATE asks how it ended
//! SET_DEVICE_STATE_FD, load ─▶ answered ─▶ other messages … the first byte ─▶ loaded ─▶ as above
//! STOP with a channel       ─▶ answered ─▶ saved, what only one may have given up ─▶ answered
//! ```
//! A device that is to load may wait for its twin to stop, as long as that takes: only from the first
//! byte on, or from CHECK_DEVICE_STATE, there is a deadline. The end of the session ends a transfer.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use migration::channel::{Cancel, StateChannel};
use migration::frame::{FrameError, FrameReader, FrameWriter};
use migration::schema::UnitId;
use thiserror::Error;

use crate::device::{Device, StateError};

/// A peer that does not take or give all of the state within this time is given up.
const CHANNEL_DEADLINE: Duration = Duration::from_secs(60);

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
}

/// A transfer that was asked for and not yet checked.
#[derive(Debug)]
pub(super) struct Transfer {
    pub(super) direction: Direction,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Asked(OwnedFd),
    Over(Result<(), TransferError>),
}

impl Transfer {
    pub(super) fn new(direction: Direction, fd: OwnedFd) -> Self {
        Transfer {
            direction,
            stage: Stage::Asked(fd),
        }
    }

    /// What a device that is to load waits for.
    pub(super) fn awaited(&self) -> Option<BorrowedFd<'_>> {
        match (&self.stage, self.direction) {
            (Stage::Asked(fd), Direction::Load) => Some(fd.as_fd()),
            _ => None,
        }
    }

    /// Whether a device that is to save has not done so.
    pub(super) fn is_to_save(&self) -> bool {
        matches!(self.stage, Stage::Asked(_)) && self.direction == Direction::Save
    }

    /// Does it, if it is not over; returns it as it is then.
    pub(super) fn go_on<D: Device>(self, device: &D, unit: &UnitId, cancel: Cancel) -> Self {
        let Stage::Asked(fd) = self.stage else {
            return self;
        };
        let channel = StateChannel::new(fd, CHANNEL_DEADLINE, cancel);
        let result = match self.direction {
            Direction::Save => save(device, unit, channel),
            Direction::Load => load(device, unit, channel),
        };
        Transfer {
            direction: self.direction,
            stage: Stage::Over(result),
        }
    }

    /// How it ended; fine as long as it has not.
    pub(super) fn result(self) -> Result<(), TransferError> {
        match self.stage {
            Stage::Asked(_) => Ok(()),
            Stage::Over(result) => result,
        }
    }
}

fn save<D: Device>(device: &D, unit: &UnitId, channel: StateChannel) -> Result<(), TransferError> {
    let state = device.save()?;
    let mut frame = FrameWriter::begin(channel, unit, &state)?;
    if let Some(bulk) = device.bulk() {
        bulk.save(&mut |piece| frame.bulk(piece))?;
    }
    frame.finish()?;
    Ok(())
}

fn load<D: Device>(device: &D, unit: &UnitId, channel: StateChannel) -> Result<(), TransferError> {
    let mut reader = FrameReader::begin(channel)?;
    let state = reader.structured::<D::SavedState>(unit)?;
    match device.bulk() {
        None => {
            reader.finish()?;
        }
        Some(bulk) => {
            bulk.begin();
            let mut piece = Vec::new();
            while reader.bulk(&mut piece)?.is_some() {
                bulk.load(&piece)?;
            }
        }
    }
    device.load(state)?;
    Ok(())
}
