//! Where the device is in its life, by the table of [`migration::state`].
//!
//! vhost-user has no words for the states; they follow from what the front-end does. The device
//! has every state; those of P2P are passed through, since it starts no access to other devices.
//!
//! ```text
//! first ring starts      → Running, or PreCopy when dirty logging is on
//! dirty logging on/off   Running ⇄ PreCopy
//! last ring stops        → Stop
//! SET_DEVICE_STATE_FD    Stop → StopCopy (save) or Resuming (load)
//! CHECK_DEVICE_STATE     → Stop, or Error when loading failed
//! RESET_DEVICE, new front-end   Error → Stop
//! ```

use migration::state::{DeviceState, Variant, path};

use super::error::SessionError;
use crate::device::StateError;
use crate::health::Health;

#[derive(Debug)]
pub(super) struct Lifecycle {
    state: DeviceState,
    health: Health,
}

impl Lifecycle {
    pub(super) fn new(health: Health) -> Self {
        health.set_state(DeviceState::Stop);
        Lifecycle {
            state: DeviceState::Stop,
            health,
        }
    }

    pub(super) fn state(&self) -> DeviceState {
        self.state
    }

    /// Goes to a state, on a legal way, if `device` can.
    pub(super) fn go(
        &mut self,
        to: DeviceState,
        device: impl FnOnce(DeviceState, DeviceState) -> Result<(), StateError>,
    ) -> Result<(), SessionError> {
        let from = self.state;
        if from != to {
            let steps = path(from, to, Variant::FULL)?;
            tracing::debug!(%from, ?steps, "device state");
            device(from, to).map_err(|source| SessionError::Device { from, to, source })?;
            self.set(to);
        }
        Ok(())
    }

    /// It failed.
    pub(super) fn fail(&mut self) {
        tracing::debug!(from = %self.state, "device state is Error until it is reset");
        self.set(DeviceState::Error);
    }

    /// The only way out of `Error`.
    pub(super) fn reset(&mut self) {
        self.set(DeviceState::Stop);
    }

    fn set(&mut self, state: DeviceState) {
        self.state = state;
        self.health.set_state(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn willing(_: DeviceState, _: DeviceState) -> Result<(), StateError> {
        Ok(())
    }

    #[test]
    fn error_is_left_only_by_reset() {
        let mut life = Lifecycle::new(Health::default());
        life.go(DeviceState::Resuming, willing).unwrap();
        life.fail();
        assert!(life.go(DeviceState::Running, willing).is_err());
        assert_eq!(life.state(), DeviceState::Error);
        life.reset();
        life.go(DeviceState::Running, willing).unwrap();
    }

    #[test]
    fn a_device_that_cannot_go_stays_where_it_is() {
        let mut life = Lifecycle::new(Health::default());
        let refuse = |_, _| Err(StateError("its lock is held elsewhere".into()));
        let error = life.go(DeviceState::Running, refuse).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the device did not go from Stop to Running"
        );
        assert_eq!(life.state(), DeviceState::Stop);
    }

    #[test]
    fn what_is_read_cannot_go_back_to_precopy() {
        let mut life = Lifecycle::new(Health::default());
        life.go(DeviceState::StopCopy, willing).unwrap();
        assert!(life.go(DeviceState::PreCopy, willing).is_err());
        assert_eq!(life.state(), DeviceState::StopCopy);
    }
}
