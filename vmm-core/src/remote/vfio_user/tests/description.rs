//! Devices that no machine can have.

use vfio_user::{Area, DeviceFlags};

use super::super::interrupts::Interrupts;
use super::*;
use crate::pci::{CONFIG_SIZE, Header, Msix};

#[test]
fn what_cannot_be_given_to_a_machine_is_refused_with_the_reason() {
    let with = |change: fn(&mut Made)| {
        let mut made = Made::default();
        change(&mut made);
        made
    };
    let cases = [
        (
            with(|m| m.flags = DeviceFlags::RESET),
            "it is no PCI device",
        ),
        (
            with(|m| m.config_size = 128),
            "its configuration space has 128 bytes, 256 are needed",
        ),
        (
            with(|m| m.registers[0x0e] = 1),
            "its header is of type 1; only type 0 is a device's",
        ),
        (
            with(|m| m.bar0_size = 1 << 30),
            "its BAR 0 has 1073741824 bytes, at most 512 MiB are possible",
        ),
        (
            with(|m| (m.registers[0x40], m.registers[0x50]) = (9, 9)),
            "it has neither MSI-X nor MSI, and no other interrupts are possible",
        ),
        (
            with(|m| m.registers[0x06] = 0),
            "it has neither MSI-X nor MSI, and no other interrupts are possible",
        ),
        (
            with(|m| m.registers[0x34] = 0xfc),
            "it has neither MSI-X nor MSI, and no other interrupts are possible",
        ),
        (
            with(|m| m.vectors = 3),
            "it has 4 interrupt vectors, its process serves 3",
        ),
        (
            with(|m| m.registers[0x46] = 1),
            "its MSI-X table at 0x18000 is not within its BAR 2",
        ),
        (
            with(|m| m.registers[0x48] = 1),
            "its MSI-X pending bits at 0xc000 is not within its BAR 1",
        ),
        (
            with(|m| m.file_size = 0x7fff),
            "the file of its BAR 2 does not have all of it",
        ),
    ];
    for (made, why) in cases {
        let (_server, stream) = Server::start(made, &Log::default());
        let error = find(stream).err().unwrap();
        let said = crate::machine::chain(&error);
        assert_eq!(
            said,
            format!("device gpu0 cannot be given to the machine: {why}")
        );
    }
}

#[test]
fn a_list_of_capabilities_without_an_end_has_one() {
    let mut made = Made::default();
    made.registers[0x51] = MSIX;
    let (_server, stream) = Server::start(made, &Log::default());
    assert_eq!(
        find(stream).unwrap().description.shape.interrupts.vectors,
        4
    );
}

/// Starts and sizes, or starts and ends.
type Pages = [(u64, u64)];

#[test]
fn only_whole_pages_without_interrupts_are_mapped() {
    let cases: [(&Pages, &Pages); 4] = [
        (&[], &[(0, 0x8000), (0x9000, 0xc000), (0xd000, 0x1_0000)]),
        (&[(0, 0x8000)], &[(0, 0x8000)]),
        (&[(0x10, 0x1ff0), (0x7fff, 0x2000)], &[(0x1000, 0x2000)]),
        (&[(0x8000, 0x1000)], &[]),
    ];
    for (areas, mapped) in cases {
        let area = |&(offset, size): &(u64, u64)| Area { offset, size };
        let made = Made {
            areas: areas.iter().map(area).collect(),
            ..Made::default()
        };
        let (_server, stream) = Server::start(made, &Log::default());
        let shape = find(stream).unwrap().description.shape;
        let found: Vec<_> = shape.bars[1]
            .areas
            .iter()
            .map(|a| (a.start, a.end))
            .collect();
        assert_eq!(found, mapped, "{areas:x?}");
    }
}

#[test]
fn who_says_nothing_is_not_waited_for_for_ever() {
    let (_peer, stream) = UnixStream::pair().unwrap();
    let config = VfioUserConfig {
        deadline: Duration::from_millis(100),
        ..config()
    };
    let error = Found::connect(config, Endpoint::Connected(stream.into()))
        .err()
        .unwrap();
    let said = crate::machine::chain(&error);
    assert!(said.contains("waited 100 ms for "), "{said}");
}

#[test]
fn no_registers_panic() {
    let mut seed = 1_u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (seed >> 32).to_le_bytes()[0]
    };
    let mut understood = 0;
    for round in 0..2000 {
        let mut registers = [0; CONFIG_SIZE];
        registers.fill_with(&mut random);
        // One of them somewhere, or nothing is ever found.
        registers[0x06] |= 0x10;
        let at = registers[0x34] & 0xfc;
        registers[usize::from(at)] = if round % 2 == 0 { 0x11 } else { 0x05 };
        let Ok(interrupts) = Interrupts::of(&registers) else {
            continue;
        };
        understood += 1;
        let mut header = Header::showing(&registers);
        interrupts.begin(header.config_mut());
        let router = Arc::new(FakeRouter::default());
        let mut msix = Msix::one_to_one(router, interrupts.vectors.min(32)).unwrap();
        for offset in interrupts.registers() {
            header.config_mut().write(offset, &[random()]);
            interrupts.follow(header.config(), &mut msix).unwrap();
            assert!((1..=interrupts.vectors).contains(&interrupts.used(header.config())));
        }
    }
    assert!(understood > 100, "{understood}");
}
