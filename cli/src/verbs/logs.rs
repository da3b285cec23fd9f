//! `godwit logs`: what a machine's processes said.
//!
//! Each source is read by a thread of its own, for a log may be a pipe that blocks. What the logs
//! hold is printed in the order of its time, with the name of its source when there are several;
//! what is said after that as it comes.

use std::fs::File;
use std::future::poll_fn;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::OwnedFd;
use std::task::Poll;
use std::thread;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::connection::{Broker, Machine};
use crate::error::{Failure, Result, What as _};
use crate::job::Interrupts;
use crate::options::Logs;
use crate::render::{self, Output};

/// Bytes read at once.
const CHUNK: usize = 16 << 10;
/// A line that is longer is cut into several.
const MAX_LINE: usize = 64 << 10;
/// Lines of a source that wait to be printed.
const MAX_WAITING: usize = 64;
/// Before a log that was read to its end is looked at again.
const PAUSE: Duration = Duration::from_millis(200);
/// Length of the time before a line, to the microsecond.
const TIME: usize = "2026-01-01T00:00:00.000000".len();

/// A line with its newline, an empty one where a log was read to its end, or what went wrong.
type Line = io::Result<Vec<u8>>;

pub async fn run(broker: &Broker, output: Output, logs: Logs) -> Result<()> {
    let machine = broker.machine(&logs.name).await?;
    let names = if logs.sources.is_empty() {
        let (view, _) = machine.look().await?;
        let devices = view.devices.into_iter().map(|device| device.id);
        std::iter::once("core".to_owned()).chain(devices).collect()
    } else {
        logs.sources
    };
    let width = match names.as_slice() {
        [_] => None,
        all => all.iter().map(String::len).max(),
    };
    let mut sources = Vec::new();
    for name in names {
        let log = match open(&machine, &name).await {
            Ok(log) => log,
            // Somebody else's process has no log here.
            Err(Failure::Refused {
                error: api::Error::InvalidArgs(_) | api::Error::ResourceUnavailable(_),
                ..
            }) if width.is_some() => continue,
            Err(failure) => return Err(failure),
        };
        let (sender, lines) = channel(MAX_WAITING);
        thread::spawn(move || read(log, logs.follow, &sender));
        sources.push(Source::new(name, lines));
    }
    let printer = Printer { output, width };
    let mut interrupts = Interrupts::new()?;
    tokio::select! {
        result = print_all(sources, &printer) => result,
        // It is how a person ends it.
        _ = interrupts.next() => Ok(()),
    }
}

async fn open(machine: &Machine, source: &str) -> Result<File> {
    let what = format!("{}/{source}", machine.name);
    let log = machine.proxy.open_log(source, 0).await.what(what)?;
    Ok(OwnedFd::from(log).into())
}

/// A log that is being read.
struct Source {
    name: String,
    lines: Receiver<Line>,
    /// Its next line.
    head: Option<Vec<u8>>,
    /// When that was said; what has no time belongs to the line before it.
    time: Vec<u8>,
}

impl Source {
    fn new(name: String, lines: Receiver<Line>) -> Self {
        Self {
            name,
            lines,
            head: None,
            time: Vec::new(),
        }
    }

    /// Gets the next line of what the log held; there is no head at its end.
    async fn advance(&mut self) -> Result<()> {
        let line = self.lines.recv().await.unwrap_or(Ok(Vec::new()));
        let line = line.map_err(unreadable())?;
        if let Some(time) = time(&line) {
            self.time = time.to_vec();
        }
        self.head = Some(line).filter(|line| !line.is_empty());
        Ok(())
    }
}

/// The time before a line, which is UTC and so sorts as text.
fn time(line: &[u8]) -> Option<&[u8]> {
    let time = line.get(..TIME)?;
    let is_time = time[4] == b'-' && time[10] == b'T' && time[13] == b':' && time[19] == b'.';
    is_time.then_some(time)
}

fn unreadable() -> impl FnOnce(io::Error) -> Failure {
    Failure::io("a log cannot be read")
}

/// Prints what all logs hold in the order of its time, and then what comes.
async fn print_all(mut sources: Vec<Source>, printer: &Printer) -> Result<()> {
    for source in &mut sources {
        source.advance().await?;
    }
    while let Some((at, line)) = earliest(&mut sources).await? {
        printer.print(&sources[at].name, &line)?;
    }
    while let Some((at, line)) = next(&mut sources).await {
        printer.print(&sources[at].name, &line.map_err(unreadable())?)?;
    }
    Ok(())
}

/// The earliest of the lines that the logs held, and of which log; of equal ones that of the first.
async fn earliest(sources: &mut [Source]) -> Result<Option<(usize, Vec<u8>)>> {
    let held = sources.iter_mut().enumerate();
    let held = held.filter(|(_, source)| source.head.is_some());
    let Some((at, source)) = held.min_by(|(_, a), (_, b)| a.time.cmp(&b.time)) else {
        return Ok(None);
    };
    let line = source.head.take();
    source.advance().await?;
    Ok(line.map(|line| (at, line)))
}

/// The next line of any of the logs, and of which; nothing when all are over.
async fn next(sources: &mut [Source]) -> Option<(usize, Line)> {
    poll_fn(|context| {
        let mut all_over = true;
        for (at, source) in sources.iter_mut().enumerate() {
            match source.lines.poll_recv(context) {
                Poll::Ready(Some(line)) => return Poll::Ready(Some((at, line))),
                Poll::Ready(None) => {}
                Poll::Pending => all_over = false,
            }
        }
        if all_over {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    })
    .await
}

/// A line as JSON.
#[derive(Debug, Serialize)]
struct Said<'a> {
    source: &'a str,
    line: &'a str,
}

