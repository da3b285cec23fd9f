//! Which packets the guest wants (virtio 1.3, sections 5.1.6.5.1 to 5.1.6.5.3).
//!
//! Until the driver says otherwise it gets everything: a driver without CTRL_RX never says
//! anything. A table that is longer than what is kept counts as "all of that kind".

use crate::mac::MacAddress;
use crate::packet::Lead;

/// Most addresses kept of each kind.
pub(crate) const MAX_TABLE: usize = 64;
/// Number of VLANs.
pub(crate) const VLANS: u16 = 4096;

const WORDS: usize = VLANS as usize / 64;

/// Addresses of one kind that the driver listens to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MacTable {
    /// At most [`MAX_TABLE`].
    pub(crate) entries: Vec<MacAddress>,
    /// There were more: every address of this kind counts.
    pub(crate) overflow: bool,
}

impl MacTable {
    fn has(&self, mac: MacAddress) -> bool {
        self.overflow || self.entries.contains(&mac)
    }
}

/// A set of VLANs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VlanSet([u64; WORDS]);

impl Default for VlanSet {
    fn default() -> Self {
        VlanSet([0; WORDS])
    }
}

impl VlanSet {
    /// Adds or removes `vlan`, which is less than [`VLANS`].
    pub(crate) fn set(&mut self, vlan: u16, member: bool) {
        let word = &mut self.0[usize::from(vlan / 64)];
        let bit = 1 << (vlan % 64);
        if member {
            *word |= bit;
        } else {
            *word &= !bit;
        }
    }

    /// Whether `vlan`, which is less than [`VLANS`], is in it.
    pub(crate) fn has(&self, vlan: u16) -> bool {
        self.0[usize::from(vlan / 64)] & (1 << (vlan % 64)) != 0
    }

    /// All of them, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (0..VLANS).filter(|vlan| self.has(*vlan))
    }
}

/// The receive filter, as the driver set it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RxFilter {
    /// Everything is wanted.
    pub(crate) promiscuous: bool,
    /// Every multicast packet is.
    pub(crate) all_multicast: bool,
    /// Every unicast packet is.
    pub(crate) all_unicast: bool,
    /// No multicast packet is, broadcast apart.
    pub(crate) no_multicast: bool,
    /// No unicast packet is.
    pub(crate) no_unicast: bool,
    /// No broadcast is.
    pub(crate) no_broadcast: bool,
    /// The card's own address.
    pub(crate) mac: MacAddress,
    /// More addresses of its own.
    pub(crate) unicast: MacTable,
    /// Groups that it belongs to.
    pub(crate) multicast: MacTable,
    /// Its VLANs. They count only when the driver accepted CTRL_VLAN.
    pub(crate) vlans: VlanSet,
}

impl RxFilter {
    /// The filter of a device that was just reset.
    pub(crate) fn new(mac: MacAddress) -> RxFilter {
        RxFilter {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            mac,
            unicast: MacTable::default(),
            multicast: MacTable::default(),
            vlans: VlanSet::default(),
        }
    }

    /// Whether the guest wants this packet.
    pub(crate) fn wants(&self, packet: &Lead<'_>, vlan_filter: bool) -> bool {
        if self.promiscuous {
            return true;
        }
        if vlan_filter && packet.vlan().is_some_and(|vlan| !self.vlans.has(vlan)) {
            return false;
        }
        let destination = packet.destination();
        if destination == MacAddress::BROADCAST {
            !self.no_broadcast
        } else if destination.is_multicast() {
            !self.no_multicast && (self.all_multicast || self.multicast.has(destination))
        } else {
            !self.no_unicast
                && (self.all_unicast || destination == self.mac || self.unicast.has(destination))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::HEADER_LEN;

    const OWN: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
    const OTHER: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);
    const GROUP: MacAddress = MacAddress([1, 0, 0x5e, 0, 0, 1]);

    fn quiet() -> RxFilter {
        RxFilter {
            promiscuous: false,
            ..RxFilter::new(OWN)
        }
    }

    fn wants(filter: &RxFilter, to: MacAddress, vlan: Option<u16>) -> bool {
        let mut bytes = vec![0; HEADER_LEN];
        bytes.extend(to.0);
        bytes.extend(OTHER.0);
        match vlan {
            Some(vlan) => {
                bytes.extend([0x81, 0]);
                bytes.extend(vlan.to_be_bytes());
            }
            None => bytes.extend([8, 0]),
        }
        filter.wants(&Lead::new(&mut bytes, HEADER_LEN).unwrap(), true)
    }

    #[test]
    fn everything_comes_until_the_driver_says_otherwise() {
        let filter = RxFilter::new(OWN);
        for to in [OWN, OTHER, GROUP, MacAddress::BROADCAST] {
            assert!(wants(&filter, to, Some(7)), "{to}");
        }
    }

    #[test]
    fn own_address_and_broadcast_come_and_others_do_not() {
        let filter = quiet();
        assert!(wants(&filter, OWN, None));
        assert!(wants(&filter, MacAddress::BROADCAST, None));
        assert!(!wants(&filter, OTHER, None));
        assert!(!wants(&filter, GROUP, None));
    }

    #[test]
    fn each_mode_does_what_it_says() {
        type Set = fn(&mut RxFilter);
        let cases: [(Set, MacAddress, bool); 7] = [
            (|f| f.all_unicast = true, OTHER, true),
            (|f| f.all_multicast = true, GROUP, true),
            (|f| f.no_unicast = true, OWN, false),
            (|f| f.no_broadcast = true, MacAddress::BROADCAST, false),
            (|f| f.unicast.entries.push(OTHER), OTHER, true),
            (|f| f.multicast.entries.push(GROUP), GROUP, true),
            (|f| f.multicast.overflow = true, GROUP, true),
        ];
        for (at, (set, to, wanted)) in cases.into_iter().enumerate() {
            let mut filter = quiet();
            set(&mut filter);
            assert_eq!(wants(&filter, to, None), wanted, "case {at}");
        }
        let filter = RxFilter {
            no_multicast: true,
            all_multicast: true,
            ..quiet()
        };
        assert!(!wants(&filter, GROUP, None));
        assert!(wants(&filter, MacAddress::BROADCAST, None));
    }

    #[test]
    fn only_its_own_vlans_come() {
        let mut filter = quiet();
        filter.vlans.set(4095, true);
        assert!(wants(&filter, OWN, Some(4095)));
        assert!(!wants(&filter, OWN, Some(7)));
        assert!(wants(&filter, OWN, None));
        assert_eq!(filter.vlans.iter().collect::<Vec<_>>(), [4095]);
        filter.vlans.set(4095, false);
        assert!(!wants(&filter, OWN, Some(4095)));
    }
}
