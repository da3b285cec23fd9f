mod backend;
mod raw;

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::backend::{Behaviour, FEATURES, FakeBackend};
use self::raw::Answer;
use super::*;
use crate::memory::{LayoutListener, Memory, Ram, Region};
use crate::transport::{
    ActivatedQueue, DeviceKind, DeviceNotifier, QueueIndex, RingBase, StoppedQueue, VirtioDevice,
};

const MIB: u64 = 1 << 20;

#[derive(Default)]
struct Notes(Mutex<Vec<String>>);
impl DeviceNotifier for Notes {
    fn config_changed(&self, change: &mut dyn FnMut()) {
        change();
        self.0.lock().unwrap().push("config changed".into());
    }
    fn trouble(&self, error: &(dyn Error + 'static)) {
        self.0.lock().unwrap().push(error.to_string());
    }
}
impl Notes {
    fn wait_for(&self, count: usize) -> Vec<String> {
        eventually(|| self.0.lock().unwrap().len() >= count);
        self.0.lock().unwrap().clone()
    }
}

fn eventually(what: impl Fn() -> bool) {
    for _ in 0..4000 {
        if what() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("it never came about");
}

struct Machine {
    device: Arc<VhostUserDevice>,
    memory: Arc<Memory>,
    notes: Arc<Notes>,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
}

fn region(gpa: u64) -> Region {
    let ram = Ram::allocate(MIB, None).unwrap();
    let file = Arc::clone(ram.regions().unwrap()[0].file());
    Region::map(gpa, MIB, file, 0).unwrap()
}

fn blk() -> VhostUserConfig {
    let mut config = VhostUserConfig::new(DeviceKind::BLK, "disk0");
    config.deadline = Duration::from_millis(300);
    config
}

fn connect(config: VhostUserConfig, fd: OwnedFd) -> Result<Arc<VhostUserDevice>, VhostUserError> {
    let watchdog = Watchdog::start().unwrap();
    VhostUserDevice::connect(
        config,
        Endpoint::Connected(fd),
        &Arc::new(Memory::default()),
        &watchdog,
    )
}

impl Machine {
    fn new(endpoint: Endpoint, config: VhostUserConfig) -> Self {
        let memory = Arc::new(Memory::default());
        let mut layout = memory.begin();
        layout.add(region(0)).unwrap();
        layout.commit().unwrap();
        let watchdog = Watchdog::start().unwrap();
        let device = VhostUserDevice::connect(config, endpoint, &memory, &watchdog).unwrap();
        memory.subscribe(device.clone()).unwrap();
        let notes = Arc::new(Notes::default());
        device.set_notifier(notes.clone());
        let events = || (0..4).map(|_| EventFd::new(EFD_NONBLOCK).unwrap());
        Self {
            device,
            memory,
            notes,
            kicks: events().collect(),
            calls: events().collect(),
        }
    }

    fn on(backend: &FakeBackend) -> Self {
        Self::new(Endpoint::Connected(backend.pair()), blk())
    }

    fn listening(backend: &FakeBackend, folder: &Path) -> Self {
        let path = folder.join("disk0.sock");
        backend.listen(UnixListener::bind(&path).unwrap());
        Self::new(Endpoint::Path(path), blk())
    }

    fn queue(&self, index: u16, base: u16) -> ActivatedQueue {
        let at = 0x1_0000 * (u64::from(index) + 1);
        ActivatedQueue {
            index: QueueIndex(index),
            size: 128,
            descriptors: at,
            driver: at + 0x1000,
            device: at + 0x2000,
            base: RingBase(base),
            kick: self.kicks[usize::from(index)].try_clone().unwrap(),
            call: self.calls[usize::from(index)].try_clone().unwrap(),
        }
    }

    fn activate(&self) {
        let queues = vec![self.queue(0, 0), self.queue(2, 5)];
        self.device.activate(1 << 32 | 1 << 9, queues).unwrap();
    }

    /// What a back-end leaves in a used ring.
    fn set_used(&self, queue: u16, index: u16) {
        let at = 0x1_0000 * (u64::from(queue) + 1) + 0x2002;
        let guest = self.memory.guest();
        guest.write_obj(index, GuestAddress(at)).unwrap();
    }
}

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
        let silent = connect(blk(), backend.pair()).map(|_| ()).unwrap_err();
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
        let machine = Machine::on(&backend);
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
    let mut config = blk();
    config.deadline = Duration::from_secs(10);
    let machine = Machine::new(Endpoint::Path(path.clone()), config);
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
