//! The serial console: report lines out, command lines in.
//!
//! Every byte is a VM exit (about 25 µs), so lines are short and input is looked at seldom.

use crate::protocol::{Report, Text};
use crate::sync::SpinLock;
use crate::{clock, port, power};
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

const COM1: u16 = 0x3f8;
const FIFO_CONTROL: u16 = COM1 + 2;
const FIFO_ENABLE: u8 = 1 << 0;
const LINE_STATUS: u16 = COM1 + 5;
const DATA_READY: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// How long the other side may leave the transmitter full before a line is sent all the same.
const MAX_WAIT_US: u64 = 1_000_000;
/// Bytes between two looks at the transmitter: what its FIFO takes.
const BURST: usize = 16;

static OUTPUT: SpinLock<()> = SpinLock::new(());
static FAILING: AtomicBool = AtomicBool::new(false);

/// Turns the FIFO on: without it a UART keeps one byte of a burst that the other side does not take.
pub fn start() {
    port::write8(FIFO_CONTROL, FIFO_ENABLE);
}

/// One line, made before it is sent so that a formatting CPU holds no lock.
struct Line {
    bytes: [u8; 400],
    length: usize,
}

impl Line {
    fn of(report: &Report) -> Self {
        let mut line = Self {
            bytes: [0; 400],
            length: 0,
        };
        // The longest report is well within the line; a longer one would be cut, not lost.
        let _ = writeln!(line, "{report}");
        line
    }

    fn send(&self) {
        for burst in self.bytes[..self.length].chunks(BURST) {
            let deadline = clock::Deadline::after_us(MAX_WAIT_US);
            while port::read8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 && !deadline.passed() {
                clock::observe();
            }
            for &byte in burst {
                port::write8(COM1, byte);
                clock::observe();
            }
        }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            *self.bytes.get_mut(self.length).ok_or(fmt::Error)? = byte;
            self.length += 1;
        }
        Ok(())
    }
}

/// Prints one report.
pub fn report(report: &Report) {
    let line = Line::of(report);
    let _guard = OUTPUT.lock();
    line.send();
}

/// Says why the guest cannot go on, and ends the machine.
pub fn fail(reason: &str, a: u64, b: u64, what: Text) -> ! {
    fail_with(Report::Fail {
        reason: Text::new(reason),
        a,
        b,
        what,
    })
}

/// As [`fail`], with the report at hand.
pub fn fail_with(why: Report) -> ! {
    if FAILING.swap(true, Ordering::SeqCst) {
        crate::cpu::stop(); // another CPU is at it, or failing failed
    }
    // No lock: its owner may be the one that failed. The line starts on its own.
    port::write8(COM1, b'\n');
    Line::of(&why).send();
    power::off()
}

/// Reads what has arrived, up to a line's end.
pub struct Input {
    line: [u8; 16],
    length: usize,
}

impl Input {
    pub const fn new() -> Self {
        Self {
            line: [0; 16],
            length: 0,
        }
    }

    /// The next whole line, if it is here. One VM exit if nothing is.
    pub fn poll(&mut self) -> Option<Text> {
        while port::read8(LINE_STATUS) & DATA_READY != 0 {
            let byte = port::read8(COM1);
            clock::observe();
            if byte == b'\n' || byte == b'\r' {
                let line = Text::from_bytes(&self.line[..self.length]);
                self.length = 0;
                if !line.as_str().is_empty() {
                    return Some(line);
                }
            } else if let Some(slot) = self.line.get_mut(self.length) {
                *slot = byte;
                self.length += 1;
            }
        }
        None
    }
}
