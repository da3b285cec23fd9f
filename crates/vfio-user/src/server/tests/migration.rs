//! What a client must not ask of a device that moves.

use nix::errno::Errno;

use super::{Words, start};
use crate::fake::{LONG, Served};
use crate::server::Ended;
use crate::wire::{
    Command, DEVICE_STATE, Feature, GET, LOG_REPORT, LOG_START, LOG_STOP, Layout as _, LogRange,
    LogReport, LogStart, MIGRATION, PROBE, SET, StateBytes, StateData,
};

const REFUSED: Result<Vec<u8>, Errno> = Err(Errno::EINVAL);

fn feature(argsz: usize, flags: u32, data: &[u8]) -> Vec<u8> {
    let argsz = u32::try_from(argsz).unwrap();
    [&Feature { argsz, flags }.bytes(), data].concat()
}

fn state(state: u32) -> Vec<u8> {
    let descriptor = 9;
    StateData { state, descriptor }.bytes()
}

fn log(page: u64, count: u32, ranges: &[(u64, u64)]) -> Vec<u8> {
    let start = LogStart {
        page,
        ranges: count,
        reserved: 0,
    };
    let mut bytes = start.bytes();
    for &(address, size) in ranges {
        bytes.extend(LogRange { address, size }.bytes());
    }
    bytes
}

fn report(address: u64, size: u64, page: u64) -> Vec<u8> {
    let report = LogReport {
        address,
        size,
        page,
    };
    report.bytes()
}

#[test]
fn states_of_ours_are_only_for_those_who_know_them() {
    // This client has named nothing of itself.
    let (words, served) = start();
    let ask = |flags, data: &[u8]| words.ask(Command::DEVICE_FEATURE, &feature(100, flags, data));
    let flags = ask(MIGRATION | GET, &[]).unwrap();
    assert_eq!(flags[8..], [1 | 4, 0, 0, 0, 0, 0, 0, 0]);
    for number in 0..10 {
        let set = ask(DEVICE_STATE | SET, &state(number));
        if [0, 5, 7, 8, 9].contains(&number) {
            assert_eq!(set, REFUSED, "{number}");
        } else {
            let set = set.unwrap();
            assert_eq!(
                set[4..],
                feature(0, DEVICE_STATE | SET, &state(number))[4..]
            );
            let get = ask(DEVICE_STATE | GET, &[]).unwrap();
            let now = u32::from_le_bytes(std::array::from_fn(|at| get[8 + at]));
            assert_eq!(now, number);
        }
    }
    drop(words);
    assert_eq!(served.ended().0.unwrap(), Ended::ClientGone);
}

#[test]
fn features_are_probed() {
    let (words, served) = start();
    let probe = |flags| {
        let probe = feature(8, flags | PROBE, &[]);
        let reply = words.ask(Command::DEVICE_FEATURE, &probe);
        reply.map(|reply| assert_eq!(reply, probe))
    };
    for (number, get, set) in [
        (MIGRATION, true, false),
        (DEVICE_STATE, true, true),
        (LOG_START, false, true),
        (LOG_STOP, false, true),
        (LOG_REPORT, true, false),
    ] {
        assert_eq!(probe(number), Ok(()));
        assert_eq!(probe(number | GET).is_ok(), get, "{number}");
        assert_eq!(probe(number | SET).is_ok(), set, "{number}");
        assert_eq!(probe(number | GET | SET).is_ok(), get && set, "{number}");
        assert_eq!(probe(number | 1 << 19), Err(Errno::EINVAL));
    }
    for unknown in [0, 3, 9, 0xffff] {
        assert_eq!(probe(unknown | GET), Err(Errno::EOPNOTSUPP), "{unknown}");
    }
    drop(words);
    assert!(served.ended().1.taken().is_empty());
}

