//! A device that moves, of our server and of one that says what the test wants.

use nix::errno::Errno;

use super::scripted::agreed;
use super::{end, is_refused};
use crate::fake::{Fake, LONG, Served};
use crate::wire::{
    DEVICE_STATE, Feature, GET, LOG_REPORT, LOG_START, Layout as _, LogReport, LogStart, MIGRATION,
    MigrationData, SET, StateBytes, StateData,
};
use crate::{Client, DeviceState, DmaRange, Ended, Error, MigrationFlags};

fn start(device: Fake) -> (Client, Served) {
    let (socket, served) = Served::start(device, LONG);
    (Client::new(socket, LONG).unwrap(), served)
}

#[test]
fn a_device_that_does_not_move_says_so() {
    let mut device = Fake::new();
    device.moves = false;
    let (client, served) = start(device);
    let no = Errno::EOPNOTSUPP;
    assert!(is_refused(client.migration().map(drop), no));
    assert!(is_refused(client.state().map(drop), no));
    assert!(is_refused(client.set_state(DeviceState::Stop), no));
    assert!(is_refused(client.read_state(&mut [0]).map(drop), no));
    assert!(is_refused(client.write_state(&[0]), no));
    assert!(is_refused(client.start_dma_log(4096, &[]).map(drop), no));
    assert!(is_refused(client.stop_dma_log(), no));
    let range = DmaRange {
        address: 0,
        size: 1,
    };
    assert!(is_refused(client.dma_log(range, 4096).map(drop), no));
    assert!(end(client, served).taken().is_empty());
}

#[test]
fn a_device_goes_to_every_state_but_error() {
    let (client, served) = start(Fake::new());
    assert!(client.has_p2p());
    assert_eq!(client.migration().unwrap(), MigrationFlags::all());
    assert_eq!(client.state().unwrap(), DeviceState::Running);
    for state in &DeviceState::ALL[1..] {
        client.set_state(*state).unwrap();
        assert_eq!(client.state().unwrap(), *state);
    }
    let fallen = client.set_state(DeviceState::Error);
    assert!(is_refused(fallen, Errno::EINVAL));
    client.set_state(DeviceState::StopCopy).unwrap();
    let back = client.set_state(DeviceState::PreCopy);
    assert!(is_refused(back, Errno::EREMOTEIO));
    assert_eq!(client.state().unwrap(), DeviceState::StopCopy);
    end(client, served);
}

#[test]
fn state_is_read_to_its_end_and_written() {
    let state: Vec<u8> = (0..5u32 << 19).map(|at| at.to_le_bytes()[1]).collect();
    let mut device = Fake::new();
    device.saved = state.clone();
    let (client, served) = start(device);
    let mut read = vec![0; state.len() + 10];
    assert_eq!(client.read_state(&mut read[..100]).unwrap(), 100);
    let rest = client.read_state(&mut read[100..]).unwrap();
    assert_eq!(rest, state.len() - 100);
    assert!(read[..state.len()] == state);
    assert_eq!(client.read_state(&mut read).unwrap(), 0);
    let not_now = client.write_state(&state);
    assert!(is_refused(not_now, Errno::EREMOTEIO));
    client.set_state(DeviceState::Resuming).unwrap();
    client.write_state(&state).unwrap();
    client.write_state(&[]).unwrap();
    let mut device = end(client, served);
    assert!(device.saved == state);
    let mega = 1 << 20;
    let calls = [
        ("read state", 100),
        ("read state", mega),
        ("read state", mega),
        ("read state", state.len() + 10 - 100 - 2 * mega),
        ("read state", mega),
        ("write state", mega),
        ("write state", mega),
        ("write state", state.len() - 2 * mega),
    ];
    assert_eq!(device.taken(), calls.map(|it| format!("{} {}", it.0, it.1)));
}

#[test]
fn what_a_device_writes_is_reported_once() {
    // More pages than a message has bits for.
    let (address, size) = (1 << 40, 40 << 30);
    let range = DmaRange { address, size };
    let mut device = Fake::new();
    let last = address + size - 1;
    device.written = vec![address, address + 4096 * 65, address + (32 << 30), last];
    let (client, served) = start(device);
    let early = client.dma_log(range, 4096);
    assert!(is_refused(early.map(drop), Errno::EINVAL));
    assert!(is_refused(client.stop_dma_log(), Errno::EINVAL));
    assert_eq!(client.start_dma_log(512, &[range]).unwrap(), 4096);
    let twice = client.start_dma_log(4096, &[]);
    assert!(is_refused(twice.map(drop), Errno::EBUSY));
    let bitmap = client.dma_log(range, 4096).unwrap();
    assert_eq!(bitmap.len(), 10 << 14);
    let is_set = |at: usize| bitmap[at / 64] & (1 << (at % 64)) != 0;
    assert!([0, 65, 8 << 20, (10 << 20) - 1].into_iter().all(is_set));
    assert_eq!(bitmap.iter().map(|it| it.count_ones()).sum::<u32>(), 4);
    let again = client.dma_log(range, 4096).unwrap();
    assert!(again.iter().all(|it| *it == 0));
    let none = DmaRange { size: 0, ..range };
    assert!(client.dma_log(none, 4096).unwrap().is_empty());
    for page in [0, 3, 4097] {
        let odd = client.dma_log(range, page).map(drop);
        assert!(is_refused(odd, Errno::EINVAL), "{page}");
        let odd = client.start_dma_log(page, &[]).map(drop);
        assert!(is_refused(odd, Errno::EINVAL), "{page}");
    }
    client.stop_dma_log().unwrap();
    client.start_dma_log(1 << 21, &[]).unwrap();
    drop(client);
    let (ended, mut device) = served.ended();
    assert_eq!(ended.unwrap(), Ended::ClientGone);
    let half = 32u64 << 30;
    let first = format!("report {:?}", (address, half, 4096));
    let second = format!("report {:?}", (address + half, 8u64 << 30, 4096));
    let start = format!("start log {:?}", (512, [(address, size)]));
    let calls = [
        &*start,
        &first,
        &second,
        &first,
        &second,
        "stop log ()",
        "start log (2097152, [])",
        // The client is gone.
        "stop log ()",
    ];
    assert_eq!(device.taken(), calls);
}

