use super::*;

const OWN: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

fn limits() -> Limits {
    Limits {
        features: Features::all(),
        pairs: 4,
    }
}

fn after(command: &[u8]) -> Result<ControlState, CommandError> {
    ControlState::new(OWN).after(command, limits())
}

fn table(macs: &[[u8; 6]]) -> Vec<u8> {
    let mut bytes = u32::try_from(macs.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend(macs.iter().flatten());
    bytes
}

#[test]
fn every_command_changes_what_it_names() {
    let state = after(&[0, 0, 0]).unwrap();
    assert!(!state.filter.promiscuous);
    let modes: [fn(&RxFilter) -> bool; 6] = [
        |f| f.promiscuous,
        |f| f.all_multicast,
        |f| f.all_unicast,
        |f| f.no_multicast,
        |f| f.no_unicast,
        |f| f.no_broadcast,
    ];
    for (code, mode) in (0u8..).zip(modes) {
        assert!(mode(&after(&[0, code, 1]).unwrap().filter), "{code}");
        assert!(!mode(&after(&[0, code, 0]).unwrap().filter), "{code}");
    }
    assert_eq!(
        after(&[1, 1, 2, 9, 9, 9, 9, 9]).unwrap().filter.mac,
        MacAddress([2, 9, 9, 9, 9, 9])
    );
    let in_vlan = after(&[2, 0, 0x34, 0x02]).unwrap();
    assert!(in_vlan.filter.vlans.has(0x234));
    let out = in_vlan.after(&[2, 1, 0x34, 0x02], limits()).unwrap();
    assert!(!out.filter.vlans.has(0x234));
    assert_eq!(after(&[4, 0, 3, 0]).unwrap().active_pairs, 3);
    let told = ControlState {
        announce: true,
        ..ControlState::new(OWN)
    };
    assert!(!told.after(&[3, 0], limits()).unwrap().announce);
    let mut offloads = vec![5, 0];
    offloads.extend((Offloads::CSUM | Offloads::TSO4).bits().to_le_bytes());
    assert_eq!(
        after(&offloads).unwrap().offloads,
        Some(Offloads::CSUM | Offloads::TSO4)
    );
}

#[test]
fn mac_tables_are_taken_whole_or_count_as_all() {
    let mut command = vec![1, 0];
    command.extend(table(&[[2, 0, 0, 0, 0, 7]]));
    command.extend(table(&[[1, 0, 0, 0, 0, 7], [1, 0, 0, 0, 0, 8]]));
    let filter = after(&command).unwrap().filter;
    assert_eq!(filter.unicast.entries, [MacAddress([2, 0, 0, 0, 0, 7])]);
    assert_eq!(filter.multicast.entries.len(), 2);
    assert!(!filter.multicast.overflow);

    let mut command = vec![1, 0];
    command.extend(table(&[]));
    command.extend(table(&vec![[1, 0, 0, 0, 0, 7]; MAX_TABLE + 1]));
    let filter = after(&command).unwrap().filter;
    assert!(filter.multicast.overflow);
    assert!(filter.multicast.entries.is_empty());
}

#[test]
fn a_table_that_lies_about_its_length_is_refused() {
    for lie in [1u32, 2, u32::MAX, u32::MAX / 6, 0x2aaa_aaab] {
        let mut command = vec![1, 0];
        command.extend(lie.to_le_bytes());
        command.extend([0; 4]);
        assert_eq!(
            after(&command).unwrap_err(),
            CommandError::Data {
                class: 1,
                code: 0,
                len: 8
            },
            "{lie}"
        );
    }
    let mut trailing = vec![1, 0];
    trailing.extend(table(&[]));
    trailing.extend(table(&[]));
    assert!(after(&trailing).is_ok());
    trailing.push(0);
    assert!(after(&trailing).is_err());
}

#[test]
fn malformed_commands_are_refused() {
    for bad in [
        &[][..],
        &[0],
        &[0, 0],
        &[0, 0, 2],
        &[0, 0, 1, 1],
        &[0, 6, 1],
        &[1, 0],
        &[1, 0, 0, 0, 0],
        &[1, 1, 2, 0, 0, 0, 0],
        &[1, 1, 1, 0, 0, 0, 0, 1],
        &[1, 1, 0, 0, 0, 0, 0, 0],
        &[1, 2, 0],
        &[2, 0, 0],
        &[2, 0, 0, 0x10],
        &[2, 2, 0, 0],
        &[3, 0, 0],
        &[3, 1],
        &[4, 0, 0, 0],
        &[4, 0, 5, 0],
        &[4, 0, 1],
        &[4, 1, 1, 0],
        &[5, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        &[5, 0, 2, 0, 0, 0],
        &[6, 0],
        &[255, 255, 255],
    ] {
        assert!(after(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_command_without_its_feature_is_unknown() {
    for (command, feature) in [
        (&[0, 0, 1][..], Features::CTRL_RX),
        (&[0, 4, 1], Features::CTRL_RX_EXTRA),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], Features::CTRL_RX),
        (&[1, 1, 2, 0, 0, 0, 0, 1], Features::CTRL_MAC_ADDR),
        (&[2, 0, 1, 0], Features::CTRL_VLAN),
        (&[3, 0], Features::GUEST_ANNOUNCE),
        (&[4, 0, 1, 0], Features::MQ),
        (
            &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0],
            Features::CTRL_GUEST_OFFLOADS,
        ),
    ] {
        let state = ControlState::new(OWN);
        assert!(state.after(command, limits()).is_ok(), "{command:?}");
        let without = Limits {
            features: Features::all() - feature,
            ..limits()
        };
        assert_eq!(
            state.after(command, without).unwrap_err(),
            CommandError::Unknown {
                class: command[0],
                code: command[1]
            }
        );
    }
}

#[test]
fn offloads_stay_within_what_was_accepted() {
    let mut command = vec![5, 0];
    command.extend(Offloads::TSO4.bits().to_le_bytes());
    let narrow = Limits {
        features: Features::CTRL_GUEST_OFFLOADS | Features::GUEST_CSUM,
        ..limits()
    };
    assert!(ControlState::new(OWN).after(&command, narrow).is_err());

    let accepted = Features::GUEST_CSUM | Features::GUEST_TSO4;
    let mut state = ControlState::new(OWN);
    assert_eq!(
        state.effective_offloads(accepted),
        Offloads::CSUM | Offloads::TSO4
    );
    state.offloads = Some(Offloads::CSUM | Offloads::TSO6);
    assert_eq!(state.effective_offloads(accepted), Offloads::CSUM);
    state.offloads = Some(Offloads::empty());
    assert_eq!(state.effective_offloads(accepted), Offloads::empty());
}
