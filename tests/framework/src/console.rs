//! The console of a guest: a line at a time, each with the moment at which it came.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use test_guest::{Report, command};

/// How often a guest is asked what it has written.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// What the guest prints first.
const FIRST_LINE: &str = "@first";

/// A line of the console.
#[derive(Clone, Debug)]
pub struct Line {
    /// When it was complete.
    pub at: Instant,
    /// Its text, without its end.
    pub text: String,
}

/// Our end of a guest's console.
#[derive(Debug)]
pub struct Console {
    socket: UnixStream,
    lines: Receiver<Line>,
    history: Vec<Line>,
}

impl Console {
    /// Listens on `socket`.
    pub fn new(socket: UnixStream) -> Result<Self> {
        let reader = socket
            .try_clone()
            .context("the console's socket cannot be shared")?;
        let (sender, lines) = channel();
        thread::spawn(move || read_lines(reader, &sender));
        Ok(Self {
            socket,
            lines,
            history: Vec::new(),
        })
    }

    /// Types `text`.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.socket
            .write_all(text.as_bytes())
            .context("the console takes no input")
    }

    /// Every line that was waited past so far.
    pub fn history(&self) -> &[Line] {
        &self.history
    }

    /// The next line.
    pub fn line(&mut self, end: Instant) -> Result<Line> {
        match self
            .lines
            .recv_timeout(end.saturating_duration_since(Instant::now()))
        {
            Ok(line) => {
                self.history.push(line.clone());
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest said nothing in time; {}", self.tail())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the console was closed; {}", self.tail()),
        }
    }

    /// Waits for a report that `wanted` picks. A report of failure ends the wait.
    pub fn report<T>(
        &mut self,
        what: &str,
        deadline: Duration,
        mut wanted: impl FnMut(&Report) -> Option<T>,
    ) -> Result<(Instant, T)> {
        let end = Instant::now() + deadline;
        loop {
            let line = self
                .line(end)
                .with_context(|| format!("waiting for {what}"))?;
            let Some(report) = Report::parse(&line.text).with_context(|| line.text.clone())? else {
                continue;
            };
            if let Some(value) = wanted(&report) {
                return Ok((line.at, value));
            }
            if let Report::Fail { .. } = report {
                bail!("waiting for {what}, the guest failed: {}", line.text);
            }
        }
    }

    /// Asks the guest for its reports, and waits for one that `wanted` picks: see [`Self::report`].
    pub fn ask<T>(
        &mut self,
        what: &str,
        deadline: Duration,
        wanted: impl FnMut(&Report) -> Option<T>,
    ) -> Result<(Instant, T)> {
        self.send(command::REPORT)?;
        self.report(what, deadline, wanted)
    }

    /// Waits until the guest, which has a heartbeat and a span, has written all of the span.
    pub fn fill(&mut self, deadline: Duration) -> Result<()> {
        // What is typed before the guest has a UART is lost.
        self.report("a heartbeat", deadline, |report| {
            matches!(report, Report::Beat { .. }).then_some(())
        })?;
        let end = Instant::now() + deadline;
        loop {
            let is_full = |report: &Report| match *report {
                Report::Dirty { pages, span, .. } => Some(pages >= span),
                _ => None,
            };
            if self.ask("its span", deadline, is_full)?.1 {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the guest does not write its span");
            // A guest that reports writes nothing else.
            thread::sleep(ASK_EVERY);
        }
    }

    /// The last lines, for a message.
    fn tail(&self) -> String {
        let last = self.history.len().saturating_sub(10);
        let lines: Vec<_> = self.history[last..]
            .iter()
            .map(|line| line.text.as_str())
            .collect();
        format!("its last lines: {lines:#?}")
    }
}

fn read_lines(mut socket: UnixStream, lines: &Sender<Line>) {
    let mut bytes = [0; 4096];
    let mut line = Vec::new();
    while let Ok(count @ 1..) = socket.read(&mut bytes) {
        let at = Instant::now();
        for &byte in &bytes[..count] {
            if byte != b'\n' {
                line.push(byte);
                continue;
            }
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            // A reset cuts a line off, and the first of the next boot continues it.
            let text = if text.ends_with(FIRST_LINE) {
                FIRST_LINE.to_owned()
            } else {
                text
            };
            if lines.send(Line { at, text }).is_err() {
                return;
            }
        }
    }
}
