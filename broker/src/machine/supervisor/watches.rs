//! What the supervisor waits for: each wait is a task of its own, which ends with the supervisor or
//! with the generation of processes that it is of.

use std::sync::Arc;
use std::time::Duration;

use api::core::CoreProxy;
use tokio::sync::mpsc::Sender;

use super::Supervisor;
use crate::definition::DeviceKind;
use crate::machine::foreign;
use crate::process::Ended;

/// Something that it hears.
#[derive(Debug)]
pub(super) enum Event {
    CoreEnded(Ended),
    DeviceEnded {
        at: usize,
        generation: u64,
        ended: Ended,
    },
    /// It is time to start a device again.
    Due {
        at: usize,
        generation: u64,
    },
    CoreState(api::core::State),
    /// A back-end that is not ours is lost, or has come back.
    Foreign {
        at: usize,
        connected: bool,
    },
}

impl Supervisor {
    /// Watches all processes, and what the core says of itself.
    pub(in crate::machine) fn watch(&mut self, core: &CoreProxy<'static>) {
        let (process, tell) = (Arc::clone(&self.core), self.tell.clone());
        self.wait(async move {
            let ended = process.ended().await;
            // A supervisor that is gone needs to know nothing.
            let _ = tell.send(Event::CoreEnded(ended)).await;
        });
        for at in 0..self.devices.len() {
            self.watch_device(at);
            self.watch_foreign(at, core);
            self.watch_balloon(at, core);
        }
        let (core, tell) = (core.clone(), self.tell.clone());
        self.wait(async move {
            let _ = follow(core, tell).await;
        });
    }

    fn watch_balloon(&mut self, at: usize, core: &CoreProxy<'static>) {
        if let DeviceKind::Balloon(_) = self.devices[at].device.kind {
            let (core, machine) = (core.clone(), Arc::clone(&self.machine));
            self.wait(async move {
                // It ends with the core, whose end somebody else sees.
                let _ = machine.follow_balloon(at, core).await;
            });
        }
    }

    fn watch_foreign(&mut self, at: usize, core: &CoreProxy<'static>) {
        let device = self.devices[at].device.clone();
        let Some(socket) = device.foreign_socket().map(str::to_owned) else {
            return;
        };
        let (core, tell) = (core.clone(), self.tell.clone());
        self.wait(async move {
            let tell = |connected| {
                let tell = tell.clone();
                async move {
                    let _ = tell.send(Event::Foreign { at, connected }).await;
                }
            };
            // It ends with the core, whose end somebody else sees.
            let _ = foreign::keep(&core, &device.id, &socket, tell).await;
        });
    }

    pub(super) fn wait(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.waiting.retain(|task| !task.is_finished());
        self.waiting.push(tokio::spawn(work).abort_handle());
    }

    pub(super) fn watch_device(&mut self, at: usize) {
        let device = &self.devices[at];
        let Some(process) = device.process.clone() else {
            if device.is_ours() {
                // It ended while nobody watched.
                self.due(at, Duration::ZERO);
            }
            return;
        };
        let (generation, tell) = (device.generation, self.tell.clone());
        self.wait(async move {
            let ended = process.ended().await;
            let event = Event::DeviceEnded {
                at,
                generation,
                ended,
            };
            let _ = tell.send(event).await;
        });
    }

    pub(super) fn due(&mut self, at: usize, after: Duration) {
        let (generation, tell) = (self.devices[at].generation, self.tell.clone());
        self.wait(async move {
            tokio::time::sleep(after).await;
            let _ = tell.send(Event::Due { at, generation }).await;
        });
    }
}

/// Tells each change of the core's state.
async fn follow(core: CoreProxy<'static>, tell: Sender<Event>) -> zbus::Result<()> {
    let cached = CoreProxy::new(core.inner().connection()).await?;
    let mut changes = cached.receive_state_changed().await;
    while let Some(change) = api::next(&mut changes).await {
        if tell
            .send(Event::CoreState(change.get().await?))
            .await
            .is_err()
        {
            break;
        }
    }
    Ok(())
}
