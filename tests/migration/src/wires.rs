//! The connections between two sides, each of which may be led through a relay that fails.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use test_framework::machine::DEADLINE;

/// What carries them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Unix sockets.
    Unix,
    /// TCP on this computer.
    Tcp,
    /// Unix sockets, and memory that both sides map.
    Shared,
}

/// What happens to one connection. Where it says nothing else: on the way to the destination.
///
/// Those that name a message are for the connection of the cores, see `crates/migration/src/link.rs`,
/// on the message's own way.
#[derive(Clone, Debug)]
pub enum Fault {
    /// After so many bytes the connection is closed on both sides.
    Cut(usize),
    /// The byte after so many has one bit flipped.
    Flip(usize),
    /// After so many bytes nothing passes any more, and both sides are left waiting.
    Stall(usize),
    /// The byte after so many is this one.
    Put(usize, u8),
    /// As `Cut`, for what the destination says.
    CutBack(usize),
    /// The connection is closed in the place of the message of this name.
    CutBefore(&'static str),
    /// As `Flip`, for what the destination says.
    FlipBack(usize),
    /// The message with this name comes so much later, and all that follow it.
    Delay(&'static str, Duration),
    /// The same, and a bit of it is flipped.
    Spoil(&'static str, Duration),
    /// The message with this name waits at a gate, with all that follow it.
    Wait(&'static str, Gate),
    /// In the message with this name the byte after this text is this one, as if it
    /// were meant.
    Say(&'static str, &'static str, u8),
}

/// What a destination says.
const ANSWERS: [&str; 7] = [
    "Welcome",
    "Refused",
    "Ready",
    "Prepared",
    "Loaded",
    "Running",
    "Discarded",
];

impl Fault {
    /// The message that it is about.
    fn message(&self) -> Option<&'static str> {
        match self {
            Self::CutBefore(name)
            | Self::Delay(name, _)
            | Self::Spoil(name, _)
            | Self::Wait(name, _)
            | Self::Say(name, ..) => Some(name),
            _ => None,
        }
    }
}

/// Where a message waits until it may pass.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<(Mutex<Passage>, Condvar)>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Passage {
    #[default]
    Nobody,
    Waits,
    Open,
}

impl Gate {
    /// Waits until the message is there.
    pub fn await_message(&self) -> Result<()> {
        match self.wait(|passage| passage == Passage::Nobody) {
            Passage::Nobody => bail!("the message does not come"),
            _ => Ok(()),
        }
    }

    /// Lets it pass.
    pub fn open(&self) {
        self.set(Passage::Open);
    }

    /// The message is there; waits until it may pass, or the test has failed.
    fn hold(&self) {
        self.set(Passage::Waits);
        self.wait(|passage| passage == Passage::Waits);
    }

    fn set(&self, passage: Passage) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = passage;
        self.0.1.notify_all();
    }

    fn wait(&self, for_other_than: impl Fn(Passage) -> bool) -> Passage {
        let passage = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .0
            .1
            .wait_timeout_while(passage, DEADLINE, |passage| for_other_than(*passage));
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// One side's ends.
#[derive(Debug)]
pub struct Ends {
    /// Between the cores.
    pub control: OwnedFd,
    /// For memory.
    pub ram: Vec<OwnedFd>,
    /// From device to device.
    pub states: BTreeMap<String, OwnedFd>,
}

/// Both sides' ends.
#[derive(Debug)]
pub struct Wires {
    /// The source's.
    pub source: Ends,
    /// The destination's.
    pub destination: Ends,
}

impl Wires {
    /// Connections of `kind` for the devices `ids`, with `channels` for memory. `fault` says which
    /// connection fails, by name (`control`, `ram0`, a device's id), and how.
    pub fn connect(
        kind: Kind,
        channels: usize,
        ids: &[String],
        fault: Option<(&str, Fault)>,
    ) -> Result<Self> {
        let wire = |name: &str| match &fault {
            Some((at, fault)) if *at == name => {
                let (source, near) = UnixStream::pair()?;
                let (far, destination) = UnixStream::pair()?;
                relay(near, far, fault.clone())?;
                Ok((source.into(), destination.into()))
            }
            _ => pair(kind),
        };
        let channels = if kind == Kind::Shared { 0 } else { channels };
        let control = wire("control")?;
        let ram: Vec<_> = (0..channels)
            .map(|channel| wire(&format!("ram{channel}")))
            .collect::<Result<_>>()?;
        let states: Vec<_> = ids.iter().map(|id| wire(id)).collect::<Result<_>>()?;
        let (ram_source, ram_destination) = ram.into_iter().unzip();
        let (state_source, state_destination): (Vec<_>, Vec<_>) = states.into_iter().unzip();
        Ok(Self {
            source: Ends {
                control: control.0,
                ram: ram_source,
                states: ids.iter().cloned().zip(state_source).collect(),
            },
            destination: Ends {
                control: control.1,
                ram: ram_destination,
                states: ids.iter().cloned().zip(state_destination).collect(),
            },
        })
    }
}

fn pair(kind: Kind) -> Result<(OwnedFd, OwnedFd)> {
    match kind {
        Kind::Unix | Kind::Shared => {
            let (a, b) = UnixStream::pair().context("no socket pair")?;
            Ok((a.into(), b.into()))
        }
        Kind::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0").context("no TCP")?;
            let a = TcpStream::connect(listener.local_addr()?)?;
            let (b, _) = listener.accept()?;
            a.set_nodelay(true)?;
            b.set_nodelay(true)?;
            Ok((a.into(), b.into()))
        }
    }
}

/// Passes bytes on in both directions until the fault, or an end.
fn relay(near: UnixStream, far: UnixStream, fault: Fault) -> Result<()> {
    let (back, forth) = match fault {
        Fault::CutBack(at) => (Some(Fault::Cut(at)), None),
        Fault::FlipBack(at) => (Some(Fault::Flip(at)), None),
        fault if fault.message().is_some_and(|name| ANSWERS.contains(&name)) => (Some(fault), None),
        fault => (None, Some(fault)),
    };
    for (from, to, fault) in [(&near, &far, forth), (&far, &near, back)] {
        let (from, to) = (from.try_clone()?, to.try_clone()?);
        thread::spawn(move || {
            let passed = match fault {
                None => bytes(&from, &to, &Fault::Cut(usize::MAX)),
                Some(fault) if fault.message().is_some() => messages(&from, &to, &fault),
                Some(fault) => bytes(&from, &to, &fault),
            };
            // Whoever sends or waits sees an end.
            let how = if passed.is_ok() {
                Shutdown::Write
            } else {
                Shutdown::Both
            };
            let _ = to.shutdown(how);
            let _ = from.shutdown(if passed.is_ok() { Shutdown::Read } else { how });
        });
    }
    Ok(())
}

/// Passes messages on until the end.
fn messages(mut from: &UnixStream, mut to: &UnixStream, fault: &Fault) -> io::Result<()> {
    loop {
        let mut message = vec![0; HEADER];
        if from.read(&mut message[..1])? == 0 {
            return Ok(());
        }
        from.read_exact(&mut message[1..])?;
        let length: [u8; 4] = std::array::from_fn(|at| message[4 + at]);
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        message.resize(HEADER + length, 0);
        from.read_exact(&mut message[HEADER..])?;
        let is = |name: &str| {
            let begin = &message[HEADER..message.len().min(HEADER + 2 + name.len())];
            find(begin, name).is_some()
        };
        match fault {
            Fault::CutBefore(name) if is(name) => return Err(io::Error::other("cut")),
            Fault::Delay(name, time) if is(name) => thread::sleep(*time),
            Fault::Spoil(name, time) if is(name) => {
                thread::sleep(*time);
                message[HEADER + 2] ^= 0x10;
            }
            Fault::Wait(name, gate) if is(name) => gate.hold(),
            Fault::Say(name, text, byte) if is(name) => {
                let missing = || io::Error::other("what shall be said otherwise is not said");
                let at = find(&message, text).ok_or_else(missing)? + text.len();
                message[at] = *byte;
                for (checked, at) in [(HEADER..message.len(), 8), (0..12, 12)] {
                    let crc = crc32c::crc32c(&message[checked]);
                    message[at..at + 4].copy_from_slice(&crc.to_le_bytes());
                }
            }
            _ => {}
        }
        to.write_all(&message)?;
    }
}

/// Bytes before a message, with its length and two checksums.
const HEADER: usize = 16;

fn find(bytes: &[u8], text: &str) -> Option<usize> {
    bytes
        .windows(text.len())
        .position(|window| window == text.as_bytes())
}

/// Of `count` bytes after `passed`, those before `at`.
fn until(at: usize, passed: usize, count: usize) -> usize {
    at.saturating_sub(passed).min(count)
}

/// Passes bytes on until the end; one that the fault makes is an error.
fn bytes(mut from: &UnixStream, mut to: &UnixStream, fault: &Fault) -> io::Result<()> {
    let mut passed = 0;
    let mut bytes = [0; 4096];
    loop {
        let count = from.read(&mut bytes)?;
        if count == 0 {
            return Ok(());
        }
        let bytes = &mut bytes[..count];
        let is_here = |at: usize| (passed..passed + count).contains(&at);
        match *fault {
            Fault::Cut(at) if at < passed + count => {
                to.write_all(&bytes[..until(at, passed, count)])?;
                return Err(io::Error::other("cut"));
            }
            Fault::Stall(at) if at < passed + count => {
                to.write_all(&bytes[..until(at, passed, count)])?;
                // Until the test ends.
                loop {
                    thread::park();
                }
            }
            Fault::Flip(at) if is_here(at) => {
                bytes[at - passed] ^= 0x10;
                to.write_all(bytes)?;
            }
            Fault::Put(at, byte) if is_here(at) => {
                bytes[at - passed] = byte;
                to.write_all(bytes)?;
            }
            _ => to.write_all(bytes)?,
        }
        passed += count;
    }
}
