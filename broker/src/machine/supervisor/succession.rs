//! Another generation of processes takes the place of the present one, when the machine moves within
//! its host.
//!
//! Order: the former generation ends, as systemd and the folder know only one of each name; then the
//! folder is the new one's; then that is shown, watched and written down. The guest runs in it all
//! the while.

use std::sync::Arc;

use nix::sys::signal::Signal;
use tokio::sync::mpsc::channel;
use tokio::sync::oneshot;

use super::{Command, DEVICE_DEADLINE, Supervisor};
use crate::machine::instance::Instance;

impl Supervisor {
    /// The generation to which a machine goes whose core has ended, if it goes within this host.
    pub(super) async fn successor(&mut self) -> Option<(Box<Instance>, oneshot::Sender<()>)> {
        let mut leaving = self.machine.leaving.subscribe();
        loop {
            tokio::select! {
                biased;
                Some(command) = self.commands.recv() => {
                    // Nothing else can be done with it now.
                    if let Command::Succeed { instance, answer } = command {
                        return Some((instance, answer));
                    }
                }
                // The sender lives as long as the machine.
                _ = leaving.wait_for(|leaving| !*leaving) => return None,
            }
        }
    }

    /// Another generation of processes has the machine.
    pub(super) async fn succeed(&mut self, mut instance: Instance) {
        for task in self.waiting.drain(..) {
            task.abort();
        }
        // What the former generation has still said is of no interest.
        (self.tell, self.events) = channel(64);
        let former = self
            .devices
            .iter()
            .filter_map(|device| device.process.as_ref());
        for process in former.chain([&self.core]) {
            process.signal(Signal::SIGTERM);
        }
        for at in 0..self.devices.len() {
            self.drop_process(at).await;
        }
        if tokio::time::timeout(DEVICE_DEADLINE, self.core.ended())
            .await
            .is_err()
        {
            self.core.signal(Signal::SIGKILL);
        }
        let name = self.machine.name.clone();
        self.host.folder.settle(&mut instance.place, &name);
        for (device, former) in instance.devices.iter_mut().zip(&self.devices) {
            device.reconnects = former.reconnects;
            device.shares_image = false;
        }
        if let Ok(live) = self.machine.live("moved") {
            self.machine.install(&mut instance, live.commands);
        }
        self.core = Arc::clone(&instance.core);
        self.devices = instance.devices;
        self.watch(&instance.proxy);
        // Changes are told; what it is now is not.
        if let Ok(state) = instance.proxy.state().await {
            self.machine.set_running_state(state);
        }
        self.save();
    }
}
