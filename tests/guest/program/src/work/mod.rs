//! The works and how they share the CPUs.
//!
//! A work is made of [`Task`]s: small state machines that a CPU polls in turn. CPU 0 has the
//! console and the heartbeat; with more CPUs all other tasks are spread over the rest, so that the
//! heartbeat sees gaps of the machine and not of the work. Each task belongs to one CPU, and the
//! interrupts of its queues go there.
//!
//! ```text
//! set up on CPU 0 ─► tasks handed out ─► each CPU: poll, poll, … ─► all finished ─► @done
//!                                                  ▲ `stop` tells tasks without an end to finish
//! ```

mod balloon;
mod block;
mod control;
mod copy;
mod counter;
mod devices;
mod dirty;
mod exerciser;
mod net;
mod packet;
mod pattern;

use crate::apic::ApicId;
use crate::console::fail;
use crate::cpu::MAX_CPUS;
use crate::interrupts::{TIMER, Vector};
use crate::pci::Function;
use crate::protocol::{Idle, Text, Workload};
use crate::sync::SpinLock;
use crate::{apic, clock, cpu, smp};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// What a task says after a look at its affairs.
pub enum Step {
    /// It did something: look again at once.
    Busy,
    /// Nothing to do before an interrupt, or before this point in time (ticks).
    Idle { until: u64 },
    /// It has ended, and reported.
    Finished,
}

/// A piece of work that one CPU polls.
pub trait Task: Send {
    fn poll(&mut self) -> Step;
}

/// Longest sleep of an idle CPU, unless it shall be seen that an interrupt was lost: bounds what
/// one costs.
const MAX_SLEEP_US: u64 = 100_000;

static TASKS: [SpinLock<Vec<Box<dyn Task>>>; MAX_CPUS] =
    [const { SpinLock::new(Vec::new()) }; MAX_CPUS];
static GO: AtomicBool = AtomicBool::new(false);
/// The first CPU that halts when it is idle: all from it on do.
static FIRST_HALTING: AtomicUsize = AtomicUsize::new(MAX_CPUS);
/// Longest sleep after which nothing may be found, in microseconds; 0: there is none.
static NAP_US: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);
static UNFINISHED: AtomicUsize = AtomicUsize::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

/// Whether tasks without an end of their own are to finish.
pub fn stopping() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// Counts things that went wrong: the last word will not be `ok`.
pub fn wrong(count: u64) {
    WRONG.fetch_add(count, Ordering::Relaxed);
}

/// Gives a task to a CPU, before the work starts.
fn assign(cpu: usize, task: Box<dyn Task>) {
    UNFINISHED.fetch_add(1, Ordering::Relaxed);
    TASKS[cpu].lock().push(task);
}

/// Where a queue is looked after.
#[derive(Clone, Copy)]
pub struct Place {
    pub cpu: usize,
    pub vector: Vector,
}

impl Place {
    pub fn apic_id(&self) -> ApicId {
        smp::apic_id(self.cpu)
    }
}

/// Deals out CPUs and vectors in turn.
pub struct Spread {
    cpus: usize,
    next: usize,
}

impl Spread {
    fn new(cpus: usize) -> Self {
        Self { cpus, next: 0 }
    }

    /// The place of the next queue.
    pub fn next(&mut self) -> Place {
        let cpu = self.next_cpu();
        self.next_on(cpu)
    }

    /// The CPU whose turn it is.
    pub fn next_cpu(&self) -> usize {
        self.cpu(self.next)
    }

    /// A place for the next queue on a CPU that was chosen before.
    pub fn next_on(&mut self, cpu: usize) -> Place {
        let vector = Vector::of_queue(self.next);
        self.next += 1;
        Place { cpu, vector }
    }

    /// CPUs that run.
    pub fn cpus(&self) -> usize {
        self.cpus
    }

    /// How many queues have a place.
    pub fn dealt(&self) -> usize {
        self.next
    }

