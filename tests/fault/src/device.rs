//! The counting device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use device_kit::{
    Announcer, Assignment, BalloonProcess, BulkState, Capabilities, Chain, ConfigError,
    ConfigWriter, Device, Forecast, HostError, Interest, Keepsake, Kit, OptionError, Progress,
    Queue, QueueError, QueueFault, QueueIndex, Queues, Source, StateError, Worker, WorkerError,
};
use migration::state::DeviceState;

use crate::ballast::Ballast;
use crate::config::{Config, Options};
use crate::saved_state::SavedState;
use crate::script::{Point, Script};

/// Most bytes of an answer; the rest of the buffer stays as it is.
const MAX_ANSWER: usize = 64 << 10;
/// Entries of a ring.
const QUEUE_SIZE: u16 = 256;

/// What the device and its queue threads share.
#[derive(Debug)]
struct Shared {
    script: Script,
    /// By queue: the number of its next request.
    next: Vec<AtomicU64>,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Counter {
    shared: Arc<Shared>,
    queues: u16,
    ballast: Ballast,
}

impl Counter {
    /// There is nothing that only one process may have but what the script says.
    fn exclusive(&self, point: Point) -> Result<(), OptionError> {
        let script = &self.shared.script;
        script.at(point).map_err(|StateError(problem)| OptionError {
            option: "--script",
            value: format!("{point:?}"),
            problem,
        })
    }

    fn set(&self, next: impl IntoIterator<Item = u64>) {
        for (counter, next) in self.shared.next.iter().zip(next) {
            counter.store(next, Ordering::Release);
        }
    }
}

impl Device for Counter {
    type Options = Options;
    type Worker = CounterQueue;
    type SavedState = SavedState;

    const CAPABILITIES: Capabilities = Capabilities {
        device_type: "fault",
        features: &[],
        program: "godwit-fault",
        about: "A vhost-user back-end that counts requests, and fails when it is asked to",
    };
    const IOCTLS: &'static [u32] = &[];

    fn open(options: Options, _kit: &mut Kit<'_>) -> Result<Self, OptionError> {
        let config = Config::open(options)?;
        Ok(Counter {
            shared: Arc::new(Shared {
                script: config.script,
                next: (0..config.queues).map(|_| AtomicU64::new(0)).collect(),
            }),
            queues: config.queues,
            ballast: Ballast::new(config.state_bytes),
        })
    }

    fn workers(&self) -> Result<Vec<Assignment<CounterQueue>>, HostError> {
        let assignment = |queue| Assignment {
            worker: CounterQueue::new(Arc::clone(&self.shared)),
            queues: vec![QueueIndex::new(queue)],
        };
        Ok((0..self.queues).map(assignment).collect())
    }

    fn queue_count(&self) -> u16 {
        self.queues
    }

    fn max_queue_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        0
    }

    fn accept_features(&self, _features: u64) {}

    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(
        &self,
        offset: u32,
        data: &[u8],
        _writer: ConfigWriter,
    ) -> Result<(), ConfigError> {
        Err(ConfigError {
            offset,
            len: data.len(),
            reason: "there is none",
        })
    }

    fn acquire(&self, _patience: Duration) -> Result<(), OptionError> {
        self.exclusive(Point::Acquire)
    }

    fn release(&self) -> Result<(), OptionError> {
        self.exclusive(Point::Release)
    }

    fn transition(&self, from: DeviceState, to: DeviceState) -> Result<(), StateError> {
        let script = &self.shared.script;
        if !from.runs() && to.runs() {
            script.at(Point::Start)?;
        }
        if to == DeviceState::PreCopy {
            script.at(Point::Prepare)?;
        }
        if from.runs() && !to.runs() {
            script.at(Point::Stop)?;
        }
        Ok(())
    }

    fn forecast(&self) -> Forecast {
        let script = &self.shared.script;
        Forecast {
            bytes: self.ballast.bytes(),
            stop: script.time(Point::Stop) + script.time(Point::Save),
            start: script.time(Point::Load) + script.time(Point::Start),
        }
    }

