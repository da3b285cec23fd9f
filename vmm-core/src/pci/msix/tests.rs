#![expect(clippy::cast_possible_truncation, reason = "values made to be cut off")]

use super::super::testing::FakeRouter;
use super::*;

const ENABLE: u16 = CONTROL_ENABLE;

fn msix(vectors: u16, sources: usize) -> (Msix, Arc<FakeRouter>) {
    let router = Arc::new(FakeRouter::default());
    let msix = Msix::new(router.clone(), vectors, sources).unwrap();
    (msix, router)
}

/// What a driver does for a vector: address, data, unmask.
fn program(msix: &mut Msix, vector: u64, data: u32) {
    let at = vector * ENTRY_SIZE;
    msix.write_table(at, &0xfee0_0000_u64.to_le_bytes())
        .unwrap();
    msix.write_table(at + 8, &data.to_le_bytes()).unwrap();
    msix.write_table(at + 12, &0u32.to_le_bytes()).unwrap();
}

fn pending(msix: &Msix) -> u64 {
    let mut data = [0; 8];
    msix.read_pending(0, &mut data).unwrap();
    u64::from_le_bytes(data)
}

#[test]
fn a_signal_reaches_its_vector() {
    let (mut msix, router) = msix(3, 3);
    program(&mut msix, 1, 0x41);
    msix.set_vector(SourceIndex(2), 1).unwrap();
    let event = msix.event(SourceIndex(2)).unwrap();
    event.write(1).unwrap();
    assert!(router.fired().is_empty(), "disabled");
    msix.set_control(ENABLE).unwrap();
    assert_eq!(router.fired(), [0x41], "what waited fires");
    event.write(1).unwrap();
    assert_eq!(router.fired(), [0x41]);
    assert_eq!(pending(&msix), 0);
}

#[test]
fn a_masked_vector_shows_its_pending_bit_and_fires_when_unmasked() {
    let (mut msix, router) = msix(40, 2);
    msix.set_control(ENABLE).unwrap();
    program(&mut msix, 35, 7);
    msix.set_vector(SourceIndex(0), 35).unwrap();
    let event = msix.event(SourceIndex(0)).unwrap();
    msix.write_table(35 * 16 + 12, &1u32.to_le_bytes()).unwrap();
    event.write(1).unwrap();
    assert_eq!(pending(&msix), 1 << 35);
    assert_eq!(pending(&msix), 1 << 35, "reading leaves it");
    assert!(router.fired().is_empty());
    program(&mut msix, 35, 8);
    assert_eq!(pending(&msix), 0);
    assert_eq!(router.fired(), [8], "through the new message");
}

#[test]
fn the_function_mask_holds_everything_back() {
    let (mut msix, router) = msix(4, 4);
    for v in 0..4 {
        program(&mut msix, v, v as u32);
        msix.set_vector(SourceIndex(v as usize), v as u16).unwrap();
    }
    msix.set_control(ENABLE | CONTROL_FUNCTION_MASK).unwrap();
    for v in 0..4 {
        msix.event(SourceIndex(v)).unwrap().write(1).unwrap();
    }
    assert_eq!((pending(&msix), router.attached()), (0xf, 0));
    msix.set_control(ENABLE).unwrap();
    assert_eq!(router.fired(), [0, 1, 2, 3]);
    assert_eq!(router.route_calls(), 1, "one batch for all");
}

#[test]
fn sources_share_a_vector() {
    let (mut msix, router) = msix(1, 3);
    msix.set_control(ENABLE).unwrap();
    program(&mut msix, 0, 9);
    for s in 0..3 {
        msix.set_vector(SourceIndex(s), 0).unwrap();
    }
    msix.event(SourceIndex(0)).unwrap().write(1).unwrap();
    msix.event(SourceIndex(2)).unwrap().write(1).unwrap();
    assert_eq!(router.fired(), [9, 9]);
    msix.write_table(12, &1u32.to_le_bytes()).unwrap();
    assert_eq!(router.attached(), 0);
    msix.event(SourceIndex(1)).unwrap().write(1).unwrap();
    assert_eq!(pending(&msix), 1);
}

