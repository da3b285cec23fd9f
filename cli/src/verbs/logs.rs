//! `godwit logs`: what a machine's processes said.
//!
//! Each source is read by a thread of its own, for a log may be a pipe that blocks; whole lines
//! meet in one place and are printed with the name of their source when there are several.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::connection::{Broker, Machine};
use crate::error::{Failure, Result, What as _};
use crate::job::Interrupts;
use crate::options::Logs;
use crate::render;

/// Bytes read at once.
const CHUNK: usize = 16 << 10;
/// A line that is longer is cut into several.
const MAX_LINE: usize = 64 << 10;
/// Lines that wait to be printed.
const MAX_WAITING: usize = 64;
/// Before a log that was read to its end is looked at again.
const PAUSE: Duration = Duration::from_millis(200);

/// A line, or what went wrong.
type Line = (usize, io::Result<Vec<u8>>);

pub async fn run(broker: &Broker, logs: Logs) -> Result<()> {
    let machine = broker.machine(&logs.name).await?;
    let sources = if logs.sources.is_empty() {
        let (view, _) = machine.look().await?;
        let devices = view.devices.into_iter().map(|device| device.id);
        std::iter::once("core".to_owned()).chain(devices).collect()
    } else {
        logs.sources
    };
    let width = sources.iter().map(String::len).max().unwrap_or_default();
    let prefix = |at: usize| match sources.as_slice() {
        [_] => String::new(),
        all => format!("{:<width$} | ", all.get(at).map_or("", String::as_str)),
    };
    let (sender, mut lines) = channel(MAX_WAITING);
    let explicit = sources.len() == 1;
    for (at, source) in sources.iter().enumerate() {
        let log = match open(&machine, source).await {
            Ok(log) => log,
            // Somebody else's process has no log here.
            Err(Failure::Refused {
                error: api::Error::InvalidArgs(_) | api::Error::ResourceUnavailable(_),
                ..
            }) if !explicit => {
                continue;
            }
            Err(failure) => return Err(failure),
        };
        let sender = sender.clone();
        let follow = logs.follow;
        thread::spawn(move || read(log, at, follow, &sender));
        if !follow {
            // One source after the other.
            drain(&mut lines, at, &prefix).await?;
        }
    }
    drop(sender);
    let mut interrupts = Interrupts::new()?;
    tokio::select! {
        result = print_all(&mut lines, &prefix) => result,
        // It is how a person ends it.
        _ = interrupts.next() => Ok(()),
    }
}

async fn open(machine: &Machine, source: &str) -> Result<File> {
    let what = format!("{}/{source}", machine.name);
    let log = machine.proxy.open_log(source, 0).await.what(what)?;
    Ok(OwnedFd::from(log).into())
}

async fn print_all(lines: &mut Receiver<Line>, prefix: &impl Fn(usize) -> String) -> Result<()> {
    while let Some((at, line)) = lines.recv().await {
        print(&prefix(at), line)?;
    }
    Ok(())
}

/// Prints all of one source, whose end is an empty line without its newline.
async fn drain(
    lines: &mut Receiver<Line>,
    source: usize,
    prefix: &impl Fn(usize) -> String,
) -> Result<()> {
    while let Some((at, line)) = lines.recv().await {
        if at == source && matches!(&line, Ok(line) if line.is_empty()) {
            return Ok(());
        }
        print(&prefix(at), line)?;
    }
    Ok(())
}

fn print(prefix: &str, line: io::Result<Vec<u8>>) -> Result<()> {
    let line = line.map_err(Failure::io("a log cannot be read"))?;
    if line.is_empty() {
        return Ok(());
    }
    render::write(&[prefix.as_bytes(), &line].concat())
}

/// Reads a log, and sends its lines; an empty one at its end.
fn read(mut log: File, at: usize, follow: bool, lines: &Sender<Line>) {
    let is_file = log.metadata().is_ok_and(|data| data.is_file());
    let mut split = Split::default();
    let mut bytes = vec![0; CHUNK];
    loop {
        let count = match log.read(&mut bytes) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let _ = lines.blocking_send((at, Err(error)));
                return;
            }
        };
        if count == 0 && follow && is_file {
            if lines.is_closed() {
                return;
            }
            // The broker empties a log that has grown too long.
            if let (Ok(data), Ok(at)) = (log.metadata(), log.stream_position())
                && data.len() < at
            {
                let _ = log.rewind();
            }
            thread::sleep(PAUSE);
            continue;
        }
        let mut whole = split.add(&bytes[..count]);
        if count == 0 {
            whole.extend(split.rest());
            whole.push(Vec::new());
        }
        for line in whole {
            if lines.blocking_send((at, Ok(line))).is_err() {
                return;
            }
        }
        if count == 0 {
            return;
        }
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
        let thread = thread::spawn(move || read(reader, 0, true, &sender));
        assert_eq!(lines.blocking_recv().unwrap().1.unwrap(), b"one\n");
        log.write_all(b"o\n").unwrap();
        assert_eq!(lines.blocking_recv().unwrap().1.unwrap(), b"two\n");
        log.set_len(0).unwrap();
        log.rewind().unwrap();
        log.write_all(b"new\n").unwrap();
        assert_eq!(lines.blocking_recv().unwrap().1.unwrap(), b"new\n");
        drop(lines);
        thread.join().unwrap();
    }
}
