//! Clients that do not keep to the protocol.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;

use super::{Words, map, message, right, set, start, version};
use crate::fake::{Fake, LONG, Served};
use crate::server::Ended;
use crate::wire::{Command, Header, Layout as _, MOST_BYTES, REPLY};
use crate::{Error, ProtocolError, pci};

/// Whether all copies of the other end are closed, now or later.
fn hangs_up(mut end: UnixStream) -> bool {
    end.set_read_timeout(Some(LONG)).unwrap();
    matches!(end.read(&mut [0]), Ok(0))
}

#[test]
fn every_truncation_of_every_message_ends_it_without_harm() {
    let first = [(Command::VERSION, version(0, 1, "{}\0"))];
    for (at, (command, payload)) in first.into_iter().chain(right()).enumerate() {
        let whole = message(command, 0, &payload);
        for length in 0..whole.len() {
            let (socket, served) = Served::start(Fake::new(), LONG);
            let words = Words(socket);
            let words = if at == 0 { words } else { words.agreed() };
            (&words.0).write_all(&whole[..length]).unwrap();
            drop(words);
            let (ended, mut device) = served.ended();
            assert_eq!(ended.unwrap(), Ended::ClientGone, "{command} {length}");
            assert!(device.taken().is_empty(), "{command} {length}");
        }
    }
}

#[test]
fn every_payload_that_is_shorter_or_longer_is_refused() {
    let (words, served) = start();
    for (command, payload) in right() {
        for length in (0..payload.len() + 20).filter(|&it| it != payload.len()) {
            let mut wrong = payload.clone();
            wrong.resize(length, 0);
            let refused = words.ask(command, &wrong);
            assert_eq!(refused, Err(Errno::EINVAL), "{command} of {length}");
        }
    }
    drop(words);
    let (ended, mut device) = served.ended();
    assert_eq!(ended.unwrap(), Ended::ClientGone);
    assert!(device.taken().is_empty());
}

#[test]
fn lengths_that_no_message_has_end_it_before_anything_is_allocated() {
    for size in [0, 1, 15, MOST_BYTES + 1, 1 << 31, u32::MAX] {
        let (words, served) = start();
        let header = Header {
            command: Command::DEVICE_RESET.0,
            size,
            ..Header::default()
        };
        (&words.0).write_all(&header.bytes()).unwrap();
        let ended = served.ended().0;
        assert!(
            matches!(
                ended,
                Err(Error::Protocol(ProtocolError::Length { size: said, .. })) if said == size
            ),
            "{size}: {ended:?}"
        );
    }
}

#[test]
fn what_is_no_command_ends_it() {
    for flags in [REPLY, 2, 15, REPLY | 1 << 5] {
        let (words, served) = start();
        words.say(Command::DEVICE_RESET, flags, &[], &[]);
        let (ended, mut device) = served.ended();
        assert!(
            matches!(
                ended,
                Err(Error::Protocol(ProtocolError::Unexpected { .. }))
            ),
            "{flags}: {ended:?}"
        );
        assert!(device.taken().is_empty());
    }
}

#[test]
fn nothing_is_done_before_the_version_is_agreed() {
    for (command, payload) in right() {
        let (socket, served) = Served::start(Fake::new(), LONG);
        let words = Words(socket);
        words.say(command, 0, &payload, &[]);
        let (ended, mut device) = served.ended();
        let ended = ended.unwrap_err();
        assert!(matches!(
            ended,
            Error::Protocol(ProtocolError::Unexpected { .. })
        ));
        assert!(device.taken().is_empty());
    }
}

