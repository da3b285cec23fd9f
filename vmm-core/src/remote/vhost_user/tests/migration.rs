//! Memory, dirty log and device state.

use super::*;

#[test]
fn memory_is_told_once_for_each_change() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    machine.activate();
    backend.told(|t| t.messages.clear());
    let mut layout = machine.memory.begin();
    layout.add(region(4 * MIB)).unwrap();
    layout.add(region(2 * MIB)).unwrap();
    layout.commit().unwrap();
    let expected = ["ADD_MEM_REG", "ADD_MEM_REG", "GET_FEATURES"];
    backend.told(|t| assert_eq!(t.messages, expected));
    let mut layout = machine.memory.begin();
    layout.remove(2 * MIB).unwrap();
    layout.commit().unwrap();
    backend.told(|t| assert_eq!(t.regions, [(0, MIB), (4 * MIB, MIB)]));
}

#[test]
fn a_back_end_without_slots_gets_whole_tables_up_to_eight_regions() {
    let backend = FakeBackend::new(Behaviour {
        protocol: Protocol::CONFIG | Protocol::MQ,
        ..Behaviour::default()
    });
    let machine = Machine::on(&backend);
    let add = |count: u64| {
        let mut layout = machine.memory.begin();
        let first = machine.memory.regions().len() as u64;
        for i in first..first + count {
            layout.add(region(2 * MIB * i)).unwrap();
        }
        layout.commit()
    };
    backend.told(|t| t.messages.clear());
    add(7).unwrap();
    machine.activate();
    backend.told(|t| {
        assert_eq!(t.messages[0], "SET_MEM_TABLE");
        assert_eq!(t.regions.len(), 8);
    });
    let refused = add(1).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "device disk0 did not take the new memory layout"
    );
    assert_eq!(
        refused.source().unwrap().to_string(),
        "device disk0: 9 memory regions, the back-end takes 8"
    );
    assert_eq!(machine.memory.regions().len(), 8);
}

#[test]
fn the_dirty_log_survives_new_memory_and_new_back_ends() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    let mut layout = machine.memory.begin();
    layout.add(region(64 * MIB)).unwrap();
    layout.commit().unwrap();
    machine.activate();
    backend.told(|t| t.messages.clear());
    let log = machine.device.start_log().unwrap();
    backend.told(|t| {
        let expected = [
            "SET_LOG_BASE",
            "SET_FEATURES",
            "SET_VRING_ADDR",
            "SET_VRING_ADDR",
        ];
        assert_eq!(t.messages[..4], expected);
        assert_ne!(t.features & 1 << 26, 0);
        assert_eq!(t.rings[&2].log, Some(0x3_2000), "the used ring's address");
        assert_eq!(t.log_size, log.size());
        t.messages.clear();
    });
    let mut layout = machine.memory.begin();
    layout.add(region(8 * MIB)).unwrap();
    layout.commit().unwrap();
    backend.told(|t| assert_eq!(t.messages.last().unwrap(), "SET_LOG_BASE"));
    let mut layout = machine.memory.begin();
    layout.add(region(1024 * MIB)).unwrap();
    assert!(layout.commit().is_err(), "beyond the log");

    backend.told(|t| *t = Default::default());
    machine.device.reconnect_with(backend.pair()).unwrap();
    backend.told(|t| {
        assert_ne!(t.features & 1 << 26, 0);
        assert_eq!(t.rings[&0].log, Some(0x1_2000));
        assert_eq!(t.log_size, log.size());
    });
    machine.device.stop_log().unwrap();
    backend.told(|t| {
        assert_eq!(t.features & 1 << 26, 0);
        assert_eq!(t.rings[&0].log, None);
    });
}

#[test]
fn a_log_base_may_be_answered_with_eight_bytes() {
    let protocol = (Protocol::CONFIG | Protocol::LOG_SHMFD).bits();
    let backend = raw::serve(move |request| match request.code {
        6 => Answer::Body(vec![0; 8]),
        _ => raw::blk(request, protocol),
    });
    let device = connect(blk(), backend).unwrap();
    device.start_log().unwrap();
    let without = raw::serve(|request| raw::blk(request, Protocol::CONFIG.bits()));
    let refused = connect(blk(), without).unwrap().start_log().map(|_| ());
    assert_eq!(
        refused.unwrap_err().to_string(),
        "device disk0: the back-end does not offer a dirty log in shared memory"
    );
}

#[test]
fn state_goes_through_the_descriptor_while_stopped() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    machine.activate();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let refused = machine
        .device
        .transfer_state(StateDirection::Save, theirs.into());
    assert_eq!(
        refused.unwrap_err().to_string(),
        "device disk0: rings run; stop it before its state is moved"
    );
    drop(ours);
    machine.device.stop().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let instead = machine
        .device
        .transfer_state(StateDirection::Save, theirs.into())
        .unwrap();
    assert!(instead.is_none());
    machine.device.check_state(Duration::from_secs(5)).unwrap();
    let mut state = String::new();
    ours.read_to_string(&mut state).unwrap();
    assert_eq!(state, "what it was doing");

    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(state.as_bytes()).unwrap();
    drop(ours);
    machine
        .device
        .transfer_state(StateDirection::Load, theirs.into())
        .unwrap();
    machine.device.check_state(Duration::from_secs(5)).unwrap();
    backend.told(|t| assert!(t.messages.contains(&state)));
}
