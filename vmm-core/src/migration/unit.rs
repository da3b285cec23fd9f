//! The devices of a machine, as its migration sees them, and a thread for each.
//!
//! A device of ours is told to stop or to start by one message, so one thread tells all of them before
//! it hears the first: nobody is woken to send or to wait. Whatever takes more goes to the device's
//! thread. Threads are made before the stop, so that in it nothing has to be started. What is sent to
//! one is done in order; what is sent to several is done at once.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migration::report::Recorder;
use migration::rings::Forecast;

use super::barrier::{self, Arrival, Barrier};
use super::without::{Mechanism, Without};
use super::{ANSWER_DEADLINE, BLACKOUT_DEADLINE, MigrationError};
use crate::remote::vhost_user::VhostUserDevice;
use crate::transport::VirtioPciDevice;

/// How long a device has to go on. One that takes longer is taken for gone, until its owner starts
/// it anew.
const STUCK: Duration = Duration::from_millis(500);

/// How often devices are asked what a switchover will take; the shortest time counts.
const QUESTIONS: u32 = 4;

/// A device.
pub struct Unit {
    /// Its id in the machine's definition.
    pub id: String,
    /// What the guest sees.
    pub pci: Arc<VirtioPciDevice>,
    /// Its process.
    pub remote: Arc<VhostUserDevice>,
}

impl Unit {
    /// The machine is here: what only one process may have is taken, and the device runs if the
    /// machine does. Fails only if somebody else has that: the machine must not run then. A back-end
    /// that does not work is its owner's to mend, as at any other time.
    pub fn take_up(&self, running: bool) -> Result<(), MigrationError> {
        let start = || match running {
            true => self.pci.resume().map_err(MigrationError::from),
            false => Ok(()),
        };
        let started = start().or_else(|error| {
            if error.is_declined() {
                return Err(error);
            }
            self.log(&error);
            // It is gone by now: the next one is told what it has to do.
            start()
        });
        match started.and_then(|()| Ok(self.remote.hold(true)?)) {
            Err(error) if !error.is_declined() => {
                self.log(&error);
                Ok(())
            }
            taken => taken,
        }
    }

    fn log(&self, error: &MigrationError) {
        let (device, error) = (&self.id, crate::machine::chain(error));
        tracing::error!(device, error, "it does not start; restart its process");
    }

    /// Tells the device to go on, if it can be told so now; [`Self::goes_on`] awaits it. What goes
    /// wrong in it does so again in [`Self::take_up`].
    fn is_told_to_go_on(&self) -> bool {
        !self.remote.is_leaving() && self.pci.order_resume().unwrap_or(false)
    }

    /// The device goes on that was told to; as [`Self::take_up`].
    fn goes_on(&self, within: Duration) -> Result<(), MigrationError> {
        match self.pci.resumed(within).map_err(MigrationError::from) {
            Err(error) if !error.is_declined() => {
                self.log(&error);
                self.take_up(true)
            }
            result => result,
        }
    }

    /// Hears whatever a device has still to say that was told to leave, which is not wanted any more.
    pub fn stays(&self) {
        if self.remote.is_leaving() {
            // What it did not do is seen when it goes on.
            let _ = self.pci.stop();
            let _ = self.remote.saved(BLACKOUT_DEADLINE);
        }
    }

    /// The machine goes: what only one process may have is given up.
    pub fn let_go(&self) -> Result<(), MigrationError> {
        Ok(self.remote.hold(false)?)
    }
}

type Job = Box<dyn FnOnce(&Unit) + Send>;

struct Worker {
    jobs: Sender<(Arc<Unit>, Job)>,
    thread: Option<JoinHandle<()>>,
}

/// A thread for each device.
pub struct Crew {
    names: Vec<String>,
    units: Vec<Arc<Unit>>,
    workers: Vec<Worker>,
    parallel: bool,
}

impl Crew {
    /// Starts the threads; without [`Mechanism::Parallel`] one for all devices.
    pub fn start(units: &[Arc<Unit>], without: &Without) -> io::Result<Self> {
        let start = |unit: &Arc<Unit>| {
            let (jobs, inbox) = channel::<(Arc<Unit>, Job)>();
            let thread = thread::Builder::new()
                .name(format!("move-{}", unit.id))
                .spawn(move || inbox.into_iter().for_each(|(unit, job)| job(&unit)))?;
            Ok(Worker {
                jobs,
                thread: Some(thread),
            })
        };
        let parallel = !without.has(Mechanism::Parallel);
        let threads = if parallel {
            units.len()
        } else {
            units.len().min(1)
        };
        Ok(Self {
            names: units.iter().map(|unit| unit.id.clone()).collect(),
            units: units.to_vec(),
            workers: units[..threads]
                .iter()
                .map(start)
                .collect::<io::Result<_>>()?,
            parallel,
        })
    }

