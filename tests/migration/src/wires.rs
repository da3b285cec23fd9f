//! The connections between two sides, each of which may be led through a relay that fails.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

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

/// What happens to the bytes of one connection on their way to the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// After so many bytes the connection is closed on both sides.
    Cut(usize),
    /// The byte after so many has one bit flipped.
    Flip(usize),
    /// After so many bytes nothing passes any more, and both sides are left waiting.
    Stall(usize),
    /// As `Cut`, for what the destination says.
    CutBack(usize),
    /// Both sides are cut off from each other in the place of the destination's message of this name.
    CutBefore(&'static str),
    /// What the destination says after so many bytes comes so much later.
    Late(usize, Duration),
    /// The message of the source with this name comes so much later.
    Delay(&'static str, Duration),
    /// The same, and a bit of it is flipped.
    Spoil(&'static str, Duration),
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
        let wire = |name: &str| {
            let fault = fault.filter(|(at, _)| *at == name).map(|(_, fault)| fault);
            match fault {
                None => pair(kind),
                Some(fault) => {
                    let (source, near) = UnixStream::pair()?;
                    let (far, destination) = UnixStream::pair()?;
                    relay(near, far, fault)?;
                    Ok((source.into(), destination.into()))
                }
            }
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
        back @ (Fault::Late(..) | Fault::CutBefore(_)) => (Some(back), None),
        fault => (None, Some(fault)),
    };
    for (from, to, fault) in [(&near, &far, forth), (&far, &near, back)] {
        let (from, to) = (from.try_clone()?, to.try_clone()?);
        thread::spawn(move || pass(from, to, fault));
    }
    Ok(())
}

/// Of `count` bytes after `passed`, those before `at`.
fn until(at: usize, passed: usize, count: usize) -> usize {
    at.saturating_sub(passed).min(count)
}

fn pass(mut from: UnixStream, mut to: UnixStream, fault: Option<Fault>) {
    use std::net::Shutdown;
    let mut passed = 0;
    let mut bytes = [0; 4096];
    while let Ok(mut count @ 1..) = from.read(&mut bytes) {
        let good = match fault {
            Some(Fault::Cut(at) | Fault::Stall(at)) => until(at, passed, count),
            Some(Fault::CutBefore(name)) => {
                let mut windows = bytes[..count].windows(name.len());
                let found = windows.any(|window| window == name.as_bytes());
                if found { 0 } else { count }
            }
            Some(Fault::Late(at, time)) => {
                let early = until(at, passed, count);
                if to.write_all(&bytes[..early]).is_err() {
                    break;
                }
                if early < count && passed <= at {
                    thread::sleep(time);
                }
                bytes.copy_within(early..count, 0);
                passed += early;
                count -= early;
                count
            }
            Some(Fault::Delay(name, time) | Fault::Spoil(name, time)) => {
                let found = bytes[..count]
                    .windows(name.len())
                    .position(|window| window == name.as_bytes());
                if let Some(at) = found {
                    thread::sleep(time);
                    if let Some(Fault::Spoil(..)) = fault {
                        bytes[at] ^= 0x10;
                    }
                }
                count
            }
            Some(Fault::Flip(at)) => {
                if (passed..passed + count).contains(&at) {
                    bytes[at - passed] ^= 0x10;
                }
                count
            }
            _ => count,
        };
        if to.write_all(&bytes[..good]).is_err() {
            break;
        }
        passed += good;
        if good < count {
            if let Some(Fault::Stall(_)) = fault {
                // Until the test ends, or one side closes.
                let _ = from.read(&mut []);
                thread::park();
            }
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
