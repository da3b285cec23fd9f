//! All vCPUs of a machine, told and waited for together.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::kick::{Kick, install};
use super::throttle::{Kicks, Throttle};
use super::{Vcpu, VcpuBuses, VcpuError, VcpuEvents};
use crate::hypervisor::HypervisorError;

type Job = Box<dyn FnOnce(&mut Vcpu) + Send>;

enum Command {
    Run,
    Do(Job),
}

struct Handle {
    id: u32,
    commands: Sender<Command>,
    kick: Arc<Kick>,
    thread: Option<JoinHandle<()>>,
}

/// The vCPUs of a machine. All are paused at first.
pub struct VcpuSet {
    vcpus: Vec<Handle>,
    /// A vCPU sends its number when it is out of the guest.
    out: Receiver<u32>,
    running: Vec<u32>,
    kicks: Kicks,
}

impl VcpuSet {
    /// Starts a thread for each vCPU.
    pub fn start(
        vcpus: Vec<Vcpu>,
        buses: &VcpuBuses,
        events: &Arc<dyn VcpuEvents>,
    ) -> Result<Self, VcpuError> {
        let failed = |vcpu| move |source| VcpuError::Thread { vcpu, source };
        install().map_err(|errno| failed(0)(errno.into()))?;
        let (out_sender, out) = channel();
        let mut set = Self {
            vcpus: Vec::with_capacity(vcpus.len()),
            out,
            running: Vec::new(),
            kicks: Kicks::default(),
        };
        for mut vcpu in vcpus {
            let id = vcpu.id();
            let (commands, inbox) = channel();
            let (kick_sender, kick_receiver) = channel();
            let (buses, events, out) = (buses.clone(), Arc::clone(events), out_sender.clone());
            let thread = thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || {
                    let kick = Arc::new(Kick::for_this_thread(&mut vcpu.fd));
                    if kick_sender.send(Arc::clone(&kick)).is_ok() {
                        serve(&mut vcpu, &kick, &inbox, &buses, &*events, &out);
                    }
                })
                .map_err(failed(id))?;
            let gone = |_| failed(id)(std::io::Error::other("the thread ended at once"));
            let kick = kick_receiver.recv().map_err(gone)?;
            set.kicks.lock().push(Arc::clone(&kick));
            set.vcpus.push(Handle {
                id,
                commands,
                kick,
                thread: Some(thread),
            });
        }
        Ok(set)
    }

    /// What slows these vCPUs down.
    pub fn throttle(&self) -> Throttle {
        Throttle::new(self.kicks.clone())
    }

    /// Lets every vCPU run.
    pub fn run(&mut self) {
        for vcpu in &self.vcpus {
            if self.running.contains(&vcpu.id) {
                continue;
            }
            vcpu.kick.forget();
            if vcpu.commands.send(Command::Run).is_ok() {
                self.running.push(vcpu.id);
            }
        }
    }

    /// Kicks all vCPUs at once and waits until the last is out of the guest.
    pub fn pause(&mut self, deadline: Duration) -> Result<(), VcpuError> {
        for vcpu in self
            .vcpus
            .iter()
            .filter(|vcpu| self.running.contains(&vcpu.id))
        {
            vcpu.kick.kick();
        }
        let end = Instant::now() + deadline;
        while !self.running.is_empty() {
            match self
                .out
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(id) => self.running.retain(|running| *running != id),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let vcpus = self.running.clone();
                    return Err(VcpuError::Deadline {
                        vcpus,
                        what: "leave the guest",
                        deadline,
                    });
                }
            }
        }
        Ok(())
    }

    /// Does `job` with every vCPU, on their own threads at the same time. All must be paused.
    pub fn each<T, F>(&self, deadline: Duration, job: F) -> Result<Vec<T>, VcpuError>
    where
        T: Send + 'static,
        F: Fn(&mut Vcpu) -> Result<T, HypervisorError> + Send + Sync + 'static,
    {
        let job = Arc::new(job);
        let (sender, results) = channel();
        for vcpu in &self.vcpus {
            let (job, sender) = (Arc::clone(&job), sender.clone());
            let job: Job = Box::new(move |vcpu| {
                // The receiver only goes when the deadline has passed.
                let _ = sender.send((vcpu.id(), job(vcpu)));
            });
            // A thread that is gone shows as one that does not answer.
            let _ = vcpu.commands.send(Command::Do(job));
        }
        let end = Instant::now() + deadline;
        let mut done: Vec<(u32, T)> = Vec::with_capacity(self.vcpus.len());
        while done.len() < self.vcpus.len() {
            match results.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok((vcpu, Ok(value))) => done.push((vcpu, value)),
                Ok((vcpu, Err(source))) => return Err(VcpuError::Hypervisor { vcpu, source }),
                Err(_) => {
                    let late = |vcpu: &&Handle| done.iter().all(|(id, _)| *id != vcpu.id);
                    let vcpus = self.vcpus.iter().filter(late).map(|vcpu| vcpu.id).collect();
                    return Err(VcpuError::Deadline {
                        vcpus,
                        what: "answer",
                        deadline,
                    });
                }
            }
        }
        done.sort_by_key(|(id, _)| *id);
        Ok(done.into_iter().map(|(_, value)| value).collect())
    }
}

/// The thread of one vCPU, until the set lets go of it.
fn serve(
    vcpu: &mut Vcpu,
    kick: &Kick,
    inbox: &Receiver<Command>,
    buses: &VcpuBuses,
    events: &dyn VcpuEvents,
    out: &Sender<u32>,
) {
    while let Ok(command) = inbox.recv() {
        match command {
            Command::Do(job) => job(vcpu),
            Command::Run => {
                if let Some(ended) = vcpu.run(kick, buses) {
                    events.ended(vcpu.id(), ended);
                }
                // Nobody listens any more only when the machine is over.
                let _ = out.send(vcpu.id());
            }
        }
    }
}

/// Ends every thread; each leaves the guest first.
impl Drop for VcpuSet {
    fn drop(&mut self) {
        // Nobody else kicks from here on.
        self.kicks.lock().clear();
        for vcpu in &mut self.vcpus {
            // The thread, and with it what the kick touches, lives until its inbox closes.
            vcpu.kick.kick();
            vcpu.commands = channel().0;
        }
        for vcpu in &mut self.vcpus {
            if vcpu
                .thread
                .take()
                .is_some_and(|thread| thread.join().is_err())
            {
                tracing::error!(vcpu = vcpu.id, "the vCPU's thread panicked");
            }
        }
    }
}