/// How lines are printed.
struct Printer {
    output: Output,
    /// Width of the sources' names; none if there is one source.
    width: Option<usize>,
}

impl Printer {
    fn print(&self, source: &str, line: &[u8]) -> Result<()> {
        if line.is_empty() {
            return Ok(());
        }
        if self.output.is_json() {
            let text = String::from_utf8_lossy(line);
            let line = text.trim_end_matches('\n');
            return self.output.print(&Said { source, line }, |_| String::new());
        }
        let prefix = match self.width {
            Some(width) => format!("{source:<width$} | "),
            None => String::new(),
        };
        render::write(&[prefix.as_bytes(), line].concat())
    }
}

/// Reads a log, and sends its lines; an empty one when it was read to its end for the first time.
fn read(mut log: File, follow: bool, lines: &Sender<Line>) {
    let is_file = log.metadata().is_ok_and(|data| data.is_file());
    let mut split = Split::default();
    let mut bytes = vec![0; CHUNK];
    let mut held = true;
    loop {
        let count = match log.read(&mut bytes) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let _ = lines.blocking_send(Err(error));
                return;
            }
        };
        let mut whole = split.add(&bytes[..count]);
        let goes_on = follow && is_file;
        if count == 0 && !goes_on {
            whole.extend(split.rest());
        }
        if count == 0 && std::mem::take(&mut held) {
            whole.push(Vec::new());
        }
        for line in whole {
            if lines.blocking_send(Ok(line)).is_err() {
                return;
            }
        }
        if count > 0 {
            continue;
        }
        if !goes_on || lines.is_closed() {
            return;
        }
        // The broker empties a log that has grown too long.
        if let (Ok(data), Ok(at)) = (log.metadata(), log.stream_position())
            && data.len() < at
        {
            let _ = log.rewind();
        }
        thread::sleep(PAUSE);
    }
}

/// Makes lines, each with its newline, of bytes.
#[derive(Debug, Default)]
struct Split(Vec<u8>);

impl Split {
    fn add(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.0.extend_from_slice(piece);
            if self.0.ends_with(b"\n") {
                lines.push(std::mem::take(&mut self.0));
            } else if self.0.len() > MAX_LINE {
                lines.extend(self.rest());
            }
        }
        lines
    }

    /// What is left without a newline, with one.
    fn rest(&mut self) -> Option<Vec<u8>> {
        if self.0.is_empty() {
            return None;
        }
        self.0.push(b'\n');
        Some(std::mem::take(&mut self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn text(lines: Vec<Vec<u8>>) -> Vec<String> {
        lines
            .into_iter()
            .map(|line| String::from_utf8(line).unwrap())
            .collect()
    }

    #[test]
    fn pieces_become_lines() {
        let mut split = Split::default();
        assert_eq!(text(split.add(b"a\nb")), ["a\n"]);
        assert_eq!(text(split.add(b"c\n\n")), ["bc\n", "\n"]);
        assert_eq!(split.rest(), None);
        assert_eq!(text(split.add(b"end")), [""; 0]);
        assert_eq!(split.rest().unwrap(), b"end\n");
    }

    #[test]
    fn what_begins_with_a_time_has_one() {
        let line = b"2026-11-21T15:55:05.748227Z  WARN x: y\n";
        assert_eq!(time(line).unwrap(), b"2026-11-21T15:55:05.748227");
        assert_eq!(
            time(b"thread 'main' panicked at dev-blk/src/main.rs:1\n"),
            None
        );
        assert_eq!(time(b"\n"), None);
    }

    #[tokio::test]
    async fn lines_come_in_the_order_of_their_time() {
        let said = |lines: &[&str]| {
            let (sender, receiver) = channel(8);
            for line in lines {
                sender.try_send(Ok(line.as_bytes().to_vec())).unwrap();
            }
            Source::new(String::new(), receiver)
        };
        let at = |second: u32| format!("2026-11-21T15:55:{second:02}.000000Z x\n");
        let (one, two, three) = (at(1), at(2), at(3));
        let mut sources = [
            said(&["no time\n", &two, "its second line\n", ""]),
            said(&[&one, &three, ""]),
        ];
        for source in &mut sources {
            source.advance().await.unwrap();
        }
        let mut lines = Vec::new();
        while let Some((_, line)) = earliest(&mut sources).await.unwrap() {
            lines.push(String::from_utf8(line).unwrap());
        }
        assert_eq!(
            lines,
            ["no time\n", &one, &two, "its second line\n", &three]
        );
    }

    #[test]
    fn a_line_without_end_does_not_fill_memory() {
        let mut split = Split::default();
        let mut count = 0;
        for _ in 0..100 {
            count += split.add(&[b'x'; CHUNK]).len();
            assert!(split.0.len() <= MAX_LINE + CHUNK);
        }
        assert!(count > 10);
    }

    #[test]
    fn a_followed_file_is_read_as_it_grows() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("log");
        let mut log = File::create(&path).unwrap();
        log.write_all(b"one\ntw").unwrap();
        let (sender, mut lines) = channel(4);
        let reader = File::open(&path).unwrap();
        let thread = thread::spawn(move || read(reader, true, &sender));
        let mut next = || lines.blocking_recv().unwrap().unwrap();
        assert_eq!(next(), b"one\n");
        assert_eq!(next(), b"");
        log.write_all(b"o\n").unwrap();
        assert_eq!(next(), b"two\n");
        log.set_len(0).unwrap();
        log.rewind().unwrap();
        log.write_all(b"new\n").unwrap();
        assert_eq!(next(), b"new\n");
        drop(lines);
        thread.join().unwrap();
    }
}
