//! Values of options: sizes, devices, keys.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Why a value is impossible, with what to give instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadValue(String);

fn bad(text: impl Into<String>) -> BadValue {
    BadValue(text.into())
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &text[digits.len()..] {
            "" => 0,
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            unit => return Err(bad(format!("{unit} is no unit: give K, M, G or T"))),
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| bad(format!("{digits:?} is no whole number: give one as 1536M")))?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| bad("this is more than there can be"))
    }
}

impl fmt::Display for Size {
    /// The largest unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
        for (shift, unit) in units {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A short time, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Milliseconds(pub u64);

impl FromStr for Milliseconds {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "ms" => 1,
            "s" => 1000,
            unit => return Err(bad(format!("{unit:?} is no unit: give ms or s, as 20ms"))),
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| bad(format!("{digits:?} is no number")))?;
        let time = number.checked_mul(unit).filter(|&time| time > 0);
        time.map(Self).ok_or_else(|| bad("give at least 1ms"))
    }
}

/// Size of huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum HugePages {
    /// 2 MiB
    #[value(name = "2M")]
    Size2M,
    /// 1 GiB
    #[value(name = "1G")]
    Size1G,
}

impl HugePages {
    /// Its word in a definition.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Size2M => "2M",
            Self::Size1G => "1G",
        }
    }
}

/// A disk: `IMAGE[,read-only][,queues=N][,serial=TEXT][,id=NAME]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    pub path: PathBuf,
    pub read_only: bool,
    pub queues: Option<u16>,
    pub serial: Option<String>,
    pub id: Option<String>,
}

impl FromStr for Disk {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (path, settings) = head(text);
        if path.is_empty() {
            return Err(bad("give the path of an image"));
        }
        let mut disk = Self {
            path: path.into(),
            ..Self::default()
        };
        for (key, value) in settings {
            match (key, value) {
                ("read-only", None) => disk.read_only = true,
                ("queues", Some(value)) => disk.queues = Some(number(key, value)?),
                ("serial", Some(value)) => disk.serial = Some(value.into()),
                ("id", Some(value)) => disk.id = Some(value.into()),
                _ => {
                    return Err(unknown(
                        key,
                        "a disk",
                        "read-only, queues=N, serial=TEXT, id=NAME; \
                         an image with a comma in its path goes into a definition file",
                    ));
                }
            }
        }
        Ok(disk)
    }
}

/// A network card: `tap:NAME[,mac=MAC][,queue-pairs=N][,mtu=N][,id=NAME]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Net {
    pub tap: String,
    pub mac: Option<String>,
    pub queue_pairs: Option<u16>,
    pub mtu: Option<u16>,
    pub id: Option<String>,
}

impl FromStr for Net {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (backing, settings) = head(text);
        let tap = backing.strip_prefix("tap:").filter(|name| !name.is_empty());
        let Some(tap) = tap else {
            return Err(bad(format!("{backing:?} is no network: give tap:NAME")));
        };
        let mut net = Self {
            tap: tap.into(),
            ..Self::default()
        };
        for (key, value) in settings {
            match (key, value) {
                ("mac", Some(value)) => net.mac = Some(value.into()),
                ("queue-pairs", Some(value)) => net.queue_pairs = Some(number(key, value)?),
                ("mtu", Some(value)) => net.mtu = Some(number(key, value)?),
                ("id", Some(value)) => net.id = Some(value.into()),
                _ => {
                    return Err(unknown(
                        key,
                        "a network card",
                        "mac=MAC, queue-pairs=N, mtu=N, id=NAME",
                    ));
                }
            }
        }
        Ok(net)
    }
}

/// A device of another back-end: `TYPE,socket=PATH[,queues=N][,tag=TAG][,id=NAME]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VhostUser {
    pub kind: String,
    pub socket: PathBuf,
    pub queues: Option<u16>,
    pub tag: Option<String>,
    pub id: Option<String>,
}

impl FromStr for VhostUser {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (kind, settings) = head(text);
        let mut device = Self {
            kind: kind.into(),
            ..Self::default()
        };
        for (key, value) in settings {
            match (key, value) {
                ("socket", Some(value)) => device.socket = value.into(),
                ("queues", Some(value)) => device.queues = Some(number(key, value)?),
                ("tag", Some(value)) => device.tag = Some(value.into()),
                ("id", Some(value)) => device.id = Some(value.into()),
                _ => {
                    return Err(unknown(
                        key,
                        "a vhost-user device",
                        "socket=PATH, queues=N, tag=TAG, id=NAME",
                    ));
                }
            }
        }
        if kind.is_empty() || device.socket.as_os_str().is_empty() {
            return Err(bad(
                "give TYPE,socket=PATH, as fs,socket=/run/virtiofsd.sock,tag=share",
            ));
        }
        Ok(device)
    }
}

/// A PCI device: `host=ADDRESS|synthetic|socket=PATH[,id=NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vfio {
    pub source: VfioSource,
    pub id: Option<String>,
}

/// Whose a PCI device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VfioSource {
    Host(String),
    Synthetic,
    Socket(PathBuf),
}

impl FromStr for Vfio {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let (source, settings) = head(text);
        let source = match source.split_once('=') {
            Some(("host", address)) if !address.is_empty() => VfioSource::Host(address.into()),
            Some(("socket", path)) if !path.is_empty() => VfioSource::Socket(path.into()),
            None if source == "synthetic" => VfioSource::Synthetic,
            _ => {
                return Err(bad(format!(
                    "{source:?} is no PCI device: give host=0000:01:00.0, socket=PATH or synthetic"
                )));
            }
        };
        let mut device = Self { source, id: None };
        for (key, value) in settings {
            match (key, value) {
                ("id", Some(value)) => device.id = Some(value.into()),
                _ => return Err(unknown(key, "a PCI device", "id=NAME")),
            }
        }
        Ok(device)
    }
}

