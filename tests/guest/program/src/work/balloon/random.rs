//! Everything that a driver may do with its pages, at random and as fast as it goes: they are
//! written, given, taken back, reported, named as free and used again at once, whatever the host is
//! doing. What was written last is in each page that holds something, always.

use super::Total;
use crate::clock;
use crate::console::fail;
use crate::memory::{self, PAGE};
use crate::protocol::Text;
use crate::virtio::balloon::{Balloon, DONE, FIRST_ROUND, STOP};
use crate::work::dirty::write_tags;
use crate::work::pattern;
use crate::work::{Step, Task, stopping};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;

/// Actions between two looks at what the host wants.
const BURST: usize = 64;
/// Most pages of an action.
const MOST: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// It may hold anything.
    Free,
    /// It holds what was written in this generation.
    Written(u64),
    /// It is in the balloon.
    Given,
}

pub struct Random {
    balloon: Balloon,
    total: Arc<Total>,
    pages: Vec<(u64, State)>,
    dice: pattern::Random,
    generation: u64,
    /// The round that the host wants; whether it was begun here, and whether it is over here.
    round: u32,
    begun: bool,
    over: bool,
}

impl Random {
    pub fn new(balloon: Balloon, bytes: u64, total: Arc<Total>) -> Self {
        let ranges = memory::take_pages(bytes);
        let pages = ranges
            .iter()
            .flat_map(|range| (range.start..range.end).step_by(PAGE as usize))
            .map(|page| (page, State::Free))
            .collect();
        Self {
            balloon,
            total,
            pages,
            dice: pattern::Random::new(bytes),
            generation: 0,
            round: 0,
            begun: false,
            over: false,
        }
    }

    /// Some pages that lie side by side and are not in the balloon.
    fn run(&mut self) -> core::ops::Range<usize> {
        let start = self.dice.below(self.pages.len());
        let most = (start + 1 + self.dice.below(MOST)).min(self.pages.len());
        let base = self.pages[start].0;
        let mut end = start;
        while end < most
            && self.pages[end].1 != State::Given
            && self.pages[end].0 == base + (end - start) as u64 * PAGE
        {
            end += 1;
        }
        start..end
    }

    /// Checks what a page held, and writes something new.
    fn write(&mut self, at: usize) {
        let (page, state) = self.pages[at];
        match state {
            State::Given => return,
            State::Written(generation) => self.total.check(page, generation),
            State::Free => {}
        }
        self.generation += 1;
        write_tags(page, self.generation);
        self.pages[at].1 = State::Written(self.generation);
    }

    fn set(&mut self, range: core::ops::Range<usize>, state: State) -> (u64, u32) {
        let length = range.len() as u64 * PAGE;
        let address = self.pages[range.start].0;
        self.pages[range].iter_mut().for_each(|page| page.1 = state);
        (address, length as u32)
    }

    fn hint(&mut self) {
        let range = self.run();
        if range.is_empty() {
            return;
        }
        let address = self.pages[range.start].0;
        if !self
            .balloon
            .hint(address, (range.len() as u64 * PAGE) as u32)
        {
            return;
        }
        self.total.hinted.fetch_add(range.len() as u64, Relaxed);
        self.set(range.clone(), State::Free);
        // Before the device has seen it, most likely.
        for at in range {
            if self.dice.below(2) == 0 {
                self.write(at);
                self.total.reused.fetch_add(1, Relaxed);
            }
        }
    }

    fn report(&mut self) {
        let range = self.run();
        if !range.is_empty() {
            let count = range.len() as u64;
            let (address, length) = self.set(range, State::Free);
            self.balloon.report(address, length);
            self.total.reported.fetch_add(count, Relaxed);
        }
    }

    fn inflate(&mut self) {
        let range = self.run();
        if !range.is_empty() {
            let count = range.len() as u64;
            let (address, _) = self.set(range, State::Given);
            self.balloon.inflate((0..count).map(|n| address + n * PAGE));
            self.total.inflated.fetch_add(count, Relaxed);
        }
    }

    /// Takes back up to `most` pages, looked for from somewhere on.
    fn deflate(&mut self, most: usize) {
        let start = self.dice.below(self.pages.len());
        let all = (start..self.pages.len()).chain(0..start);
        let given = all.filter(|at| self.pages[*at].1 == State::Given);
        let given: Vec<usize> = given.take(most).collect();
        if given.is_empty() {
            return;
        }
        let pages = given.iter().map(|at| self.pages[*at].0);
        self.balloon.deflate(pages);
        for at in &given {
            self.total.check_zero(self.pages[*at].0);
            self.pages[*at].1 = State::Free;
            self.write(*at);
        }
        self.total.deflated.fetch_add(given.len() as u64, Relaxed);
    }

    fn act(&mut self) {
        match self.dice.below(1000) {
            // Also when the host has stopped the round, or never began one: that is late, and
            // counts for nothing.
            0..300 => self.hint(),
            300..320 => self.inflate(),
            320..340 => self.deflate(MOST),
            340..350 => self.report(),
            350 if self.begun && !self.over => self.over = self.balloon.say(STOP),
            _ => {
                let at = self.dice.below(self.pages.len());
                self.write(at);
            }
        }
    }

    fn look_at_command(&mut self) {
        let command = self.balloon.command();
        if command == DONE && core::mem::replace(&mut self.round, 0) != 0 {
            self.total.ended.fetch_add(1, Relaxed);
        }
        if command >= FIRST_ROUND && command != self.round {
            (self.round, self.begun, self.over) = (command, false, false);
        }
        if self.round != 0 && !self.begun && self.balloon.say(self.round) {
            self.begun = true;
            self.total.rounds.fetch_add(1, Relaxed);
        }
    }

    fn finish(&mut self) -> Step {
        let deadline = clock::Deadline::after_us(30_000_000);
        while !self.balloon.is_quiet() {
            self.balloon.reap();
            if deadline.passed() {
                fail("hint-timeout", 0, 0, Text::new(""));
            }
        }
        while self.pages.iter().any(|page| page.1 == State::Given) {
            self.deflate(MOST);
        }
        for (page, state) in &self.pages {
            if let State::Written(generation) = state {
                self.total.check(*page, *generation);
            }
        }
        self.total.finish();
        Step::Finished
    }
}

impl Task for Random {
    fn poll(&mut self) -> Step {
        if stopping() {
            return self.finish();
        }
        self.look_at_command();
        self.balloon.reap();
        self.balloon.tell();
        for _ in 0..BURST {
            self.act();
        }
        Step::Busy
    }
}
