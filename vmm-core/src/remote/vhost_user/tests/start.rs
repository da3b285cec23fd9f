//! Negotiation, start and stop.

use super::*;

#[test]
fn the_guest_is_offered_what_the_back_end_has() {
    let backend = FakeBackend::new(Behaviour {
        features: !(1 << 16 | 1 << 17),
        ..Behaviour::default()
    });
    let device = connect(blk(), backend.pair()).unwrap();
    assert_eq!(device.features() & (1 << 26 | 1 << 30 | 1 << 34), 0);
    assert_eq!((device.queues(), device.max_queue_size()), (4, 256));
    let spoken = backend.told(|t| Protocol::from_bits_retain(t.protocol));
    assert!(spoken.contains(Protocol::DEVICE_STATE | Protocol::REPLY_ACK));
    assert!(!spoken.intersects(Protocol::STATUS | Protocol::PAGEFAULT | Protocol::SHMEM));
    let mut config = [0; 8];
    device.read_config(30, &mut config);
    assert_eq!(config, [30, 31, 32, 33, 4, 0, 36, 37], "with our queues");
    device.read_config(58, &mut config);
    assert_eq!(config, [58, 59, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn rings_are_set_up_in_order_and_connected() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    backend.told(|t| t.messages.clear());
    machine.activate();
    let ring = ["NUM", "BASE", "ADDR", "CALL", "KICK"].map(|m| format!("SET_VRING_{m}"));
    let mut expected: Vec<String> = vec!["SET_FEATURES".into(), "GET_INFLIGHT_FD".into()];
    expected.push("SET_INFLIGHT_FD".into());
    expected.extend(ring.clone());
    expected.extend(ring);
    expected.extend(["SET_VRING_ENABLE"; 2].map(String::from));
    expected.push("GET_FEATURES".into());
    backend.told(|t| {
        assert_eq!(t.messages, expected);
        assert_eq!(t.features, 1 << 32 | 1 << 30 | 1 << 9);
        assert_eq!(t.regions, [(0, MIB)]);
        let host = machine.memory.regions()[0].host();
        let ring = &t.rings[&2];
        assert_eq!((ring.size, ring.base, ring.log), (128, 5, None));
        assert_eq!(ring.descriptors, host + 0x3_0000);
        assert!(ring.enabled && t.rings[&0].enabled);
        let mut count = [0; 8];
        machine.kicks[2].write(1).unwrap();
        ring.kick.as_ref().unwrap().read_exact(&mut count).unwrap();
        let mut call = t.rings[&0].call.as_ref().unwrap();
        call.write_all(&1u64.to_ne_bytes()).unwrap();
        assert_eq!(machine.calls[0].read().unwrap(), 1);
    });
}

#[test]
fn only_active_rings_are_stopped_and_they_go_on_where_they_were() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    assert_eq!(machine.device.stop().unwrap(), []);
    machine.activate();
    let stopped = |index, base| StoppedQueue {
        index: QueueIndex(index),
        base: RingBase(base),
    };
    assert_eq!(
        machine.device.stop().unwrap(),
        [stopped(0, 7), stopped(2, 12)]
    );
    assert_eq!(machine.device.stop().unwrap(), []);
    let queues = vec![machine.queue(2, 12)];
    machine.device.activate(1 << 32, queues).unwrap();
    backend.told(|t| assert_eq!(t.rings[&2].base, 12));
}

#[test]
fn a_reset_stops_what_runs_and_says_nothing_to_an_idle_device() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    backend.told(|t| t.messages.clear());
    machine.device.reset().unwrap();
    backend.told(|t| assert!(t.messages.is_empty()));
    machine.activate();
    backend.told(|t| t.messages.clear());
    machine.device.reset().unwrap();
    let expected = ["GET_VRING_BASE", "GET_VRING_BASE", "RESET_DEVICE"];
    backend.told(|t| assert_eq!(t.messages, expected));
}

#[test]
fn a_changed_configuration_is_read_and_told() {
    let (send, receive) = std::sync::mpsc::channel();
    let protocol = (Protocol::CONFIG | Protocol::BACKEND_REQ | Protocol::REPLY_ACK).bits();
    let mut capacity = 0;
    let backend = raw::serve(move |request| match (request.code, request.file.take()) {
        (21, Some(channel)) => {
            send.send(channel).unwrap();
            Answer::None
        }
        (24, _) => {
            let mut body = request.body.clone();
            capacity += 1;
            body[12] = capacity;
            Answer::Body(body)
        }
        _ => raw::blk(request, protocol),
    });
    let machine = Machine::new(Endpoint::Connected(backend), blk());
    let mut channel: File = receive.recv().unwrap();
    channel.write_all(&raw::message(2, 9, &[])).unwrap();
    let mut answer = [0; 20];
    channel.read_exact(&mut answer).unwrap();
    assert_eq!(answer, raw::message(2, 5, &[0; 8])[..]);
    assert_eq!(machine.notes.wait_for(1), ["config changed"]);
    let mut config = [0];
    machine.device.read_config(0, &mut config);
    assert_eq!(config, [2]);

    channel.write_all(&[1, 2, 3]).unwrap();
    drop(channel);
    machine.device.stop().unwrap();
    assert!(machine.device.is_connected(), "only its requests are lost");
}

#[test]
fn a_net_device_without_configuration_works() {
    let backend = FakeBackend::new(Behaviour {
        protocol: Protocol::MQ,
        rings: 2,
        ..Behaviour::default()
    });
    let mut config = blk();
    config.kind = DeviceKind::NET;
    config.mac = Some([2, 0, 0, 0, 0, 7]);
    let machine = Machine::new(Endpoint::Connected(backend.pair()), config);
    assert_eq!(machine.device.queues(), 2);
    let mut mac = [0; 6];
    machine.device.read_config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 7]);
    let queues = vec![machine.queue(0, 0)];
    machine.device.activate(1 << 32 | 1 << 5, queues).unwrap();
    backend.told(|t| assert_eq!(t.features, 1 << 32 | 1 << 30, "the address is ours"));
}

#[test]
fn a_listener_has_a_name() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    assert_eq!(LayoutListener::name(&*machine.device), "device disk0");
    assert_eq!(VirtioDevice::name(&*machine.device), "disk0");
}
