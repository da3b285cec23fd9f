//! State of a core from a hostile peer or a file, and the small messages about rings.

use std::time::Duration;

use migration::rings::{self, Forecast};
use migration::schema::Schema;
use vmm_core::migration::saved_state::{CoreState, WiringState};

/// See the module.
pub fn core_state(data: &[u8]) {
    if let Ok(mut core) = CoreState::decode(CoreState::NUMBER, data) {
        core.catch_up(Duration::MAX);
        let _ = core.encode();
    }
    if let Ok(wiring) = WiringState::decode(WiringState::NUMBER, data) {
        let again = wiring
            .encode()
            .map(|bytes| WiringState::decode(WiringState::NUMBER, &bytes));
        assert_eq!(again.ok().and_then(Result::ok), Some(wiring));
    }
    if let Some(rings) = rings::decode(data) {
        assert_eq!(rings::encode(&rings), data);
    }
    let _ = Forecast::decode(data);
}
