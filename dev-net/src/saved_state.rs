//! What a network device takes along when it moves: what its driver set by commands.
//!
//! Not in it: the number of queue pairs, the tap, the MTU (they are configuration), and packets
//! that the tap or this process still holds for the guest: they belong to the old place in the
//! network, and a network loses such packets.

use device_kit::StateError;
use migration::schema::{Schema, SchemaError};
use serde::{Deserialize, Serialize};

use crate::control::ControlState;
use crate::features::Offloads;
use crate::filter::{MAX_TABLE, MacTable, RxFilter, VLANS, VlanSet};
use crate::mac::MacAddress;

/// Schema `net`, number 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NetState {
    /// Queue pairs in use.
    pub(crate) active_pairs: u16,
    /// The card's address, which the driver may have changed.
    pub(crate) mac: [u8; 6],
    /// Which packets the guest wants.
    pub(crate) receive: ReceiveState,
    /// Offloads that the driver chose, by the bits of the `GUEST_` features; none before it chose.
    pub(crate) offloads: Option<u64>,
    /// The driver was asked to announce itself and did not say yet that it did.
    pub(crate) announce_pending: bool,
}

/// The receive filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReceiveState {
    pub(crate) promiscuous: bool,
    pub(crate) all_multicast: bool,
    pub(crate) all_unicast: bool,
    pub(crate) no_multicast: bool,
    pub(crate) no_unicast: bool,
    pub(crate) no_broadcast: bool,
    pub(crate) unicast: TableState,
    pub(crate) multicast: TableState,
    /// In ascending order.
    pub(crate) vlans: Vec<u16>,
}

/// A MAC table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TableState {
    pub(crate) entries: Vec<[u8; 6]>,
    pub(crate) overflow: bool,
}

impl Schema for NetState {
    const KIND: &'static str = "net";
    const NUMBER: u32 = 1;

    fn from_old(number: u32, _payload: &[u8]) -> Result<Self, SchemaError> {
        Err(SchemaError::unknown::<Self>(number))
    }
}

impl From<&ControlState> for NetState {
    fn from(state: &ControlState) -> NetState {
        let filter = &state.filter;
        NetState {
            active_pairs: state.active_pairs,
            mac: filter.mac.0,
            receive: ReceiveState {
                promiscuous: filter.promiscuous,
                all_multicast: filter.all_multicast,
                all_unicast: filter.all_unicast,
                no_multicast: filter.no_multicast,
                no_unicast: filter.no_unicast,
                no_broadcast: filter.no_broadcast,
                unicast: (&filter.unicast).into(),
                multicast: (&filter.multicast).into(),
                vlans: filter.vlans.iter().collect(),
            },
            offloads: state.offloads.map(|offloads| offloads.bits()),
            announce_pending: state.announce,
        }
    }
}

impl From<&MacTable> for TableState {
    fn from(table: &MacTable) -> TableState {
        TableState {
            entries: table.entries.iter().map(|mac| mac.0).collect(),
            overflow: table.overflow,
        }
    }
}

impl NetState {
    /// The state for a device of `pairs` queue pairs, whose tap can do `possible`.
    ///
    /// # Errors
    /// What this device cannot be, or what no device ever was.
    pub(crate) fn check(self, pairs: u16, possible: Offloads) -> Result<ControlState, StateError> {
        if !(1..=pairs).contains(&self.active_pairs) {
            return Err(StateError(format!(
                "{} queue pairs are in use, this device has {pairs}",
                self.active_pairs
            )));
        }
        let mac = MacAddress(self.mac);
        if !mac.is_station() {
            return Err(StateError(format!(
                "{mac} is not an address that a card can have"
            )));
        }
        let offloads = self.offloads.map(|bits| {
            Offloads::from_bits(bits)
                .filter(|offloads| possible.contains(*offloads))
                .ok_or_else(|| {
                    let can = possible.bits();
                    StateError(format!(
                        "offloads {bits:#x} are in use, the tap can do {can:#x}"
                    ))
                })
        });
        let receive = self.receive;
        Ok(ControlState {
            active_pairs: self.active_pairs,
            filter: RxFilter {
                promiscuous: receive.promiscuous,
                all_multicast: receive.all_multicast,
                all_unicast: receive.all_unicast,
                no_multicast: receive.no_multicast,
                no_unicast: receive.no_unicast,
                no_broadcast: receive.no_broadcast,
                mac,
                unicast: receive.unicast.check("unicast")?,
                multicast: receive.multicast.check("multicast")?,
                vlans: vlans(&receive.vlans)?,
            },
            offloads: offloads.transpose()?,
            announce: self.announce_pending,
        })
    }
}

