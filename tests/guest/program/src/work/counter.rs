//! The work of counting devices: each queue has requests in flight all the time, and every answer
//! must be the next one, once, and that of its own request.

use super::devices::Account;
use super::{Step, Task, stopping, wrong};
use crate::clock;
use crate::console::report;
use crate::protocol::{Report, Workload};
use crate::virtio::counter::{Answer, Counter, CounterQueue};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

#[derive(Default)]
struct Total {
    number: u32,
    answers: AtomicU64,
    restarts: AtomicU64,
    errors: AtomicU64,
    lost: AtomicU64,
    unfinished: AtomicUsize,
}

impl Account for Total {
    fn report(&self) -> Report {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Report::Count {
            dev: self.number,
            answers: read(&self.answers),
            restarts: read(&self.restarts),
            errors: read(&self.errors),
            lost: read(&self.lost),
            end: self.unfinished.load(Ordering::Acquire) == 0,
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Hands out the work of a device.
pub fn assign(number: u32, device: Counter, workload: &Workload) -> Arc<dyn Account> {
    let total = Arc::new(Total {
        number,
        unfinished: AtomicUsize::new(device.queues.len()),
        ..Total::default()
    });
    for queue in device.queues {
        let slots = workload.depth.clamp(1, queue.slots());
        let task = Asker {
            total: total.clone(),
            waiting: alloc::vec![None; usize::from(slots)],
            pace: clock::ticks(1_000_000 / u64::from(workload.count.max(1))),
            timeout: clock::ticks(u64::from(workload.timeout) * 1000),
            next: 0,
            next_token: 0,
            next_request: 0,
            queue,
        };
        super::assign(task.queue.cpu, Box::new(task));
    }
    total
}

/// What a slot waits for.
#[derive(Clone, Copy)]
struct Waiting {
    token: u64,
    until: u64,
}

struct Asker {
    total: Arc<Total>,
    queue: CounterQueue,
    waiting: Vec<Option<Waiting>>,
    /// Ticks between two requests.
    pace: u64,
    timeout: u64,
    /// The number that comes next.
    next: u64,
    next_token: u64,
    next_request: u64,
}

impl Asker {
    fn ask(&mut self) -> bool {
        let now = clock::now();
        if stopping() || now < self.next_request {
            return false;
        }
        let Some(slot) = self.waiting.iter().position(Option::is_none) else {
            return false;
        };
        let token = self.next_token;
        self.next_token += 1;
        self.next_request = now + self.pace;
        self.waiting[slot] = Some(Waiting {
            token,
            until: now + self.timeout,
        });
        self.queue.submit(slot as u16, token);
        self.queue.kick();
        true
    }

    fn take(&mut self, answer: Answer) {
        count(&self.total.answers);
        let slot = self.waiting.get_mut(usize::from(answer.slot));
        let asked = slot.and_then(Option::take).map(|waiting| waiting.token);
        match (asked, answer.content) {
            (Some(asked), Some((token, number))) if asked == token && number == self.next => {
                self.next += 1;
            }
            // Its process is a new one.
            (Some(asked), Some((token, 0))) if asked == token => {
                count(&self.total.restarts);
                self.next = 1;
            }
            _ => {
                wrong(1);
                count(&self.total.errors);
            }
        }
    }

    /// `false` when nothing is waited for any more.
    fn give_up_late_ones(&mut self) -> bool {
        let now = clock::now();
        for waiting in &mut self.waiting {
            if waiting.is_some_and(|waiting| now >= waiting.until) {
                // What comes for it now is wrong.
                *waiting = None;
                wrong(1);
                count(&self.total.lost);
            }
        }
        self.waiting.iter().any(Option::is_some)
    }
}

impl Task for Asker {
    fn poll(&mut self) -> Step {
        let mut busy = self.ask();
        while let Some(answer) = self.queue.answer() {
            self.take(answer);
            busy = true;
        }
        if busy {
            return Step::Busy;
        }
        if !self.give_up_late_ones() && stopping() {
            if self.total.unfinished.fetch_sub(1, Ordering::AcqRel) == 1 {
                report(&self.total.report());
            }
            return Step::Finished;
        }
        Step::Idle {
            until: self.next_request.max(clock::now() + 1),
        }
    }
}
