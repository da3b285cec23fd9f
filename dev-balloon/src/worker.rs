//! Serves all queues, on one thread.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use device_kit::memory::Memory;
use device_kit::{
    Chain, HostError, Interest, Progress, Queue, QueueFault, Queues, Source, Worker, WorkerError,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::config::{PAGE, Role, feature};
use crate::hinting::Hint;
use crate::request;
use crate::shared::Shared;
use crate::statistics;

/// The one descriptor that is waited for: the timer of the statistics.
const TIMER: Source = Source(0);

/// The worker.
#[derive(Debug)]
pub(crate) struct BalloonWorker {
    shared: Arc<Shared>,
    /// Statistics are to be asked for.
    wants_statistics: bool,
    /// The report that the statistics queue holds was read.
    has_statistics: bool,
    chain: Chain,
    /// Requests of this turn that are to be answered.
    served: Vec<(u16, u32)>,
    numbers: Vec<u32>,
    /// That the host does not take memory back was said.
    has_complained: bool,
}

impl BalloonWorker {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            wants_statistics: false,
            has_statistics: false,
            chain: Chain::default(),
            served: Vec::new(),
            numbers: Vec::new(),
            has_complained: false,
        }
    }

    /// Carries out all requests that there are; their heads are then in `served`.
    fn serve_all(&mut self, role: Option<Role>, queue: &mut Queue) -> Result<(), WorkerError> {
        while queue.pop(&mut self.chain)? {
            let served = match role {
                Some(role) => self.serve(role, queue),
                None => Err(QueueFault::Request {
                    head: self.chain.head(),
                    reason: "this queue is for nothing with the features in force",
                }),
            };
            if let Err(fault) = served {
                queue.abandon(&mut self.chain);
                return Err(queue.error(fault).into());
            }
            self.served.push((self.chain.head(), 0));
        }
        Ok(())
    }

    /// Carries out the request in `chain`.
    fn serve(&mut self, role: Role, queue: &Queue) -> Result<(), QueueFault> {
        match role {
            Role::Inflate => self.inflate(queue),
            Role::Deflate => self.deflate(queue),
            Role::Hints => self.hint(),
            Role::Reports => {
                self.report(queue);
                Ok(())
            }
            // Handled by `exchange_statistics`.
            Role::Statistics => Ok(()),
        }
    }

    fn inflate(&mut self, queue: &Queue) -> Result<(), QueueFault> {
        let memory = queue.memory();
        let runs = self.existing(memory)?;
        let mut ready = Vec::new();
        let mut state = self.shared.state();
        for (first, pages) in &runs {
            state.ballooned.insert_run(*first, *pages);
        }
        // Where the host's pages are larger, the last of their parts gives back the whole.
        for (first, pages) in &runs {
            let (mut page, end) = (*first, first + pages);
            while page < end {
                let Some((start, size)) = memory.page_around(GuestAddress(page * PAGE)) else {
                    break;
                };
                if size == PAGE {
                    ready.push((page * PAGE, (end - page) * PAGE));
                    break;
                }
                if state.ballooned.has_all(start.0 / PAGE, size / PAGE) {
                    ready.push((start.0, size));
                }
                page = (start.0 + size) / PAGE;
            }
        }
        let held = state.ballooned.count();
        drop(state);
        self.shared.metrics.set_held(held);
        for (start, len) in ready {
            self.give_back(memory, start, len);
        }
        let pages = runs.iter().map(|(_, pages)| pages).sum();
        self.shared.metrics.inflated.inc_by(pages);
        queue.metrics().bytes_from_guest.inc_by(pages * PAGE);
        Ok(())
    }

    fn deflate(&mut self, queue: &Queue) -> Result<(), QueueFault> {
        let runs = self.existing(queue.memory())?;
        let mut state = self.shared.state();
        for (first, pages) in &runs {
            (*first..first + pages).for_each(|page| state.ballooned.remove(page));
        }
        let held = state.ballooned.count();
        drop(state);
        self.shared.metrics.set_held(held);
        // They are zero here, and shall be so wherever the guest looks at them.
        for (first, pages) in &runs {
            let len = usize::try_from(pages * PAGE).unwrap_or(usize::MAX);
            queue.memory().mark_dirty(GuestAddress(first * PAGE), len);
        }
        let pages = runs.iter().map(|(_, pages)| pages).sum();
        self.shared.metrics.deflated.inc_by(pages);
        queue.metrics().bytes_to_guest.inc_by(pages * PAGE);
        Ok(())
    }

    /// The pages that the request names and that there are.
    fn existing(&mut self, memory: &Memory) -> Result<Vec<(u64, u64)>, QueueFault> {
        let mut runs = request::runs(&self.chain, &mut self.numbers)?;
        let mut rest = Vec::new();
        let mut missing = 0;
        runs.retain(|(first, pages)| {
            let whole = is_memory(memory, *first, *pages);
            if !whole {
                rest.extend(*first..first + pages);
            }
            whole
        });
        for page in rest {
            if is_memory(memory, page, 1) {
                runs.push((page, 1));
            } else {
                missing += 1;
            }
        }
        self.shared.metrics.no_memory.inc_by(missing);
        Ok(runs)
    }

    /// A command, free pages, or both.
    fn hint(&mut self) -> Result<(), QueueFault> {
        let mut state = self.shared.state();
        let mut command = [0; 4];
        match self.chain.readable_len() {
            0 => {}
            4 => {
                self.chain.read(0, &mut command)?;
                state.hinting.said(u32::from_le_bytes(command));
            }
            _ => {
                return Err(QueueFault::Request {
                    head: self.chain.head(),
                    reason: "a command has four bytes",
                });
            }
        }
        if self.shared.features() & feature::PAGE_POISON != 0 && state.poison != 0 {
            // They are not free to be anything; the round ends without them.
            return Ok(());
        }
        for (start, len) in self.chain.writable_ranges() {
            match state.hinting.hint(start.0, len as u64) {
                Hint::Taken(pages) => self.shared.metrics.hinted.inc_by(pages),
                Hint::Late => self.shared.metrics.late_hints.inc(),
            };
        }
        Ok(())
    }

    /// Free pages that the guest does not use before it is answered.
    fn report(&mut self, queue: &Queue) {
        let mut bytes = 0;
        if !self.shared.keeps_free_pages() {
            let ranges: Vec<_> = self.chain.writable_ranges().collect();
            for (start, len) in ranges {
                self.give_back(queue.memory(), start.0, len as u64);
                queue.memory().mark_dirty(start, len);
                bytes += len as u64;
            }
        }
        self.shared.metrics.reported.inc_by(bytes / PAGE);
        queue.metrics().bytes_from_guest.inc_by(bytes);
    }

    fn give_back(&mut self, memory: &Memory, start: u64, len: u64) {
        match memory.discard(GuestAddress(start), len) {
            Ok(bytes) => {
                self.shared.metrics.returned_bytes.inc_by(bytes);
            }
            Err(error) => self.complain(&error),
        }
    }

    fn complain(&mut self, error: &io::Error) {
        self.shared.metrics.host_errors.inc();
        let what = format!("the host does not take guest memory back: {error}");
        self.shared.health.error(&what);
        if !std::mem::replace(&mut self.has_complained, true) {
            tracing::warn!(%error, "the host does not take guest memory back");
        }
    }

    /// The guest has one report on its way, which stays in the queue until the next is wanted.
    fn exchange_statistics(&mut self, queue: &mut Queue) -> Result<Progress, WorkerError> {
        let mut held = None;
        let mut next = Chain::default();
        while queue.pop(&mut next)? {
            if let Some(mut old) = held.replace(std::mem::take(&mut next)) {
                // There should be one; this one is out of date.
                queue.complete(&mut old, 0)?;
                self.has_statistics = false;
            }
        }
        let Some(mut report) = held else {
            self.has_statistics = false;
            return Ok(Progress::Emptied);
        };
        if !self.has_statistics {
            if let Err(fault) = self.take_statistics(&report) {
                queue.abandon(&mut report);
                return Err(queue.error(fault).into());
            }
            self.has_statistics = true;
        }
        if std::mem::take(&mut self.wants_statistics) {
            self.has_statistics = false;
            queue.complete(&mut report, 0)?;
            return Ok(Progress::Emptied);
        }
        queue.unpop(&mut report);
        Ok(Progress::Short)
    }

    fn take_statistics(&self, report: &Chain) -> Result<(), QueueFault> {
        let mut bytes = [0; statistics::MOST * statistics::ENTRY];
        let len = report.readable_len().min(bytes.len());
        report.read(0, &mut bytes[..len])?;
        self.shared.state().statistics = statistics::parse(&bytes[..len]);
        self.shared.metrics.statistics.inc();
        Ok(())
    }

    /// It has moved in. Some pages in the balloon may have come before they were given up.
    fn arrive(&mut self, memory: &Memory) {
        if self.shared.features() & feature::MUST_TELL_HOST == 0 {
            return;
        }
        let runs = self.shared.state().ballooned.runs();
        for (first, pages) in runs {
            self.give_back(memory, first * PAGE, pages * PAGE);
        }
    }
}

