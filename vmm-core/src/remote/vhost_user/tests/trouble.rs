//! Back-ends that are silent, broken or hostile.

use super::*;

#[test]
fn a_ring_outside_of_memory_is_refused() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    backend.told(|t| t.messages.clear());
    let mut queue = machine.queue(1, 0);
    queue.device = MIB - 0x10;
    let refused = machine.device.activate(1 << 32, vec![queue]).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "device disk0: ring 1 has a used ring at 0xffff0, where there is no memory"
    );
    backend.told(|t| assert!(t.messages.is_empty(), "{:?}", t.messages));
    machine.activate();
}

#[test]
fn silence_is_an_error_that_names_device_message_and_deadline() {
    for message in ["GET_FEATURES", "GET_CONFIG", "SET_BACKEND_REQ_FD"] {
        let backend = FakeBackend::new(Behaviour {
            silent_at: Some(message),
            ..Behaviour::default()
        });
        let silent = connect(impatient(), backend.pair())
            .map(|_| ())
            .unwrap_err();
        let expected = format!("device disk0: no answer to {message} within 300 ms");
        assert_eq!(silent.to_string(), expected);
    }
}

#[test]
fn silence_at_work_is_an_error_too() {
    for (message, name) in [
        ("SET_VRING_ENABLE", "the start of its rings"),
        ("GET_VRING_BASE", "GET_VRING_BASE"),
    ] {
        let backend = FakeBackend::default();
        let machine = Machine::new(Endpoint::Connected(backend.pair()), impatient());
        backend.behaviour.lock().unwrap().silent_at = Some(message);
        let queues = vec![machine.queue(0, 0)];
        let started = machine.device.activate(1 << 32, queues);
        let silent = started.and_then(|()| machine.device.stop().map(|_| ()));
        let expected = format!("device disk0: no answer to {name} within 300 ms");
        assert_eq!(silent.unwrap_err().to_string(), expected);
        assert!(!machine.device.is_connected());
    }
}

#[test]
fn hostile_numbers_are_refused() {
    let refuse = |change: fn(&mut Behaviour)| {
        let mut behaviour = Behaviour::default();
        change(&mut behaviour);
        let backend = FakeBackend::new(behaviour);
        connect(blk(), backend.pair())
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refuse(|b| b.rings = 0),
        "device disk0: 1 queues wanted, the back-end serves 0"
    );
    assert_eq!(
        refuse(|b| b.rings = 1_000_000),
        "device disk0: impossible answer to GET_QUEUE_NUM: invalid message"
    );
    assert_eq!(
        refuse(|b| b.config.truncate(20)),
        "device disk0: the back-end refused GET_CONFIG"
    );
    assert_eq!(
        refuse(|b| b.features &= !(1 << 32)),
        "device disk0: the back-end does not offer VIRTIO_F_VERSION_1"
    );
    let no_config = refuse(|b| b.protocol.remove(Protocol::CONFIG));
    assert_eq!(
        no_config,
        "device disk0: the back-end has no device configuration"
    );
}

#[test]
fn a_hostile_inflight_buffer_is_refused() {
    let backend = FakeBackend::new(Behaviour {
        inflight_size: 1 << 40,
        ..Behaviour::default()
    });
    let machine = Machine::on(&backend);
    let queues = vec![machine.queue(0, 0)];
    let refused = machine.device.activate(1 << 32, queues).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "device disk0: impossible answer to GET_INFLIGHT_FD: \
         1099511627776 bytes at 0 of a file of 4096 for 4 rings of 128"
    );
}

#[test]
fn answers_of_no_known_form_end_the_connection() {
    let config = Protocol::CONFIG.bits();
    type Case = (fn() -> Answer, &'static str);
    let cases: [Case; 5] = [
        (
            || Answer::Body(vec![0; 12 + 20]),
            "impossible answer to GET_CONFIG: 20 of 60 bytes of configuration",
        ),
        (
            || Answer::Body(Vec::new()),
            "the back-end refused GET_CONFIG",
        ),
        (
            || Answer::Bytes(raw::message(24, 5, &[0; 5000])),
            "impossible answer to GET_CONFIG: invalid message",
        ),
        (
            || Answer::Bytes(raw::message(1, 5, &[0; 72])),
            "impossible answer to GET_CONFIG: invalid message",
        ),
        (|| Answer::HangUp, "the back-end hung up at GET_CONFIG"),
    ];
    for (answer, expected) in cases {
        let backend = raw::serve(move |request| match request.code {
            24 => answer(),
            _ => raw::blk(request, config),
        });
        let refused = connect(blk(), backend).map(|_| ()).unwrap_err();
        assert_eq!(refused.to_string(), format!("device disk0: {expected}"));
    }
}

#[test]
fn no_answer_panics() {
    let mut seed = 3_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        seed >> 24
    };
    for round in 0..200 {
        let mut wild = random() % 12;
        let mut next = random();
        let backend = raw::serve(move |request| {
            next = next
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(round);
            let bytes = next.to_le_bytes().repeat(9);
            let usual = raw::blk(request, u64::MAX);
            match (wild, usual) {
                (0, Answer::Body(_)) => match next >> 62 {
                    0 => Answer::Bytes(bytes),
                    1 => Answer::HangUp,
                    _ => Answer::Body(bytes[..(next >> 40) as usize % 72].to_vec()),
                },
                (_, usual) => {
                    wild = wild.saturating_sub(1);
                    usual
                }
            }
        });
        let mut config = blk();
        config.deadline = Duration::from_millis(20);
        if let Ok(device) = connect(config, backend) {
            // Whatever comes of it: it comes.
            let _ = device.start_log();
            let _ = device.activate(1 << 32, Vec::new());
            let _ = device.stop();
            let _ = device.reset();
        }
    }
}
