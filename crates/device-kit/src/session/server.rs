//! A vhost-user device as a program's server: made, started, and seen over the control link.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::balloon1::BalloonProcess;
use api::device1::{DeviceProcess, Identity, Prefault, Status};
use migration::schema::Schema;

use super::{ConfigChange, Services, serve};
use crate::device::{Assignment, Capabilities, Device, HostError, Kit, MAX_QUEUE_SIZE, MAX_QUEUES};
use crate::memory::{PrefaultMode, Prefaulter};
use crate::metrics::Metrics;
use crate::options::VhostUserOptions;
use crate::program::run_server;
use crate::queue::QueueIndex;
use crate::queue_thread::{QueueThread, Rings};
use crate::queue_threads::QueueThreads;
use crate::server::{Lent, OpenError, ServeResult, Server};

/// A predecessor of this process that was killed may still have what only one process may have.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(5);

/// The whole of a vhost-user device program's `main`.
pub fn run<D: Device>() -> ExitCode {
    run_server::<Services<D>>()
}

impl<D: Device> Server for Services<D> {
    type Options = VhostUserOptions<D::Options>;

    const CAPABILITIES: Capabilities = D::CAPABILITIES;
    const IOCTLS: &'static [u32] = D::IOCTLS;
    const KIND: &'static str = <D::SavedState as Schema>::KIND;

    fn open(options: Self::Options, lent: Lent<'_>) -> Result<Self, OpenError> {
        let Lent {
            registry,
            health,
            unit,
            ending,
        } = lent;
        let config_change = ConfigChange::default();
        let metrics = Metrics::register(registry);
        let device = D::open(
            options.device,
            &mut Kit {
                registry: registry.sub_registry_with_prefix(Self::KIND),
                config_change: config_change.clone(),
                health: health.clone(),
            },
        )?;
        check_queues(&device)?;
        if !options.incoming {
            device.acquire(PREDECESSOR_PATIENCE)?;
        }
        let workers = device.workers()?;
        let thread_of = threads_of_queues(&device, &workers)?;
        let mut threads: Vec<Arc<dyn Rings>> = Vec::new();
        for Assignment { worker, queues } in workers {
            let thread = QueueThread::new(worker, &queues, ending.clone(), health.clone())?;
            threads.push(thread);
        }
        Ok(Services {
            device: Arc::new(device),
            held: Mutex::new(!options.incoming),
            queues: QueueThreads::new(threads, thread_of),
            unit,
            prefault: Prefaulter::new(options.prefault, health.clone()),
            metrics,
            config_change,
            health,
        })
    }

    fn start(self: &Arc<Self>) -> Result<(), HostError> {
        self.queues.spawn()
    }

    fn serve(self: &Arc<Self>, stream: UnixStream) -> ServeResult {
        serve(stream, self)
    }

    fn balloon(&self) -> Option<Arc<dyn BalloonProcess>> {
        self.device.balloon()
    }
}

impl<D: Device> DeviceProcess for Services<D> {
    fn identity(&self) -> Identity {
        Identity {
            kind: <Self as Server>::KIND.to_owned(),
            unit: self.unit.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn status(&self) -> Status {
        let standing = self.health.standing();
        let prefault = self.prefault.progress();
        Status {
            state: standing.state.to_string(),
            connected: standing.connected,
            last_error: standing.last_error,
            mapped: prefault.mapped,
            prefaulted: prefault.done,
            prefaulting: prefault.running,
        }
    }

    fn statistics(&self) -> BTreeMap<String, u64> {
        let own = self.metrics.totals(self.device.queue_count());
        let errors = ("errors", self.health.standing().errors);
        own.into_iter()
            .chain([errors])
            .chain(self.device.statistics())
            .map(|(name, count)| (name.to_owned(), count))
            .collect()
    }

    fn prefault(&self, mode: Prefault) -> Result<(), api::Error> {
        self.prefault.set_mode(match mode {
            Prefault::Off => PrefaultMode::Off,
            Prefault::Data => PrefaultMode::Data,
            Prefault::All => PrefaultMode::All,
        });
        Ok(())
    }

    fn cancel_prefault(&self) {
        self.prefault.cancel();
    }
}

fn check_queues<D: Device>(device: &D) -> Result<(), OpenError> {
    let (count, size) = (device.queue_count(), device.max_queue_size());
    if count == 0 || count > MAX_QUEUES {
        return Err(OpenError::Device(format!(
            "{count} queues, possible are 1 to {MAX_QUEUES}"
        )));
    }
    if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
        return Err(OpenError::Device(format!(
            "queue size {size} is no power of two up to {MAX_QUEUE_SIZE}"
        )));
    }
    Ok(())
}

/// For each queue the number of its worker; each queue has exactly one.
fn threads_of_queues<D: Device>(
    device: &D,
    workers: &[Assignment<D::Worker>],
) -> Result<Vec<usize>, OpenError> {
    let assigned: Vec<(QueueIndex, usize)> = workers
        .iter()
        .enumerate()
        .flat_map(|(at, worker)| worker.queues.iter().map(move |queue| (*queue, at)))
        .collect();
    let distinct: BTreeSet<u16> = assigned.iter().map(|(queue, _)| queue.get()).collect();
    let all: BTreeSet<u16> = (0..device.queue_count()).collect();
    if distinct != all || assigned.len() != all.len() {
        return Err(OpenError::Device(
            "every queue must have one worker".to_owned(),
        ));
    }
    let mut thread_of = vec![0; all.len()];
    for (queue, worker) in assigned {
        thread_of[usize::from(queue.get())] = worker;
    }
    Ok(thread_of)
}
