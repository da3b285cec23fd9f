//! How one value is written after a `key=`.

use super::Text;
use core::fmt;

/// A value with one spelling, the same for both sides.
pub trait Value: Sized {
    /// Reads what [`Value::write`] wrote.
    fn parse(text: &str) -> Option<Self>;
    /// Writes the value without spaces.
    ///
    /// # Errors
    /// Those of the writer.
    fn write(&self, f: &mut dyn fmt::Write) -> fmt::Result;
}

macro_rules! decimal {
    ($($type:ty),*) => { $(
        impl Value for $type {
            fn parse(text: &str) -> Option<Self> {
                text.parse().ok()
            }
            fn write(&self, f: &mut dyn fmt::Write) -> fmt::Result {
                write!(f, "{self}")
            }
        }
    )* };
}
decimal!(u16, u32, u64);

impl Value for bool {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "0" => Some(false),
            "1" => Some(true),
            _ => None,
        }
    }
    fn write(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        f.write_str(if *self { "1" } else { "0" })
    }
}

impl Value for Text {
    fn parse(text: &str) -> Option<Self> {
        Some(Text::new(text))
    }
    fn write(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        f.write_str(if self.as_str().is_empty() {
            "-"
        } else {
            self.as_str()
        })
    }
}

/// An IPv4 address, in network order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Ipv4(pub [u8; 4]);

impl Value for Ipv4 {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let mut address = [0; 4];
        for byte in &mut address {
            *byte = parts.next()?.parse().ok()?;
        }
        parts.next().is_none().then_some(Self(address))
    }
    fn write(&self, f: &mut dyn fmt::Write) -> fmt::Result {
        let [a, b, c, d] = self.0;
        write!(f, "{a}.{b}.{c}.{d}")
    }
}

macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
        pub enum $name { $($(#[$doc])* $variant),* }
        impl Value for $name {
            fn parse(text: &str) -> Option<Self> {
                match text { $($word => Some(Self::$variant),)* _ => None }
            }
            fn write(&self, f: &mut dyn fmt::Write) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),* })
            }
        }
    };
}

words! {
    /// What the guest does with its disks.
    BlkMode {
        /// Nothing; the devices are still set up as `activate` says.
        #[default]
        Off = "off",
        /// Reads one block of each disk and writes nothing.
        Read = "read",
        /// Writes, flushes, reads back and compares, once.
        Verify = "verify",
        /// As `Verify`, then writes and reads at random until told to stop, then reads all again.
        Loop = "loop",
        /// Sends requests that must fail, and checks that they do.
        Errors = "errors",
    }
}

words! {
    /// What the guest does with a memory balloon.
    BalloonMode {
        /// Nothing; it is not set up.
        #[default]
        Off = "off",
        /// Uses memory once; then gives as much of it as the host wants, and names the rest as free
        /// when it is asked.
        Follow = "follow",
        /// As `Follow`, and reports the memory as free first.
        Report = "report",
        /// As `Report`, with memory that keeps its poison while it is free, which is checked in the
        /// end.
        Poison = "poison",
        /// Everything that a driver may do, at random and as fast as it goes.
        Random = "random",
    }
}

words! {
    /// What the guest does with its network devices. It always answers ARP and pings.
    NetMode {
        /// Nothing; the devices are still set up as `activate` says.
        #[default]
        Off = "off",
        /// Pings the peer.
        Ping = "ping",
        /// Sends numbered packets to the peer's UDP echo service and checks what comes back.
        Udp = "udp",
        /// As `Udp`, until told to stop.
        Loop = "loop",
        /// Sends as fast as it can until told to stop.
        Flood = "flood",
        /// Answers and counts what arrives until told to stop.
        Count = "count",
    }
}

words! {
    /// Which devices are set up and started.
    Activate {
        /// Those that the work needs.
        #[default]
        Needed = "needed",
        /// Every device that the guest has a driver for, with all its queues.
        All = "all",
    }
}

words! {
    /// What a CPU does when nothing is to be done.
    Idle {
        /// Looks again at once; interrupts stay off.
        #[default]
        Poll = "poll",
        /// Halts until an interrupt. A stop of the machine that falls into a sleep of CPU 0 is then
        /// not seen as a gap.
        Halt = "halt",
        /// CPU 0 polls, so that it sees every gap; the others halt. One CPU alone polls.
        Mixed = "mixed",
    }
}