fn is_memory(memory: &Memory, first: u64, pages: u64) -> bool {
    let len = usize::try_from(pages * PAGE).unwrap_or(usize::MAX);
    memory.guest().check_range(GuestAddress(first * PAGE), len)
}

impl Worker for BalloonWorker {
    fn start(&mut self) -> Result<(), HostError> {
        Ok(())
    }

    fn wait_for(&self, interest: &mut Interest<'_>) {
        interest.readable(TIMER, self.shared.timer.as_fd());
    }

    fn ready(&mut self, _source: Source, _queues: &mut Queues<'_>) -> Result<(), WorkerError> {
        // The queue is looked at next.
        self.wants_statistics |= self.shared.timer.has_run_out();
        Ok(())
    }

    fn process(&mut self, queue: &mut Queue) -> Result<Progress, WorkerError> {
        if self.shared.take_arrived() {
            self.arrive(queue.memory());
        }
        let role = Role::of(queue.index(), self.shared.features());
        if role == Some(Role::Statistics) {
            return self.exchange_statistics(queue);
        }
        self.served.clear();
        let served = self.serve_all(role, queue);
        // The guest sees all answers of a turn at once.
        if !self.served.is_empty() {
            queue.answer(&self.served)?;
        }
        served.map(|()| Progress::Emptied)
    }
}
