//! Commands of the control queue (virtio 1.3, section 5.1.6.5), and the state that they make.
//!
//! A command is a class, a code and data; it is carried out whole or refused whole. Commands are
//! refused whose feature was not accepted. Nothing here touches the tap: the caller applies the
//! new state to it before it takes the state over.

use thiserror::Error;

use crate::features::{Features, Offloads};
use crate::filter::{MAX_TABLE, MacTable, RxFilter, VLANS};
use crate::mac::MacAddress;

/// Most bytes of a command that are looked at: both MAC tables with 5400 addresses each.
pub(crate) const MAX_COMMAND: usize = 65_536;

/// The answer to a command.
pub(crate) const OK: u8 = 0;
/// The answer to a command that was refused.
pub(crate) const ERR: u8 = 1;

mod class {
    pub(super) const RX: u8 = 0;
    pub(super) const MAC: u8 = 1;
    pub(super) const VLAN: u8 = 2;
    pub(super) const ANNOUNCE: u8 = 3;
    pub(super) const MQ: u8 = 4;
    pub(super) const GUEST_OFFLOADS: u8 = 5;
}

/// A command that was refused.
#[derive(Debug, PartialEq, Eq, Error)]
pub(crate) enum CommandError {
    /// Not even a class and a code, or more than is looked at.
    #[error("command of {len} bytes is not between 2 and {MAX_COMMAND} bytes")]
    Size {
        /// Its bytes.
        len: usize,
    },
    /// Unknown, or of a feature that was not accepted.
    #[error("command {code} of class {class} is unknown or its feature was not accepted")]
    Unknown {
        /// Its class.
        class: u8,
        /// Its code.
        code: u8,
    },
    /// Data of the wrong length.
    #[error("command {code} of class {class} has {len} bytes of data, which do not fit it")]
    Data {
        /// Its class.
        class: u8,
        /// Its code.
        code: u8,
        /// Bytes of data.
        len: usize,
    },
    /// A value that cannot be.
    #[error("{what} {value} is not possible")]
    Value {
        /// What it is.
        what: &'static str,
        /// The value.
        value: u64,
    },
    /// A MAC address that no card can have.
    #[error("{0} is not an address that a card can have")]
    Mac(MacAddress),
}

/// What the driver set by commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControlState {
    /// Queue pairs that are in use.
    pub(crate) active_pairs: u16,
    /// Which packets the guest wants.
    pub(crate) filter: RxFilter,
    /// The offloads that the driver chose; before it did, those that it accepted.
    pub(crate) offloads: Option<Offloads>,
    /// The driver is asked to announce itself, and has not said yet that it did.
    pub(crate) announce: bool,
}

/// What bounds the commands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The features that were accepted.
    pub(crate) features: Features,
    /// Queue pairs of the device.
    pub(crate) pairs: u16,
}

impl ControlState {
    /// The state of a device that was just reset.
    pub(crate) fn new(mac: MacAddress) -> ControlState {
        ControlState {
            active_pairs: 1,
            filter: RxFilter::new(mac),
            offloads: None,
            announce: false,
        }
    }

    /// The offloads in force for a driver that accepted `features`.
    pub(crate) fn effective_offloads(&self, features: Features) -> Offloads {
        let accepted = Offloads::accepted(features);
        (self.offloads.unwrap_or(accepted) & accepted).consistent()
    }

    /// The state after `command`. An error leaves everything as it is.
    pub(crate) fn after(&self, command: &[u8], limits: Limits) -> Result<Self, CommandError> {
        let [class, code, data @ ..] = command else {
            return Err(CommandError::Size { len: command.len() });
        };
        let command = Command {
            class: *class,
            code: *code,
            data,
        };
        let mut next = self.clone();
        next.carry_out(command, limits)?;
        Ok(next)
    }

