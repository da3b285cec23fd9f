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

use migration::state::{DeviceState, IllegalTransition, Variant, path};

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

    /// Goes to a state, on a legal way.
    pub(super) fn go(&mut self, to: DeviceState) -> Result<(), IllegalTransition> {
        if self.state != to {
            let steps = path(self.state, to, Variant::FULL)?;
            tracing::debug!(from = %self.state, ?steps, "device state");
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

    #[test]
    fn error_is_left_only_by_reset() {
        let mut life = Lifecycle::new(Health::default());
        life.go(DeviceState::Resuming).unwrap();
        life.fail();
        assert!(life.go(DeviceState::Running).is_err());
        assert_eq!(life.state(), DeviceState::Error);
        life.reset();
        life.go(DeviceState::Running).unwrap();
    }

    #[test]
    fn what_is_read_cannot_go_back_to_precopy() {
        let mut life = Lifecycle::new(Health::default());
        life.go(DeviceState::StopCopy).unwrap();
        assert!(life.go(DeviceState::PreCopy).is_err());
        assert_eq!(life.state(), DeviceState::StopCopy);
    }
}
