//! Options of the command line.

use std::os::fd::RawFd;

use clap::Args;
use device_kit::OptionError;

use crate::mac::MacAddress;
use crate::tap::{MAX_PAIRS, Tap, TapError};

/// Options of a network device.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Tap interface that it is connected to; made, for as long as it runs, when there is none and
    /// this user may
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "tap_fd",
        required_unless_present = "tap_fd"
    )]
    tap: Option<String>,

    /// Open queues of one tap instead, one for each queue pair
    #[arg(long, value_name = "FD[,FD…]", value_delimiter = ',')]
    tap_fd: Vec<RawFd>,

    /// Queue pairs; with --tap-fd as many as there are descriptors
    #[arg(long, value_name = "N")]
    queue_pairs: Option<u16>,

    /// MAC address of the guest's card; random when not given
    #[arg(long, value_name = "MAC")]
    mac: Option<String>,

    /// Largest packet that the guest is told to send, in bytes
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u16>,
}

/// Smallest MTU that a driver accepts (virtio 1.3, section 5.1.4.1).
const MIN_MTU: u16 = 68;

/// What a device is, from its options.
#[derive(Debug)]
pub(crate) struct NetConfig {
    /// The tap.
    pub(crate) tap: Tap,
    /// Address of the guest's card.
    pub(crate) mac: MacAddress,
    /// MTU in bytes, when the guest is told one.
    pub(crate) mtu: Option<u16>,
}

impl NetConfig {
    /// Checks the options and opens the tap.
    pub(crate) fn open(options: Options) -> Result<NetConfig, OptionError> {
        let mtu = options.mtu;
        if let Some(small) = mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(bad(
                "--mtu",
                small,
                format!("too small; an MTU is {MIN_MTU} to {} bytes", u16::MAX),
            ));
        }
        let mac = match options.mac {
            Some(text) => text.parse().map_err(|error| bad("--mac", text, error))?,
            None => MacAddress::random().map_err(|error| {
                let problem = format!("cannot be made up ({error}); name one");
                bad("--mac", "", problem)
            })?,
        };
        if let Some(wrong) = options
            .queue_pairs
            .filter(|pairs| !(1..=MAX_PAIRS).contains(pairs))
        {
            return Err(bad(
                "--queue-pairs",
                wrong,
                format!("a device has 1 to {MAX_PAIRS} queue pairs"),
            ));
        }
        let tap = match options.tap {
            Some(name) => Tap::open(&name, options.queue_pairs.unwrap_or(1), mtu)
                .map_err(|error| bad("--tap", name, error))?,
            None => adopt(&options.tap_fd, options.queue_pairs)?,
        };
        Ok(NetConfig { tap, mac, mtu })
    }
}

fn adopt(fds: &[RawFd], pairs: Option<u16>) -> Result<Tap, OptionError> {
    if let Some(pairs) = pairs.filter(|pairs| usize::from(*pairs) != fds.len()) {
        return Err(bad(
            "--queue-pairs",
            pairs,
            format!(
                "--tap-fd names {} queues; name one for each pair",
                fds.len()
            ),
        ));
    }
    let list = || {
        fds.iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(",")
    };
    Tap::adopt(fds).map_err(|error: TapError| bad("--tap-fd", list(), error))
}

fn bad(option: &'static str, value: impl ToString, problem: impl ToString) -> OptionError {
    OptionError {
        option,
        value: value.to_string(),
        problem: problem.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        options: Options,
    }

    fn options(line: &str) -> Result<Options, clap::Error> {
        Program::try_parse_from(format!("net {line}").split_whitespace()).map(|p| p.options)
    }

    #[test]
    fn a_tap_is_named_or_handed_over() {
        assert!(options("").is_err());
        assert!(options("--tap vm0 --tap-fd 3").is_err());
        assert_eq!(options("--tap-fd 3,4").unwrap().tap_fd, [3, 4]);
        assert_eq!(options("--tap vm0").unwrap().tap.as_deref(), Some("vm0"));
    }

    #[test]
    fn impossible_values_are_named_with_what_is_possible() {
        for (line, expected) in [
            (
                "--tap vm0 --mtu 67",
                "--mtu 67: too small; an MTU is 68 to 65535 bytes",
            ),
            (
                "--tap vm0 --queue-pairs 33",
                "--queue-pairs 33: a device has 1 to 32 queue pairs",
            ),
            (
                "--tap vm0 --queue-pairs 0",
                "--queue-pairs 0: a device has 1 to 32 queue pairs",
            ),
            (
                "--tap-fd 8,9 --queue-pairs 4",
                "--queue-pairs 4: --tap-fd names 2 queues; name one for each pair",
            ),
            (
                "--tap vm0 --mac 52:54:00:12:34",
                "--mac 52:54:00:12:34: not a MAC address; write six bytes in hexadecimal, as in \
                 52:54:00:12:34:56",
            ),
            (
                "--tap-fd 9999",
                "--tap-fd 9999: descriptor 9999 is not open in this process, or is a standard \
                 stream; hand over open tap queues",
            ),
        ] {
            let error = NetConfig::open(options(line).unwrap()).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}