impl TableState {
    fn check(self, kind: &str) -> Result<MacTable, StateError> {
        if self.entries.len() > MAX_TABLE {
            return Err(StateError(format!(
                "{} {kind} addresses, a device keeps at most {MAX_TABLE}",
                self.entries.len()
            )));
        }
        Ok(MacTable {
            entries: self.entries.into_iter().map(MacAddress).collect(),
            overflow: self.overflow,
        })
    }
}

fn vlans(list: &[u16]) -> Result<VlanSet, StateError> {
    if !list.is_sorted_by(|a, b| a < b) {
        return Err(StateError("VLANs are not in ascending order".into()));
    }
    let mut vlans = VlanSet::default();
    for vlan in list {
        if *vlan >= VLANS {
            return Err(StateError(format!("VLAN {vlan} does not exist")));
        }
        vlans.set(*vlan, true);
    }
    Ok(vlans)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used() -> ControlState {
        let mut state = ControlState::new(MacAddress([2, 0, 0, 0, 0, 1]));
        state.active_pairs = 3;
        state.announce = true;
        state.offloads = Some(Offloads::CSUM | Offloads::TSO6);
        let filter = &mut state.filter;
        filter.promiscuous = false;
        filter.no_broadcast = true;
        filter.unicast.entries = vec![MacAddress([2, 0, 0, 0, 0, 2])];
        filter.multicast.overflow = true;
        filter.vlans.set(0, true);
        filter.vlans.set(4095, true);
        state
    }

    #[test]
    fn a_state_goes_there_and_back() {
        let state = used();
        let bytes = NetState::from(&state).encode().unwrap();
        let loaded = NetState::decode(NetState::NUMBER, &bytes).unwrap();
        assert_eq!(loaded.check(3, Offloads::all()).unwrap(), state);
    }

    #[test]
    fn what_this_device_cannot_be_is_refused() {
        type Spoil = fn(&mut NetState);
        let spoilers: [(Spoil, &str); 10] = [
            (|s| s.active_pairs = 0, "0 queue pairs"),
            (|s| s.active_pairs = 5, "5 queue pairs"),
            (|s| s.mac = [1, 0, 0, 0, 0, 1], "01:00:00:00:00:01"),
            (|s| s.mac = [0; 6], "00:00:00:00:00:00"),
            (|s| s.offloads = Some(1), "offloads 0x1"),
            (|s| s.offloads = Some(u64::MAX), "offloads 0xffff"),
            (
                |s| s.receive.unicast.entries = vec![[0; 6]; MAX_TABLE + 1],
                "65 unicast",
            ),
            (
                |s| s.receive.multicast.entries = vec![[0; 6]; 10_000],
                "10000 multicast",
            ),
            (|s| s.receive.vlans = vec![4096], "VLAN 4096"),
            (|s| s.receive.vlans = vec![7, 7], "ascending"),
        ];
        for (spoil, word) in spoilers {
            let mut state = NetState::from(&used());
            spoil(&mut state);
            let error = state.check(4, Offloads::all()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let error = NetState::from(&used())
            .check(4, Offloads::CSUM)
            .unwrap_err()
            .to_string();
        assert_eq!(error, "offloads 0x102 are in use, the tap can do 0x2");
    }

    #[test]
    fn bytes_that_are_no_state_are_refused() {
        let bytes = NetState::from(&used()).encode().unwrap();
        for len in 0..bytes.len() {
            assert!(NetState::decode(1, &bytes[..len]).is_err(), "{len}");
        }
        assert!(NetState::decode(2, &bytes).is_err());
        assert!(NetState::decode(1, &[0xdf, 0xff, 0xff, 0xff, 0xff]).is_err());
    }
}