    /// The devices' ids, in order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The devices, in order.
    pub fn units(&self) -> &[Arc<Unit>] {
        &self.units
    }

    /// Whether devices work at the same time.
    pub fn is_parallel(&self) -> bool {
        self.parallel
    }

    /// Lets the thread of a device do `job`.
    pub fn send(&self, number: usize, job: impl FnOnce(&Unit) + Send + 'static) {
        let (unit, worker) = (&self.units[number], number % self.workers.len());
        // A thread that is gone shows as a device that does not arrive.
        let _ = self.workers[worker]
            .jobs
            .send((Arc::clone(unit), Box::new(job)));
    }

    /// Lets each device do `work`, all at once; each arrives at what is returned.
    pub fn each<T, F>(&self, work: F) -> Receiver<Arrival<T>>
    where
        T: Send + 'static,
        F: Fn(usize, &Unit) -> Result<T, MigrationError> + Send + Sync + 'static,
    {
        let (sender, arrivals) = channel();
        let work = Arc::new(work);
        for number in 0..self.units.len() {
            let (sender, work) = (sender.clone(), Arc::clone(&work));
            self.send(number, move |unit| {
                arrive(&sender, number, Instant::now(), || work(number, unit));
            });
        }
        arrivals
    }

    /// Asks all devices at once what a switchover will take; and how long it took to ask them.
    pub fn ask(
        &self,
        recorder: &mut Recorder,
    ) -> Result<(Vec<Forecast>, Duration), MigrationError> {
        // The first answers come from processes that have slept, and others may be interrupted.
        let (mut answers, mut shortest) = (Vec::new(), Duration::MAX);
        for _ in 0..QUESTIONS {
            let begin = Instant::now();
            let asked = self.each(|_, unit| Ok(unit.remote.forecast()?));
            let within = ANSWER_DEADLINE;
            let names = &self.names;
            answers = barrier::wait(Barrier::A, "forecast", names, &asked, within, recorder)?;
            shortest = shortest.min(begin.elapsed());
        }
        Ok((answers, shortest))
    }

    /// The machine is here: [`Unit::take_up`] for each device. One of ours that goes on is only told
    /// to: all of them start while the first is heard.
    pub fn take_up(&self, running: bool, recorder: &mut Recorder) -> Result<(), MigrationError> {
        let (sender, arrivals) = channel();
        let begin = Instant::now();
        let mut told = Vec::new();
        for (number, unit) in self.units.iter().enumerate() {
            let start = Instant::now();
            if running && self.parallel && unit.is_told_to_go_on() {
                told.push((number, unit, start));
                continue;
            }
            let sender = sender.clone();
            self.send(number, move |unit| {
                unit.stays();
                arrive(&sender, number, Instant::now(), || unit.take_up(running));
            });
        }
        for (number, unit, start) in told {
            let left = STUCK.saturating_sub(begin.elapsed());
            arrive(&sender, number, start, || unit.goes_on(left));
        }
        self.meet_again("start", &arrivals, recorder)
    }

    /// Barrier F: waits until all devices have gone on. The guest waits no longer for one that is
    /// stuck than it takes to see that.
    pub fn meet_again(
        &self,
        what: &'static str,
        arrivals: &Receiver<Arrival<()>>,
        recorder: &mut Recorder,
    ) -> Result<(), MigrationError> {
        let give_up_late_ones = |waited| {
            if waited > STUCK
                && let Some(unit) = self.units.first()
            {
                unit.remote.give_up();
            }
            Ok(())
        };
        barrier::wait_while(
            give_up_late_ones,
            Barrier::F,
            what,
            &self.names,
            arrivals,
            BLACKOUT_DEADLINE,
            recorder,
        )
        .map(drop)
    }
}

/// Does `work`, which began at `start`, and says so.
pub fn arrive<T>(
    sender: &Sender<Arrival<T>>,
    unit: usize,
    start: Instant,
    work: impl FnOnce() -> Result<T, MigrationError>,
) -> bool {
    let result = work();
    let is_ok = result.is_ok();
    // Nobody waits any more only after a deadline or another's failure.
    let _ = sender.send(Arrival {
        unit,
        start,
        end: Instant::now(),
        result,
    });
    is_ok
}

/// Every wait of a job has a deadline, so the threads end.
impl Drop for Crew {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.jobs = channel().0;
        }
        for worker in &mut self.workers {
            if worker.thread.take().is_some_and(|t| t.join().is_err()) {
                tracing::error!("the thread of a device panicked in its migration");
            }
        }
    }
}
