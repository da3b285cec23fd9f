//! The end of a machine whose core has ended.
//!
//! Order: devices, whose images somebody may want next; then the folder, by which the next broker
//! would adopt it; then the state with its reason, for which callers wait.

use api::machine::State;
use nix::sys::signal::Signal;

use super::Supervisor;
use crate::folder::{last_line, last_words};
use crate::machine::DeviceStatus;
use crate::process::Ended;
use crate::publish::Change;

impl Supervisor {
    /// The core has ended: so does everything else.
    pub(in crate::machine) async fn end(&mut self, ended: Ended) {
        let name = self.machine.name.clone();
        self.machine.update(|inner| {
            inner.state = State::Stopping;
            inner.live = None;
        });
        for device in self
            .devices
            .iter()
            .filter_map(|device| device.process.as_ref())
        {
            device.signal(Signal::SIGTERM);
        }
        for at in 0..self.devices.len() {
            self.drop_process(at).await;
        }
        let (state, reason) = self.verdict(ended);
        if state == State::Failed {
            tracing::error!(machine = %name, reason, "a machine failed");
        }
        self.host.metrics.machine_ended(state == State::Failed);
        self.host.folder.remove_machine(&name);
        self.machine.update(|inner| {
            inner.state = state;
            inner.reason = reason;
            inner.process = None;
            inner.started_usec = 0;
            inner.devices.fill(DeviceStatus::OFF);
        });
        for device in &self.devices {
            let id = device.device.id.clone();
            self.machine
                .publisher
                .send(Change::Device(name.clone(), id));
        }
        self.machine.gone.send_replace(true);
        if self.machine.goes_with_its_end() {
            self.machine.publisher.send(Change::Ended(name));
        }
    }

    /// What became of the machine: what the core said last, or else how it ended.
    fn verdict(&self, ended: Ended) -> (State, String) {
        let name = &self.machine.name;
        let said = last_line(&self.host.folder.machine(name).join("end"));
        match said.as_deref().and_then(|line| line.split_once(' ')) {
            Some(("0", why)) => (State::Off, why.to_owned()),
            Some((_, why)) => (State::Failed, why.to_owned()),
            None => {
                let log = self.host.folder.logs(name).join("core.log");
                let line = last_words(&log).filter(|_| !matches!(ended, Ended::Signal(_)));
                let words =
                    line.map_or_else(String::new, |line| format!("; its last words: {line}"));
                (State::Failed, format!("the core failed: {ended}{words}"))
            }
        }
    }
}