#[test]
fn without_a_vector_the_signal_is_kept_for_the_status_register() {
    let (mut msix, _router) = msix(1, 1);
    let source = SourceIndex(0);
    msix.event(source).unwrap().write(1).unwrap();
    assert!(msix.take_unrouted(source));
    assert!(!msix.take_unrouted(source));
    msix.set_control(ENABLE).unwrap();
    msix.set_vector(source, 77).unwrap();
    assert_eq!(msix.vector(source), NO_VECTOR, "there is no vector 77");
    msix.event(source).unwrap().write(1).unwrap();
    assert_eq!(pending(&msix), 0);
    assert!(msix.take_unrouted(source));
    msix.set_vector(source, 0).unwrap();
    msix.event(source).unwrap().write(1).unwrap();
    assert!(!msix.take_unrouted(source), "masked, so it is pending");
    assert_eq!(pending(&msix), 1);
}

#[test]
fn everything_survives_saving() {
    let (mut here, _router) = msix(2, 2);
    here.set_control(ENABLE).unwrap();
    program(&mut here, 0, 5);
    here.set_vector(SourceIndex(0), 0).unwrap();
    here.set_vector(SourceIndex(1), 1).unwrap();
    here.event(SourceIndex(1)).unwrap().write(3).unwrap();
    let state = here.save().unwrap();
    assert_eq!(state.pending, [false, true]);

    let (mut there, router) = msix(2, 2);
    there.restore(&state, ENABLE, &[0, 1]).unwrap();
    assert_eq!(pending(&there), 0b10);
    there.event(SourceIndex(0)).unwrap().write(1).unwrap();
    assert_eq!(router.fired(), [5]);
    program(&mut there, 1, 6);
    assert_eq!(router.fired(), [6]);
    assert_eq!(there.save().unwrap().entries[0], state.entries[0]);
}

#[test]
fn state_of_another_device_is_refused() {
    let (here, _) = msix(2, 2);
    let state = here.save().unwrap();
    let (mut there, _) = msix(3, 2);
    let refused = there.restore(&state, ENABLE, &[0, 1]).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "saved MSI-X state has 2 vectors, this device has 3"
    );
    let (mut there, _) = msix(2, 3);
    assert!(there.restore(&state, ENABLE, &[0, 1, 2]).is_err());
}

#[test]
fn reset_forgets_everything() {
    let (mut msix, router) = msix(2, 2);
    msix.set_control(ENABLE).unwrap();
    program(&mut msix, 0, 5);
    msix.set_vector(SourceIndex(0), 0).unwrap();
    msix.reset().unwrap();
    assert_eq!(router.attached(), 0);
    msix.event(SourceIndex(0)).unwrap().write(1).unwrap();
    msix.reset_sources().unwrap();
    assert!(!msix.take_unrouted(SourceIndex(0)));
    assert_eq!(msix.save().unwrap().entries[0].data, 0);
}

#[test]
fn a_source_of_each_vector_is_there_after_a_reset() {
    let router = Arc::new(FakeRouter::default());
    let mut msix = Msix::one_to_one(router.clone(), 3).unwrap();
    for _ in 0..2 {
        msix.set_control(ENABLE).unwrap();
        program(&mut msix, 2, 8);
        nix::unistd::write(msix.events().nth(2).unwrap(), &1u64.to_ne_bytes()).unwrap();
        assert_eq!(router.fired(), [8]);
        msix.reset().unwrap();
        assert_eq!(router.attached(), 0);
    }
}

#[test]
fn the_number_of_vectors_is_bounded() {
    for vectors in [0, MAX_VECTORS + 1] {
        let router = Arc::new(FakeRouter::default());
        assert!(matches!(
            Msix::new(router, vectors, 1),
            Err(MsixError::Vectors { .. })
        ));
    }
}

#[test]
fn no_access_panics() {
    let (mut msix, _router) = msix(65, 65);
    let mut seed = 1_u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        seed >> 16
    };
    for _ in 0..20_000 {
        let (at, value, len) = (random() & 0x1fff, random(), 1 << (random() & 3));
        msix.write_table(at, &value.to_le_bytes()[..len]).unwrap();
        msix.read_table(at, &mut value.to_le_bytes()[..len]);
        msix.read_pending(at, &mut value.to_le_bytes()[..len])
            .unwrap();
        match value & 7 {
            0 => msix.set_control(random() as u16).unwrap(),
            1 => msix
                .set_vector(SourceIndex((at & 0x7f) as usize), value as u16 & 0x7f)
                .unwrap(),
            _ => {}
        }
    }
}
