//! CPU 0's own task: heartbeat, console commands, and the end of the work.

use super::devices::Progress;
use super::{STOP, Step, Task, UNFINISHED, WRONG};
use crate::console::{Input, report};
use crate::protocol::{Report, Workload};
use crate::{clock, cpu, interrupts, mmio, power};
use core::sync::atomic::Ordering;

/// Time between two looks at the console's input.
const INPUT_PERIOD_US: u64 = 5_000;

/// An address that no machine here maps, for the `fault` command.
const UNMAPPED: u64 = 1 << 46;

pub struct Control {
    progress: Progress,
    input: Input,
    next_input: u64,
    /// Ticks between heartbeats; 0: none.
    beat_period: u64,
    next_beat: u64,
    beats: u64,
    stop_at: Option<u64>,
    power_off_when_done: bool,
    /// There is nothing to wait for but the work (which may be none).
    ends_by_itself: bool,
    done: bool,
}

impl Control {
    pub fn new(workload: &Workload, progress: Progress) -> Self {
        let now = clock::observe();
        let beat_period = clock::ticks(u64::from(workload.heartbeat) * 1000);
        let seconds = u64::from(workload.seconds);
        Self {
            progress,
            input: Input::new(),
            next_input: now,
            beat_period,
            next_beat: now + beat_period,
            beats: 0,
            stop_at: (seconds > 0).then(|| now + clock::ticks(seconds * 1_000_000)),
            power_off_when_done: workload.poweroff,
            ends_by_itself: UNFINISHED.load(Ordering::Relaxed) > 0
                || (workload.poweroff && seconds == 0),
            done: false,
        }
    }

    fn beat(&mut self, now: u64) {
        self.beats += 1;
        // After a long stop the next beat is due at once, and the ones that were missed are not.
        self.next_beat = (self.next_beat + self.beat_period).max(now);
        let (gap, max, back) = clock::take_gap();
        report(&Report::Beat {
            n: self.beats,
            gap_us: clock::us(gap),
            max_us: clock::us(max),
            back,
            t_us: clock::since_start_us(),
        });
    }

    fn obey(&mut self, command: &str) {
        match command {
            "stop" => {
                self.power_off_when_done = true;
                STOP.store(true, Ordering::Relaxed);
            }
            "report" => self
                .progress
                .iter()
                .for_each(|account| report(&account.report())),
            "cpuid" => report(&cpuid()),
            "reset" => power::reset(),
            "poweroff" => power::off(),
            "triple" => cpu::triple_fault(),
            "fault" => drop(mmio::read::<u8>(UNMAPPED)),
            _ => {} // line noise must not end a test that can be judged by its reports
        }
    }

    fn finish(&mut self) {
        if !self.done {
            self.done = true;
            report(&Report::Done {
                ok: WRONG.load(Ordering::Relaxed) == 0,
                irqs: interrupts::total(),
                max_us: clock::us(clock::max_gap()),
                t_us: clock::since_start_us(),
            });
        }
        if self.power_off_when_done {
            power::off();
        }
    }
}

fn cpuid() -> Report {
    let [_, _, one_ecx, one_edx] = cpu::cpuid(1, 0);
    let [_, seven_ebx, ..] = cpu::cpuid(7, 0);
    let [_, _, extended_ecx, _] = cpu::cpuid(0x8000_0001, 0);
    Report::Cpuid {
        one_ecx,
        one_edx,
        seven_ebx,
        extended_ecx,
    }
}

impl Task for Control {
    fn poll(&mut self) -> Step {
        let now = clock::observe();
        if self.beat_period != 0 && now >= self.next_beat {
            self.beat(now);
        }
        if now >= self.next_input {
            self.next_input = now + clock::ticks(INPUT_PERIOD_US);
            if let Some(command) = self.input.poll() {
                self.obey(command.as_str());
            }
        }
        if self.stop_at.is_some_and(|at| now >= at) {
            self.stop_at = None;
            STOP.store(true, Ordering::Relaxed);
        }
        if UNFINISHED.load(Ordering::Acquire) == 0 && (self.ends_by_itself || super::stopping()) {
            self.finish();
        }
        let beat = if self.beat_period == 0 {
            u64::MAX
        } else {
            self.next_beat
        };
        Step::Idle {
            until: self.next_input.min(beat),
        }
    }
}