#[test]
fn versions_and_capabilities_that_are_none_are_refused_with_the_reason() {
    let deep = format!("{}\0", "[".repeat(3000));
    let long = format!("{{}}{}\0", " ".repeat(5000));
    let refused = [
        (vec![], "no version"),
        (vec![0, 0, 1], "no version"),
        (version(1, 0, "{}\0"), "version 1.0"),
        (version(u16::MAX, 1, "{}\0"), "version 65535.1"),
        (version(0, 1, "{\0"), "capabilities: EOF"),
        (version(0, 1, "{}\0x\0"), "capabilities: trailing"),
        (version(0, 1, &deep), "capabilities: "),
        (version(0, 1, &long), "capabilities of 5003 bytes"),
        (
            version(0, 1, r#"{"capabilities":{"max_msg_fds":-1}}"#),
            "capabilities: invalid value",
        ),
        (
            version(0, 1, r#"{"capabilities":{"max_msg_fds":4294967296}}"#),
            "capabilities: invalid value",
        ),
        (
            version(0, 1, r#"{"capabilities":{"max_msg_fds":"8"}}"#),
            "capabilities: invalid type",
        ),
        (
            version(0, 1, r#"{"capabilities":{"max_msg_fds":0}}"#),
            "capabilities to receive nothing",
        ),
        (
            version(0, 1, r#"{"capabilities":{"max_data_xfer_size":0}}"#),
            "capabilities to receive nothing",
        ),
        (
            [version(0, 1, "{\""), vec![0xff]].concat(),
            "capabilities: ",
        ),
    ];
    for (payload, why) in refused {
        let (socket, served) = Served::start(Fake::new(), LONG);
        let words = Words(socket);
        assert_eq!(words.ask(Command::VERSION, &payload), Err(Errno::EINVAL));
        let ended = served.ended().0;
        let Err(Error::Protocol(ProtocolError::Payload { command, what })) = ended else {
            panic!("{ended:?} in place of {why}");
        };
        assert_eq!(command, Command::VERSION);
        assert!(what.starts_with(why), "{what} in place of {why}");
    }
    for text in ["", "\0", "{}", "{}\0", r#"{"capabilities":{"new":[1,{}]}}"#] {
        let (socket, _served) = Served::start(Fake::new(), LONG);
        let words = Words(socket);
        let agreed = words.ask(Command::VERSION, &version(0, 0, text)).unwrap();
        assert_eq!(agreed[..4], [0; 4]);
    }
}

#[test]
fn descriptors_where_none_belong_are_closed() {
    let (words, served) = start();
    for (command, payload) in right() {
        let (here, there) = UnixStream::pair().unwrap();
        // Memory has one file at most, these interrupts no eventfds.
        let descriptors = [here.as_fd(), here.as_fd()];
        let refused = words.ask_with(command, &payload, &descriptors);
        assert_eq!(refused, Err(Errno::EINVAL), "{command}");
        drop(here);
        assert!(hangs_up(there), "{command}");
    }
    // Memory that is refused leaves its file nowhere.
    let (here, there) = UnixStream::pair().unwrap();
    for wrong in [map(1, 1), map(crate::fake::NO_MEMORY, 0x1000)] {
        let refused = words.ask_with(Command::DMA_MAP, &wrong.bytes(), &[here.as_fd()]);
        assert!(refused.is_err());
    }
    drop(here);
    assert!(hangs_up(there));
    drop(words);
    assert!(served.ended().1.taken().is_empty());
}

#[test]
fn more_descriptors_than_a_message_may_carry_end_it_and_are_closed() {
    let payload = set(pci::MSIX_IRQ, 4 | 32, 0, 65);
    let whole = message(Command::DEVICE_SET_IRQS, 0, &payload);
    for (first, second) in [(65, 0), (253, 0), (40, 40)] {
        let (words, served) = start();
        let (here, there) = UnixStream::pair().unwrap();
        let halves = whole.split_at(20);
        for (bytes, count) in [(halves.0, first), (halves.1, second)] {
            let descriptors = vec![here.as_fd(); count];
            let deadline = crate::socket::Deadline::new(LONG, crate::socket::Awaited::Rest);
            // It may have hung up before the second half.
            let _ = crate::socket::send(&words.0, &[bytes], &descriptors, deadline);
        }
        let (ended, mut device) = served.ended();
        assert!(
            matches!(
                ended,
                Err(Error::Protocol(ProtocolError::Descriptors { most: 64 }))
            ),
            "{ended:?}"
        );
        assert!(device.taken().is_empty());
        drop((here, words));
        assert!(hangs_up(there));
    }
}

#[test]
fn a_client_that_stops_in_the_middle_is_given_up() {
    let short = Duration::from_millis(20);
    let (socket, served) = Served::start(Fake::new(), short);
    (&socket).write_all(&[0; 17][..10]).unwrap();
    let (ended, _) = served.ended();
    assert!(matches!(ended, Err(Error::Timeout { .. })), "{ended:?}");
}

#[test]
fn a_client_that_takes_no_replies_is_given_up() {
    let (socket, served) = Served::start(Fake::new(), Duration::from_millis(500));
    let words = Words(socket).agreed();
    // Each has a reply of a megabyte, which no socket holds.
    for _ in 0..2 {
        words.say(Command::REGION_READ, 0, &super::access(0, 0, 1 << 20), &[]);
    }
    let (ended, _) = served.ended();
    let Err(Error::Timeout { what, .. }) = ended else {
        panic!("{ended:?}");
    };
    assert_eq!(what, "the client to take the reply to REGION_READ");
}

#[test]
fn a_client_that_only_sends_is_answered_to_the_end() {
    let (words, served) = start();
    words.say(Command::DEVICE_RESET, 0, &[], &[]);
    words.0.shutdown(Shutdown::Write).unwrap();
    assert_eq!(words.hear().0, Ok(Vec::new()));
    let (ended, mut device) = served.ended();
    assert_eq!(ended.unwrap(), Ended::ClientGone);
    assert_eq!(device.taken(), ["reset ()"]);
}