    /// CPUs that work: all but the first, unless it is alone.
    fn workers(&self) -> usize {
        (self.cpus - 1).max(1)
    }

    fn cpu(&self, n: usize) -> usize {
        if self.cpus == 1 {
            0
        } else {
            1 + n % self.workers()
        }
    }
}

/// Sets everything up and runs it; CPU 0 only.
pub fn run(workload: Workload, functions: Vec<Function>, low_ram_end: u64, cpus: usize) -> ! {
    let mut spread = Spread::new(cpus);
    FIRST_HALTING.store(first_halting(workload.idle), Ordering::Relaxed);
    NAP_US.store(u64::from(workload.nap) * 1000, Ordering::Relaxed);
    let mut progress = devices::set_up(&workload, &functions, low_ram_end, &mut spread);
    dirty::set_up(&workload, &spread, &mut progress);
    TASKS[0]
        .lock()
        .push(Box::new(control::Control::new(&workload, progress)));
    clock::forget_gaps();
    GO.store(true, Ordering::Release);
    for cpu in 1..cpus {
        apic::send_interrupt(smp::apic_id(cpu), TIMER);
    }
    run_on_this_cpu()
}

fn first_halting(idle: Idle) -> usize {
    match idle {
        Idle::Poll => MAX_CPUS,
        Idle::Halt => 0,
        Idle::Mixed => 1,
    }
}

/// Waits for the work to start, then polls this CPU's tasks for ever.
pub fn run_on_this_cpu() -> ! {
    // A CPU that waits must not spin: there may be far fewer cores than CPUs.
    while !GO.load(Ordering::Acquire) {
        cpu::halt();
    }
    let mut tasks = core::mem::take(&mut *TASKS[cpu::index()].lock());
    let halting = cpu::index() >= FIRST_HALTING.load(Ordering::Relaxed);
    if halting {
        cpu::enable_interrupts();
    }
    while !tasks.is_empty() {
        clock::observe();
        if poll_all(&mut tasks).is_some() {
            if halting {
                sleep(&mut tasks);
            } else {
                core::hint::spin_loop();
            }
        }
    }
    cpu::stop()
}

/// Polls every task. `None` if one of them did something, else the time of the next thing to do.
fn poll_all(tasks: &mut Vec<Box<dyn Task>>) -> Option<u64> {
    let mut until = Some(u64::MAX);
    tasks.retain_mut(|task| match task.poll() {
        Step::Busy => {
            until = None;
            true
        }
        Step::Idle { until: at } => {
            until = until.map(|until| until.min(at));
            true
        }
        Step::Finished => {
            UNFINISHED.fetch_sub(1, Ordering::AcqRel);
            until = None;
            false
        }
    });
    until
}

/// Whether an idle CPU sleeps so long that a lost interrupt is seen.
fn naps() -> bool {
    NAP_US.load(Ordering::Relaxed) > 0
}

/// Halts until an interrupt or until a task has something to do. With interrupts off the tasks
/// are polled once more, so that what came just now is not slept over.
fn sleep(tasks: &mut Vec<Box<dyn Task>>) {
    cpu::disable_interrupts();
    if let Some(until) = poll_all(tasks) {
        let now = clock::observe();
        let nap = NAP_US.load(Ordering::Relaxed);
        let end = now + clock::ticks(if nap == 0 { MAX_SLEEP_US } else { nap });
        let until = until.clamp(now, end);
        if until > now {
            apic::timer_after_us(clock::us(until - now).max(1));
            cpu::halt();
            let woken = clock::observe_wake(until);
            let slept_out = nap > 0 && until == end && woken >= end;
            if slept_out && poll_all(tasks).is_none() {
                fail(
                    "missed-interrupt",
                    cpu::index() as u64,
                    nap,
                    Text::new("us"),
                );
            }
        }
    }
    cpu::enable_interrupts();
}