    fn save(&self) -> Result<SavedState, StateError> {
        self.shared.script.at(Point::Save)?;
        let next = self.shared.next.iter();
        Ok(SavedState {
            next: next.map(|next| next.load(Ordering::Acquire)).collect(),
            ballast: self.ballast.bytes(),
        })
    }

    fn load(&self, state: SavedState) -> Result<(), StateError> {
        state.check(self.queues, self.ballast.loaded())?;
        self.shared.script.at(Point::Load)?;
        self.set(state.next);
        Ok(())
    }

    fn bulk(&self) -> Option<&dyn BulkState> {
        Some(&self.ballast)
    }

    fn reset(&self) {
        self.set(std::iter::repeat(0));
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    fn announcer(&self) -> Option<&dyn Announcer> {
        None
    }

    fn keepsake(&self) -> Option<&dyn Keepsake> {
        None
    }

    fn balloon(&self) -> Option<Arc<dyn BalloonProcess>> {
        None
    }
}

/// Serves one queue.
#[derive(Debug)]
pub(crate) struct CounterQueue {
    shared: Arc<Shared>,
    /// Requests that were taken and are not answered yet.
    taken: Vec<Chain>,
    spare: Vec<Chain>,
    content: Vec<u8>,
}

impl CounterQueue {
    fn new(shared: Arc<Shared>) -> Self {
        CounterQueue {
            shared,
            taken: Vec::new(),
            spare: Vec::new(),
            content: Vec::new(),
        }
    }

    /// Takes every request that there is.
    fn take(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        loop {
            let mut chain = self.spare.pop().unwrap_or_default();
            match queue.pop(&mut chain) {
                Ok(true) => self.taken.push(chain),
                other => {
                    self.spare.push(chain);
                    return other.map(drop);
                }
            }
        }
    }

    /// Answers a request with its token and its number; the bytes written.
    fn answer(&mut self, chain: &Chain, queue: &Queue) -> Result<usize, QueueFault> {
        let index = queue.index().get();
        let next = &self.shared.next[usize::from(index)];
        let number = next.load(Ordering::Acquire);
        let mut token = [0; 8];
        let given = chain.readable_len().min(token.len());
        chain.read(0, &mut token[..given])?;
        let word = (u64::from(index) << 48 | number).to_le_bytes();
        let len = chain.writable_len().min(MAX_ANSWER);
        self.content.clear();
        self.content
            .extend([token, word].as_flattened().iter().cycle().take(len));
        chain.write(0, &self.content)?;
        next.store(number + 1, Ordering::Release);
        queue.metrics().bytes_from_guest.inc_by(given as u64);
        queue.metrics().bytes_to_guest.inc_by(len as u64);
        Ok(len)
    }
}

impl Worker for CounterQueue {
    fn start(&mut self) -> Result<(), HostError> {
        Ok(())
    }

    fn wait_for(&self, _interest: &mut Interest<'_>) {}

    fn ready(&mut self, _source: Source, _queues: &mut Queues<'_>) -> Result<(), WorkerError> {
        Ok(())
    }

    fn process(&mut self, queue: &mut Queue) -> Result<Progress, WorkerError> {
        let mut outcome = self.take(queue);
        for mut chain in std::mem::take(&mut self.taken) {
            self.shared.script.at(Point::Serve).map_err(|error| {
                HostError::new("a request was not served", std::io::Error::other(error))
            })?;
            match self.answer(&chain, queue) {
                // At most `MAX_ANSWER`.
                Ok(len) => queue.complete(&mut chain, u32::try_from(len).unwrap_or(0))?,
                Err(fault) => {
                    queue.abandon(&mut chain);
                    outcome = outcome.and(Err(queue.error(fault)));
                }
            }
            self.spare.push(chain);
        }
        outcome?;
        Ok(Progress::Emptied)
    }
}