#[test]
fn a_server_without_p2p_has_no_such_states() {
    let reply = feature(MIGRATION | GET, &MigrationData { flags: 7 }.bytes());
    let (client, server) = agreed(move |it| it.reply(&reply, &[]));
    assert!(!client.has_p2p());
    let flags = MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY;
    assert_eq!(client.migration().unwrap(), flags);
    server.join().unwrap();
}

fn feature(flags: u32, data: &[u8]) -> Vec<u8> {
    [&Feature::with(flags, data.len()).bytes(), data].concat()
}

/// Whether a client takes a reply.
fn takes(reply: Vec<u8>, request: fn(&Client) -> Result<(), Error>) -> bool {
    let (client, server) = agreed(move |it| it.reply(&reply, &[]));
    let result = request(&client);
    server.join().unwrap();
    match result {
        Ok(()) => true,
        Err(Error::Protocol(_)) => false,
        Err(error) => panic!("{error:?}"),
    }
}

#[test]
fn replies_about_something_else_are_none() {
    type Request = fn(&Client) -> Result<(), Error>;
    let asked = LogReport {
        address: 0x1000,
        size: 0x46000,
        page: 0x1000,
    };
    let bits = |bits: &[u64]| {
        bits.iter()
            .flat_map(|it| it.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let report = [asked.bytes(), bits(&[u64::MAX, 0x3f])].concat();
    let state = StateData {
        state: 3,
        descriptor: 0,
    };
    let started = LogStart {
        page: 4096,
        ranges: 0,
        reserved: 0,
    };
    let migration: Request = |it| it.migration().map(drop);
    let get: Request = |it| it.state().map(drop);
    let set: Request = |it| it.set_state(DeviceState::Stop);
    let log: Request = |it| it.start_dma_log(4096, &[]).map(drop);
    let dirty: Request = |it| {
        let range = DmaRange {
            address: 0x1000,
            size: 0x46000,
        };
        it.dma_log(range, 0x1000).map(drop)
    };
    let read: Request = |it| it.read_state(&mut [0; 8]).map(drop);
    let write: Request = |it| it.write_state(&[0; 8]);
    let read_bytes =
        |size: u32, data: usize| [StateBytes { argsz: 0, size }.bytes(), vec![0; data]].concat();

    let right = [
        (
            migration,
            feature(MIGRATION | GET, &[1, 0, 0, 0, 0, 0, 0, 0]),
        ),
        (get, feature(DEVICE_STATE | GET, &state.bytes())),
        (log, feature(LOG_START | SET, &started.bytes())),
        (dirty, feature(LOG_REPORT | GET, &report)),
        (read, read_bytes(8, 8)),
        (read, read_bytes(3, 3)),
        (read, read_bytes(0, 0)),
        (write, Vec::new()),
    ];
    for (request, reply) in right {
        assert!(takes(reply.clone(), request), "{reply:?}");
        assert!(!takes([reply.clone(), vec![0]].concat(), request));
        for length in 0..reply.len() {
            let is_shorter = !takes(reply[..length].to_vec(), request);
            assert!(is_shorter, "{length} of {reply:?}");
        }
    }
    assert!(takes(feature(DEVICE_STATE | SET, &state.bytes()), set));
    let wrong = [
        (migration, feature(MIGRATION | SET, &[0; 8])),
        (migration, feature(DEVICE_STATE | GET, &[0; 8])),
        (set, feature(DEVICE_STATE | GET, &state.bytes())),
        (get, feature(DEVICE_STATE | GET, &[8, 0, 0, 0, 0, 0, 0, 0])),
        (get, feature(DEVICE_STATE | GET, &[0xff; 8])),
        (log, feature(LOG_START | SET, &[0; 16])),
        (log, feature(LOG_START | SET, &[3; 16])),
        (
            dirty,
            feature(
                LOG_REPORT | GET,
                &[LogReport { size: 8, ..asked }.bytes(), bits(&[0, 0])].concat(),
            ),
        ),
        // A bit beyond the range, too few bits, and too many.
        (
            dirty,
            feature(
                LOG_REPORT | GET,
                &[asked.bytes(), bits(&[0, 0x40])].concat(),
            ),
        ),
        (
            dirty,
            feature(LOG_REPORT | GET, &[asked.bytes(), bits(&[0])].concat()),
        ),
        (
            dirty,
            feature(LOG_REPORT | GET, &[asked.bytes(), bits(&[0; 3])].concat()),
        ),
        (read, read_bytes(9, 9)),
        (read, read_bytes(8, 7)),
        (read, read_bytes(0, 8)),
        (read, read_bytes(u32::MAX, 8)),
    ];
    for (request, reply) in wrong {
        assert!(!takes(reply.clone(), request), "{reply:?}");
    }
}
