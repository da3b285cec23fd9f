//! What the cases need to know of a device.

use anyhow::Result;
use test_framework::frontend::{DeviceSpec, Machine, MachineOptions};

/// A device under test, with whatever it stands on.
pub(crate) trait Subject: Sized {
    /// Its program.
    const PROGRAM: &'static str;
    /// Its kind in saved state.
    const KIND: &'static str;
    /// Its type in vhost-user.json.
    const TYPE: &'static str;
    /// Feature bits of its own that it always offers.
    const FEATURES: u64;
    /// Queues that the cases use.
    const QUEUES: usize;

    /// Makes what the device stands on, such as an image.
    fn new() -> Result<Self>;

    /// How its process is started.
    fn spec(&self) -> DeviceSpec;

    /// How its twin is started, while the first one still runs.
    fn twin_spec(&self) -> DeviceSpec;

    /// Moves data through every queue, waits for it, and verifies it.
    fn exchange(&mut self, machine: &mut Machine) -> Result<()>;

    /// Makes requests available on every queue and kicks, and waits for nothing.
    fn load(&mut self, machine: &mut Machine) -> Result<()>;

    /// Waits for every request in flight, each answered once, and verifies them.
    fn settle(&mut self, machine: &mut Machine) -> Result<()>;

    /// Moves data into guest memory at each queue; returns the pages that the device must have
    /// written, besides its used rings.
    fn write_to_guest(&mut self, machine: &mut Machine) -> Result<Vec<u64>>;

    /// Changes what travels as state, as a driver can.
    fn change_state(&mut self, machine: &mut Machine) -> Result<()>;

    /// Verifies that the state is the changed one.
    fn verify_state(&mut self, machine: &mut Machine) -> Result<()>;
}

/// Options of a machine with this device.
pub(crate) fn options<S: Subject>(subject: &S) -> MachineOptions {
    MachineOptions {
        device: subject.spec(),
        features: S::FEATURES,
        queues: S::QUEUES,
        queue_size: 64,
        event_idx: true,
        inflight: true,
    }
}

/// A subject and a machine that runs.
pub(crate) fn running<S: Subject>() -> Result<(S, Machine)> {
    let subject = S::new()?;
    let machine = Machine::start(options(&subject))?;
    Ok((subject, machine))
}