/// A key that leaves the console: a character, or `^` and a letter for Ctrl with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Escape(pub u8);

impl FromStr for Escape {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text.as_bytes() {
            [b'^', key] if (b'@'..=b'_').contains(&key.to_ascii_uppercase()) => {
                Ok(Self(key.to_ascii_uppercase() & 0x1f))
            }
            [key] if key.is_ascii_graphic() => Ok(Self(*key)),
            _ => Err(bad("give a character, or ^ and a character, as ^] or ^A")),
        }
    }
}

impl fmt::Display for Escape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            control @ 0..0x20 => write!(f, "^{}", char::from(control | 0x40)),
            key => write!(f, "{}", char::from(key)),
        }
    }
}

/// Seconds between two looks.
pub fn interval(text: &str) -> Result<f64, BadValue> {
    text.parse()
        .ok()
        .filter(|seconds| (0.1..=3600.0).contains(seconds))
        .ok_or_else(|| bad("give seconds from 0.1 to 3600"))
}

/// The first word, and the settings that follow it.
fn head(text: &str) -> (&str, impl Iterator<Item = (&str, Option<&str>)>) {
    let mut words = text.split(',');
    let first = words.next().unwrap_or_default();
    let settings = words.map(|word| match word.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (word, None),
    });
    (first, settings)
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, BadValue> {
    value
        .parse()
        .map_err(|_| bad(format!("{key}={value}: give a number that is possible")))
}

fn unknown(key: &str, of: &str, there_are: &str) -> BadValue {
    bad(format!(
        "{key:?} is no setting of {of}: there are {there_are}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_times_have_units() {
        assert_eq!("20ms".parse(), Ok(Milliseconds(20)));
        assert_eq!("2s".parse(), Ok(Milliseconds(2000)));
        for text in ["20", "ms", "0ms", "1h", "-1s", "99999999999999999999s", ""] {
            assert!(text.parse::<Milliseconds>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_units_both_ways() {
        for (text, bytes) in [
            ("512M", 512 << 20),
            ("1GiB", 1 << 30),
            ("3", 3),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        assert_eq!(Size(1 << 30).to_string(), "1G");
        assert_eq!(Size(1536 << 20).to_string(), "1536M");
        assert_eq!(Size(1000).to_string(), "1000");
        assert_eq!(Size(0).to_string(), "0");
        for text in ["", "M", "1X", "-1", "99999999999T"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn disks() {
        let disk: Disk = "/a b.img,read-only,queues=4,serial=x=y,id=root"
            .parse()
            .unwrap();
        assert_eq!(disk.path, PathBuf::from("/a b.img"));
        assert!(disk.read_only);
        assert_eq!(disk.queues, Some(4));
        assert_eq!(disk.serial.as_deref(), Some("x=y"));
        assert_eq!(disk.id.as_deref(), Some("root"));
        for text in [
            "",
            "a,readonly",
            "a,read-only=1",
            "a,queues",
            "a,queues=-1",
            "a,",
        ] {
            assert!(text.parse::<Disk>().is_err(), "{text}");
        }
    }

    #[test]
    fn nets() {
        let net: Net = "tap:t0,mac=52:54:00:12:34:56,queue-pairs=2,mtu=9000,id=lan"
            .parse()
            .unwrap();
        assert_eq!(net.tap, "t0");
        assert_eq!(net.mac.as_deref(), Some("52:54:00:12:34:56"));
        assert_eq!((net.queue_pairs, net.mtu), (Some(2), Some(9000)));
        for text in ["t0", "tap:", "user", "tap:t0,mtu=70000", "tap:t0,bridge=b"] {
            assert!(text.parse::<Net>().is_err(), "{text}");
        }
    }

    #[test]
    fn pci_devices() {
        let device: Vfio = "host=01:00.0,id=card".parse().unwrap();
        assert_eq!(device.source, VfioSource::Host("01:00.0".into()));
        assert_eq!(device.id.as_deref(), Some("card"));
        let device: Vfio = "synthetic".parse().unwrap();
        assert_eq!(device.source, VfioSource::Synthetic);
        for text in [
            "",
            "host",
            "host=",
            "synthetic=1",
            "pci=1",
            "synthetic,fast",
        ] {
            assert!(text.parse::<Vfio>().is_err(), "{text}");
        }
    }

    #[test]
    fn vhost_user_devices() {
        let device: VhostUser = "fs,socket=/s,tag=share,queues=2".parse().unwrap();
        assert_eq!(device.kind, "fs");
        assert_eq!(device.socket, PathBuf::from("/s"));
        assert_eq!(device.tag.as_deref(), Some("share"));
        for text in ["fs", "fs,socket=", ",socket=/s", "fs,socket=/s,fd=3"] {
            assert!(text.parse::<VhostUser>().is_err(), "{text}");
        }
    }

    #[test]
    fn escapes() {
        assert_eq!("^]".parse(), Ok(Escape(0x1d)));
        assert_eq!("^a".parse(), Ok(Escape(1)));
        assert_eq!("~".parse(), Ok(Escape(b'~')));
        assert_eq!(Escape(0x1d).to_string(), "^]");
        for text in ["", "^", "ab", "^1"] {
            // A single caret is a key like others.
            assert_eq!(text.parse::<Escape>().is_ok(), text == "^", "{text}");
        }
    }
}