#[test]
fn what_cannot_be_is_not_asked_of_the_device() {
    let (words, served) = start();
    let ask = |argsz, flags, data: &[u8]| {
        words.ask(Command::DEVICE_FEATURE, &feature(argsz, flags, data))
    };
    for length in 0..8 {
        let short = vec![0; length];
        assert_eq!(words.ask(Command::DEVICE_FEATURE, &short), REFUSED);
        assert_eq!(words.ask(Command::MIG_DATA_READ, &short), REFUSED);
        assert_eq!(words.ask(Command::MIG_DATA_WRITE, &short), REFUSED);
    }
    // Neither got nor set, or both, or what cannot be.
    for ways in [0, GET | SET, SET, GET | 1 << 19] {
        assert_eq!(ask(100, MIGRATION | ways, &[]), REFUSED, "{ways:#x}");
    }
    assert_eq!(ask(100, LOG_STOP | GET, &[]), REFUSED);
    // No room for the reply, or data where none belong.
    for argsz in [0, 7, 8, 15] {
        assert_eq!(ask(argsz, MIGRATION | GET, &[]), REFUSED, "{argsz}");
        assert_eq!(ask(argsz, DEVICE_STATE | GET, &[]), REFUSED, "{argsz}");
    }
    assert_eq!(ask(100, MIGRATION | GET, &[0]), REFUSED);
    assert_eq!(ask(100, DEVICE_STATE | GET, &[0]), REFUSED);
    assert_eq!(ask(100, LOG_STOP | SET, &[]), REFUSED);
    for length in [0, 7, 9] {
        let mut data = state(1);
        data.resize(length, 0);
        assert_eq!(ask(100, DEVICE_STATE | SET, &data), REFUSED, "{length}");
    }
    let one = [(0x1000, 0x1000)];
    for wrong in [
        log(4096, 1, &[]),
        log(4096, 0, &one),
        log(4096, u32::MAX, &one),
        log(4096, 1, &[(0, 0)]),
        log(4096, 1, &[(u64::MAX, 1)]),
        log(0, 1, &one),
        log(4095, 1, &one),
        [log(4096, 1, &one), vec![0]].concat(),
        log(4096, 1, &one)[..20].to_vec(),
        log(4096, 0, &[])[..15].to_vec(),
    ] {
        assert_eq!(ask(100, LOG_START | SET, &wrong), REFUSED, "{wrong:?}");
    }
    ask(100, LOG_START | SET, &log(4096, 1, &one)).unwrap();
    let gigabyte = 1 << 30;
    for (argsz, wrong) in [
        (100, report(0, 0, 4096)),
        (100, report(u64::MAX, 2, 4096)),
        (100, report(0, 4096, 0)),
        (100, report(0, 4096, 6)),
        (100, [report(0, 4096, 4096), vec![0]].concat()),
        (100, report(0, 4096, 4096)[..23].to_vec()),
        // Bits for which there is no room, in the reply or in any.
        (39, report(0, 4096, 4096)),
        (47, report(0, 4096 * 65, 4096)),
        (gigabyte, report(0, (32 << 30) + 1, 4096)),
        (gigabyte, report(0, u64::MAX, 1)),
        (gigabyte, report(0, u64::MAX, 1 << 40)),
    ] {
        assert_eq!(ask(argsz, LOG_REPORT | GET, &wrong), REFUSED, "{wrong:?}");
    }
    let room = ask(40, LOG_REPORT | GET, &report(0, 4096, 4096)).unwrap();
    assert_eq!(room.len(), 40);

    let bytes = |argsz, size| StateBytes { argsz, size }.bytes();
    let mega = 1 << 20;
    for wrong in [
        bytes(0, 4),
        bytes(11, 4),
        bytes(u32::MAX, mega + 1),
        bytes(u32::MAX, u32::MAX),
        [bytes(12, 4), vec![0]].concat(),
    ] {
        assert_eq!(words.ask(Command::MIG_DATA_READ, &wrong), REFUSED);
    }
    for wrong in [
        bytes(12, 4),
        [bytes(12, 4), vec![0; 3]].concat(),
        [bytes(12, 4), vec![0; 5]].concat(),
        [bytes(12, u32::MAX), vec![0; 5]].concat(),
    ] {
        assert_eq!(words.ask(Command::MIG_DATA_WRITE, &wrong), REFUSED);
    }
    drop(words);
    let calls = served.ended().1.taken();
    let done = [
        "start log (4096, [(4096, 4096)])",
        "report (0, 4096, 4096)",
        "stop log ()",
    ];
    assert_eq!(calls, done);
}

#[test]
fn a_client_that_is_gone_leaves_the_device_where_it_was() {
    let (words, served) = start();
    let stop = feature(16, DEVICE_STATE | SET, &state(1));
    words.ask(Command::DEVICE_FEATURE, &stop).unwrap();
    drop(words);
    let (_, device) = served.ended();
    let (socket, served) = Served::start(device, LONG);
    let next = Words(socket).agreed();
    let get = feature(16, DEVICE_STATE | GET, &[]);
    let now = next.ask(Command::DEVICE_FEATURE, &get).unwrap();
    assert_eq!(now[8], 1);
    drop(next);
    assert_eq!(served.ended().0.unwrap(), Ended::ClientGone);
}
