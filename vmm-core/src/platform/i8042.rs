//! The keyboard controller, of which there is only the line that resets the machine.
//!
//! Nothing is ever in its buffers, so drivers never wait to write, and one that expects
//! an answer gives up by its own time-out; the FADT says that there is no controller, so
//! that Linux does not try. Port 0x61 is not the controller's but lies among its ports:
//! where the hypervisor does not answer it with its timer, it reads as "timer 2 has run
//! out", on which Linux would wait for ever otherwise.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::machine::request::{Request, RequestSink};

/// Offset of the status and command port, 0x64.
const COMMAND: u64 = 4;
/// Offset of system control port B, 0x61.
const PORT_B: u64 = 1;
/// Output of timer 2.
const TIMER_2_OUTPUT: u8 = 1 << 5;
/// Pulses the reset line.
const RESET: u8 = 0xfe;

/// A controller without state: there is nothing to save.
pub struct I8042 {
    requests: Arc<dyn RequestSink>,
}

impl I8042 {
    /// A controller that asks `requests` for the reset.
    pub fn new(requests: Arc<dyn RequestSink>) -> Self {
        Self { requests }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = if at == PORT_B { TIMER_2_OUTPUT } else { 0 };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if (offset..)
            .zip(data)
            .any(|(at, &b)| at == COMMAND && b == RESET)
        {
            self.requests.request(Request::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::Requests;

    #[test]
    fn only_the_reset_command_resets() {
        let requests = Arc::new(Requests::default());
        let i8042 = I8042::new(requests.clone());
        i8042.write(4, &[0xaa]);
        i8042.write(0, &[0xfe]);
        i8042.write(1, &[0xfe]);
        assert_eq!(requests.taken(), []);
        i8042.write(4, &[0xfe]);
        assert_eq!(requests.taken(), [Request::Reset]);
    }

    #[test]
    fn nothing_waits_and_nothing_is_there() {
        let i8042 = I8042::new(Arc::new(Requests::default()));
        let mut data = [0xff; 5];
        i8042.read(0, &mut data);
        assert_eq!(data, [0, 0x20, 0, 0, 0]);
    }
}
