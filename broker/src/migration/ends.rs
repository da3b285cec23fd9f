//! What two cores and their devices are connected by: an end of each connection.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// Name of what is the core's.
const CORE: &str = "core";
/// What names of memory channels begin with; their number follows.
const RAM: &str = "ram";
/// What names of what is a device's begin with; its id follows.
const DEVICE: &str = "device-";

/// One side's ends, or the files of a snapshot.
#[derive(Debug)]
pub struct Ends {
    /// Between the cores, or the core's file.
    pub control: OwnedFd,
    /// For memory; none where both cores map the same.
    pub ram: Vec<OwnedFd>,
    /// From device to device, by id.
    pub states: BTreeMap<String, OwnedFd>,
}

impl Ends {
    /// The name of each: of the core's, of `channels` for memory, of the devices'.
    pub(crate) fn names<'a>(
        channels: usize,
        devices: impl Iterator<Item = &'a str>,
    ) -> Vec<String> {
        let ram = (0..channels).map(|number| format!("{RAM}{number}"));
        let devices = devices.map(|id| format!("{DEVICE}{id}"));
        [CORE.to_owned()]
            .into_iter()
            .chain(ram)
            .chain(devices)
            .collect()
    }

    /// Of all that were named, in any order; nothing if the core's or a memory channel is missing.
    pub(crate) fn of(named: impl IntoIterator<Item = (String, OwnedFd)>) -> Option<Self> {
        let (mut control, mut ram, mut states) = (None, BTreeMap::new(), BTreeMap::new());
        for (name, fd) in named {
            if name == CORE {
                control = Some(fd);
            } else if let Some(id) = name.strip_prefix(DEVICE) {
                states.insert(id.to_owned(), fd);
            } else {
                let number: usize = name.strip_prefix(RAM)?.parse().ok()?;
                ram.insert(number, fd);
            }
        }
        ram.keys().copied().eq(0..ram.len()).then_some(())?;
        Some(Self {
            control: control?,
            ram: ram.into_values().collect(),
            states,
        })
    }

    /// Both ends of connections within this host, by which no memory is sent.
    ///
    /// # Errors
    /// No socket is to be had.
    pub(crate) fn pairs<'a>(devices: impl Iterator<Item = &'a str>) -> io::Result<(Self, Self)> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for name in Self::names(0, devices) {
            let (our, their) = UnixStream::pair()?;
            ours.push((name.clone(), our.into()));
            theirs.push((name, their.into()));
        }
        let both = Self::of(ours).zip(Self::of(theirs));
        both.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    }
}

/// Where a machine comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// From another core.
    Core,
    /// From files.
    Files,
}

impl From {
    /// The core's word for it.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Core => "control",
            Self::Files => "snapshot",
        }
    }
}

/// What a core is handed to take a machine over.
#[derive(Debug)]
pub struct Incoming {
    /// Where it comes from.
    pub from: From,
    /// The way.
    pub ends: Ends,
    /// The memory that it has already.
    pub memory: Option<OwnedFd>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    #[test]
    fn names_say_what_each_is_for() {
        let names = Ends::names(12, ["a", "b"].into_iter());
        assert_eq!(names.len(), 15);
        let ends = Ends::of(names.into_iter().rev().map(|name| (name, fd()))).unwrap();
        assert_eq!(ends.ram.len(), 12);
        assert!(ends.states.keys().eq(["a", "b"]));
    }

    #[test]
    fn what_is_missing_or_strange_is_found() {
        for names in [&["ram0"][..], &["core", "ram1"], &["core", "x"], &[]] {
            let named = names.iter().map(|name| ((*name).to_owned(), fd()));
            assert!(Ends::of(named).is_none(), "{names:?}");
        }
        let (ours, theirs) = Ends::pairs(["d"].into_iter()).unwrap();
        assert!(ours.ram.is_empty() && theirs.states.contains_key("d"));
    }
}