    fn carry_out(&mut self, command: Command<'_>, limits: Limits) -> Result<(), CommandError> {
        let needs = |feature| {
            if limits.features.contains(feature) {
                Ok(())
            } else {
                Err(command.unknown())
            }
        };
        match (command.class, command.code) {
            (class::RX, 0..=1) => {
                needs(Features::CTRL_RX)?;
                self.set_mode(command)
            }
            (class::RX, 2..=5) => {
                needs(Features::CTRL_RX_EXTRA)?;
                self.set_mode(command)
            }
            (class::MAC, 0) => {
                needs(Features::CTRL_RX)?;
                self.set_tables(command)
            }
            (class::MAC, 1) => {
                needs(Features::CTRL_MAC_ADDR)?;
                let mac = MacAddress(command.exactly()?);
                if !mac.is_station() {
                    return Err(CommandError::Mac(mac));
                }
                self.filter.mac = mac;
                Ok(())
            }
            (class::VLAN, code @ 0..=1) => {
                needs(Features::CTRL_VLAN)?;
                let vlan = u16::from_le_bytes(command.exactly()?);
                if vlan >= VLANS {
                    return Err(value("VLAN", vlan));
                }
                self.filter.vlans.set(vlan, code == 0);
                Ok(())
            }
            (class::ANNOUNCE, 0) => {
                needs(Features::GUEST_ANNOUNCE)?;
                let [] = command.exactly()?;
                self.announce = false;
                Ok(())
            }
            (class::MQ, 0) => {
                needs(Features::MQ)?;
                let pairs = u16::from_le_bytes(command.exactly()?);
                if !(1..=limits.pairs).contains(&pairs) {
                    return Err(value("number of queue pairs", pairs));
                }
                self.active_pairs = pairs;
                Ok(())
            }
            (class::GUEST_OFFLOADS, 0) => {
                needs(Features::CTRL_GUEST_OFFLOADS)?;
                let bits = u64::from_le_bytes(command.exactly()?);
                let wanted = Offloads::from_bits(bits)
                    .filter(|wanted| Offloads::accepted(limits.features).contains(*wanted))
                    .ok_or(value("set of offloads", bits))?;
                self.offloads = Some(wanted);
                Ok(())
            }
            _ => Err(command.unknown()),
        }
    }

    fn set_mode(&mut self, command: Command<'_>) -> Result<(), CommandError> {
        let on = match command.exactly()? {
            [0] => false,
            [1] => true,
            [other] => return Err(value("receive mode", other)),
        };
        let filter = &mut self.filter;
        *match command.code {
            0 => &mut filter.promiscuous,
            1 => &mut filter.all_multicast,
            2 => &mut filter.all_unicast,
            3 => &mut filter.no_multicast,
            4 => &mut filter.no_unicast,
            5 => &mut filter.no_broadcast,
            _ => return Err(command.unknown()),
        } = on;
        Ok(())
    }

    fn set_tables(&mut self, command: Command<'_>) -> Result<(), CommandError> {
        let bad = || command.bad_data();
        let (unicast, rest) = take_table(command.data).ok_or_else(bad)?;
        let (multicast, rest) = take_table(rest).ok_or_else(bad)?;
        if !rest.is_empty() {
            return Err(bad());
        }
        self.filter.unicast = unicast;
        self.filter.multicast = multicast;
        Ok(())
    }
}

/// Takes `struct virtio_net_ctrl_mac` from the start of `data`.
fn take_table(data: &[u8]) -> Option<(MacTable, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (entries, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let overflow = count > MAX_TABLE;
    let (macs, _) = entries.as_chunks::<6>();
    let kept = if overflow { &[] } else { macs };
    let table = MacTable {
        entries: kept.iter().copied().map(MacAddress).collect(),
        overflow,
    };
    Some((table, rest))
}

fn value(what: &'static str, value: impl Into<u64>) -> CommandError {
    CommandError::Value {
        what,
        value: value.into(),
    }
}

#[derive(Clone, Copy)]
struct Command<'a> {
    class: u8,
    code: u8,
    data: &'a [u8],
}

impl Command<'_> {
    fn exactly<const N: usize>(self) -> Result<[u8; N], CommandError> {
        self.data.try_into().map_err(|_| self.bad_data())
    }

    fn unknown(self) -> CommandError {
        CommandError::Unknown {
            class: self.class,
            code: self.code,
        }
    }

    fn bad_data(self) -> CommandError {
        CommandError::Data {
            class: self.class,
            code: self.code,
            len: self.data.len(),
        }
    }
}

#[cfg(test)]
mod tests;
