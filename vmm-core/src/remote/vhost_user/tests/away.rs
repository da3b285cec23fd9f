//! Back-ends that go away and return.

use super::*;

#[test]
fn a_back_end_that_returns_goes_on_from_guest_memory() {
    let folder = tempfile::tempdir().unwrap();
    let backend = FakeBackend::default();
    let machine = Machine::listening(&backend, folder.path());
    machine.activate();
    machine.set_used(0, 40);
    machine.set_used(2, 41);
    backend.told(|t| *t = Default::default());
    backend.hang_up();
    backend.wait(|t| t.rings.values().filter(|r| r.enabled).count() == 2);
    eventually(|| machine.device.is_connected());
    backend.told(|t| {
        assert_eq!((t.rings[&0].base, t.rings[&2].base), (40, 41));
        assert_eq!(t.regions, [(0, MIB)]);
        assert_eq!(t.features, 1 << 32 | 1 << 30 | 1 << 9);
    });
    for queue in [0, 2] {
        assert_eq!(machine.kicks[queue].read().unwrap(), 1);
        assert_eq!(machine.calls[queue].read().unwrap(), 1);
    }
    assert!(machine.notes.0.lock().unwrap().is_empty(), "only a pause");
}

#[test]
fn the_inflight_buffer_outlives_the_back_end() {
    let folder = tempfile::tempdir().unwrap();
    let backend = FakeBackend::default();
    let machine = Machine::listening(&backend, folder.path());
    machine.activate();
    backend.hang_up();
    backend.wait(|t| t.inflight_inodes.len() == 2);
    backend.told(|t| {
        assert_eq!(t.inflight_inodes[0], t.inflight_inodes[1]);
        let made = t.messages.iter().filter(|m| *m == "GET_INFLIGHT_FD");
        assert_eq!(made.count(), 1);
    });
}

#[test]
fn what_the_guest_does_meanwhile_is_kept() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    backend.hang_up();
    eventually(|| !machine.device.is_connected());
    machine.activate();
    machine.device.write_config(32, &[9]).unwrap();
    machine.set_used(0, 3);
    let stopped = machine.device.stop().unwrap();
    assert_eq!(stopped[0].base, RingBase(3), "from guest memory");
    machine.activate();
    backend.told(|t| *t = Default::default());
    machine.device.reconnect_with(backend.pair()).unwrap();
    backend.told(|t| {
        assert_eq!(t.config_writes, [(32, vec![9])]);
        assert!(t.rings[&0].enabled && t.rings[&2].enabled);
    });
    let mut config = [0];
    machine.device.read_config(32, &mut config);
    assert_eq!(config, [9]);
}

#[test]
fn another_back_end_in_its_place_is_a_failure() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    machine.activate();
    let other = FakeBackend::new(Behaviour {
        features: FEATURES & !(1 << 9),
        ..Behaviour::default()
    });
    let refused = machine.device.reconnect_with(other.pair()).unwrap_err();
    let cause = "device disk0: the back-end came back without features 0x200";
    assert_eq!(refused.source().unwrap().to_string(), cause);
    assert_eq!(machine.notes.wait_for(1), [cause]);
    let queues = vec![machine.queue(0, 0)];
    let refused = machine.device.activate(1 << 32, queues).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "device disk0 has no usable back-end any more"
    );
    machine.device.reconnect_with(backend.pair()).unwrap();
    machine.activate();
}

#[test]
fn more_features_than_before_are_welcome() {
    let backend = FakeBackend::default();
    let machine = Machine::on(&backend);
    let other = FakeBackend::new(Behaviour {
        features: FEATURES | 1 << 5,
        rings: 16,
        ..Behaviour::default()
    });
    machine.device.reconnect_with(other.pair()).unwrap();
    assert_eq!(machine.device.features() & 1 << 5, 0, "the offer stays");
    assert_eq!(machine.device.queues(), 4);
}

#[test]
fn back_ends_that_cannot_stand_a_ring_are_not_tried_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk0.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            raw::serve_on(stream, |request| match request.code {
                9 => Answer::HangUp,
                _ => raw::blk(request, Protocol::CONFIG.bits()),
            });
        }
    });
    let machine = Machine::new(Endpoint::Path(path), blk());
    let queues = vec![machine.queue(0, 0)];
    machine.device.activate(1 << 32, queues).unwrap();
    let told = machine.notes.wait_for(1);
    assert!(
        told[0].starts_with("device disk0: the back-end hung up at "),
        "{told:?}"
    );
    eventually(|| machine.device.is_connected());
}

/// With a back-end that nobody here wrote, where there is one.
#[test]
fn qemu_storage_daemon_serves_a_disk_and_returns() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk0.sock");
    let image = folder.path().join("image");
    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    let start = || {
        let file = format!("driver=file,node-name=disk,filename={}", image.display());
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=4,\
             addr.type=unix,addr.path={}",
            path.display()
        );
        let daemon = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &file, "--export", &export])
            .spawn();
        let Ok(daemon) = daemon else {
            println!("qemu-storage-daemon is not installed: nothing was tested");
            return None;
        };
        eventually(|| UnixStream::connect(&path).is_ok());
        Some(daemon)
    };
    let Some(mut daemon) = start() else { return };
    let machine = Machine::new(Endpoint::Path(path.clone()), blk());
    let mut sectors = [0; 8];
    machine.device.read_config(0, &mut sectors);
    assert_eq!(u64::from_le_bytes(sectors), 64 * MIB / 512);
    assert_eq!(machine.device.queues(), 4);
    machine.activate();
    machine.device.start_log().unwrap();
    machine.device.stop_log().unwrap();
    let stopped = machine.device.stop().unwrap();
    assert_eq!(
        (stopped[0].base, stopped[1].base),
        (RingBase(0), RingBase(5))
    );
    machine.activate();

    daemon.kill().unwrap();
    daemon.wait().unwrap();
    eventually(|| !machine.device.is_connected());
    std::fs::remove_file(&path).unwrap();
    let mut daemon = start().unwrap();
    eventually(|| machine.device.is_connected());
    assert_eq!(machine.device.stop().unwrap().len(), 2);
    machine.device.reset().unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(machine.notes.0.lock().unwrap().is_empty());
}
