//! Servers that do not keep to the protocol, or only just.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use super::scripted::{Script, agreed, reply, version};
use crate::fake::LONG;
use crate::wire::{
    Access, COMMAND, Command, DmaUnmap, ERROR, Header, Info, Irq, Layout as _, NO_REPLY, REPLY,
    RegionRequest,
};
use crate::{Client, DmaRegion, Error, IrqAction, IrqData, ProtocolError, RegionFlags};

type Request = fn(&Client) -> Result<(), Error>;

/// Each request, and the payload of the right reply to it.
fn requests() -> Vec<(Request, Vec<u8>)> {
    let access = Access {
        offset: 8,
        region: 1,
        count: 4,
    };
    let info = Info {
        argsz: 16,
        flags: 3,
        regions: 9,
        irqs: 5,
    };
    let irq = Irq {
        argsz: 16,
        flags: 1,
        index: 2,
        count: 7,
    };
    let unmap = DmaUnmap {
        argsz: 24,
        flags: 0,
        address: 0x1000,
        size: 0x2000,
    };
    let memory = |client: &Client| {
        let region = DmaRegion {
            address: 0x1000,
            size: 0x2000,
            offset: 0,
            readable: true,
            writable: true,
        };
        client.dma_map(region, None)
    };
    vec![
        (|it| it.device_info().map(drop), info.bytes()),
        (|it| it.region_info(1).map(drop), region(0, &[]).bytes()),
        (|it| it.irq_info(2).map(drop), irq.bytes()),
        (|it| it.set_irqs(0, 0, &IrqAction::Disable), Vec::new()),
        (
            |it| it.region_read(1, 8, &mut [0; 4]),
            [access.bytes(), vec![1, 2, 3, 4]].concat(),
        ),
        (|it| it.region_write(1, 8, &[0; 4]), access.bytes()),
        (memory, Vec::new()),
        (|it| it.dma_unmap(0x1000, 0x2000), unmap.bytes()),
        (Client::reset, Vec::new()),
    ]
}

fn region(flags: u32, capabilities: &[u8]) -> RegionRequest {
    RegionRequest {
        argsz: u32::try_from(RegionRequest::SIZE + capabilities.len()).unwrap(),
        flags,
        index: 1,
        cap_offset: 32,
        size: 0x4000,
        offset: 0,
    }
}

fn is_protocol(result: &Result<(), Error>) -> bool {
    matches!(result, Err(Error::Protocol(_)))
}

#[test]
fn right_replies_are_taken() {
    for (request, payload) in requests() {
        let (client, server) = agreed(move |it| it.reply(&payload, &[]).header);
        request(&client).unwrap();
        let asked = server.join().unwrap();
        assert_eq!((asked.id, asked.flags, asked.error), (1, COMMAND, 0));
    }
}

#[test]
fn every_truncation_of_every_reply_is_the_end() {
    for (request, payload) in requests() {
        for length in 0..Header::SIZE + payload.len() {
            let payload = payload.clone();
            let (client, server) = agreed(move |it| {
                let size = u32::try_from(Header::SIZE + payload.len()).unwrap();
                let header = Header {
                    size,
                    ..reply(&it.hear())
                };
                let whole = [header.bytes(), payload].concat();
                it.write(&[&whole[..length]], &[]);
            });
            let result = request(&client);
            assert!(matches!(result, Err(Error::Closed)), "{result:?}");
            assert!(matches!(request(&client), Err(Error::Closed)));
            server.join().unwrap();
        }
    }
}

#[test]
fn every_reply_that_is_shorter_or_longer_is_none() {
    for (request, payload) in requests() {
        for length in (0..payload.len() + 9).filter(|&it| it != payload.len()) {
            // What follows a region is its capabilities.
            if payload.len() == RegionRequest::SIZE && length > payload.len() {
                continue;
            }
            let mut wrong = payload.clone();
            wrong.resize(length, 0);
            let (client, server) = agreed(move |it| it.reply(&wrong, &[]));
            let result = request(&client);
            assert!(is_protocol(&result), "{result:?}");
            assert!(matches!(request(&client), Err(Error::Closed)));
            server.join().unwrap();
        }
    }
}

#[test]
fn replies_to_something_else_are_none() {
    let wrong: [fn(Header) -> Header; 6] = [
        |it| Header { id: 2, ..it },
        |it| Header { id: 0, ..it },
        |it| Header {
            command: Command::DMA_MAP.0,
            ..it
        },
        |it| Header { command: 0, ..it },
        |it| Header { flags: 2, ..it },
        |it| Header { flags: 15, ..it },
    ];
    for wrong in wrong {
        let (client, server) = agreed(move |it| {
            it.say(wrong(reply(&it.hear())), &[], &[]);
        });
        let result = client.reset();
        assert!(
            matches!(
                result,
                Err(Error::Protocol(ProtocolError::Unexpected { .. }))
            ),
            "{result:?}"
        );
        server.join().unwrap();
    }
    for size in [0, 15, (1 << 20) + 65, u32::MAX] {
        let (client, server) = agreed(move |it| {
            let header = Header {
                size,
                ..reply(&it.hear())
            };
            it.write(&[&header.bytes()], &[]);
        });
        assert!(is_protocol(&client.reset()), "{size}");
        server.join().unwrap();
    }
}

#[test]
fn replies_about_something_else_are_none() {
    let wrong = |request: usize, byte: usize| {
        let (request, mut payload) = requests().swap_remove(request);
        payload[byte] ^= 1;
        let (client, server) = agreed(move |it| it.reply(&payload, &[]));
        let result = request(&client);
        server.join().unwrap();
        result
    };
    // The index of a region and of interrupts; offset, region and count; address and size.
    for (request, bytes) in [
        (1, vec![8]),
        (2, vec![8]),
        (4, vec![0, 8, 12]),
        (5, vec![0, 8, 12]),
        (7, vec![8, 16]),
    ] {
        for byte in bytes {
            let result = wrong(request, byte);
            assert!(is_protocol(&result), "{request} {byte}: {result:?}");
        }
    }
    // More regions, or interrupt indices, than anything has.
    for byte in [9, 13] {
        assert!(is_protocol(&wrong(0, byte)));
    }
}

#[test]
fn what_is_refused_leaves_the_connection_as_it_is() {
    let (client, server) = agreed(|it| {
        for error in [22, 0, u32::MAX] {
            let header = Header {
                flags: REPLY | ERROR,
                error,
                ..reply(&it.hear())
            };
            it.say(header, &[], &[]);
        }
        it.reply(&[], &[]);
    });
    for errno in [Errno::EINVAL, Errno::EIO, Errno::EIO] {
        let refused = client.reset().unwrap_err();
        assert!(
            matches!(refused, Error::Remote { command: Command::DEVICE_RESET, errno: e } if e == errno)
        );
    }
    client.reset().unwrap();
    server.join().unwrap();
}

#[test]
fn the_server_s_own_commands_are_refused_meanwhile() {
    let (client, server) = agreed(|it| {
        let asked = it.hear();
        let command = Header {
            id: 500,
            command: Command::DMA_READ.0,
            ..Header::default()
        };
        it.say(command, &[0; 16], &[]);
        let refused = it.hear();
        let silent = Header {
            flags: NO_REPLY,
            ..command
        };
        it.say(silent, &[0; 16], &[]);
        it.say(reply(&asked), &[], &[]);
        refused
    });
    client.reset().unwrap();
    let refused = server.join().unwrap();
    assert_eq!((refused.header.id, refused.header.command), (500, 11));
    assert_eq!(refused.header.flags, REPLY | ERROR);
    assert_eq!(refused.header.error, Errno::EOPNOTSUPP as u32);
    assert!(refused.payload.is_empty());
}

#[test]
fn a_silent_server_is_given_up() {
    let (mut client, server) = agreed(|it| it);
    client.deadline = Duration::from_millis(20);
    let server = server.join().unwrap();
    let error = client.reset().unwrap_err();
    assert_eq!(
        error.to_string(),
        "waited 20 ms for the reply to DEVICE_RESET"
    );
    // A reply that is late is nobody's.
    server.reply(&[], &[]);
    assert!(matches!(client.reset(), Err(Error::Closed)));
}

#[test]
fn a_server_that_takes_nothing_is_given_up() {
    let (mut client, server) = agreed(|it| it);
    client.deadline = Duration::from_millis(20);
    let _server = server.join().unwrap();
    let error = client.region_write(0, 0, &vec![0; 1 << 20]).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }));
}

#[test]
fn a_wait_ends_when_the_connection_is_closed_here() {
    let (client, server) = agreed(|it| {
        it.hear();
        it
    });
    thread::scope(|scope| {
        let waiting = scope.spawn(|| client.reset());
        let _server = server.join().unwrap();
        client.close();
        assert!(matches!(waiting.join().unwrap(), Err(Error::Closed)));
    });
}

#[test]
fn versions_that_are_not_spoken_here_are_refused() {
    for (payload, why) in [
        (vec![], "no version"),
        (vec![0, 0, 0], "no version"),
        (version(1, 1, "{}\0"), "version 1.1"),
        (version(0, 2, "{}\0"), "version 0.2"),
        (version(0, 1, "{\0"), "capabilities: "),
        (
            version(0, 1, r#"{"capabilities":{"max_data_xfer_size":0}}"#),
            "capabilities to receive nothing",
        ),
    ] {
        let (socket, server) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || Script(server).reply(&payload, &[]));
        let error = Client::new(socket, LONG).unwrap_err();
        let Error::Protocol(ProtocolError::Payload { command, what }) = error else {
            panic!("{error:?} in place of {why}");
        };
        assert_eq!(command, Command::VERSION);
        assert!(what.starts_with(why), "{what} in place of {why}");
        let proposed = server.join().unwrap();
        let text = r#"{"capabilities":{"max_msg_fds":64,"max_data_xfer_size":1048576,"pgsizes":4096,"org.godwit.p2p":true}}"#;
        assert_eq!(proposed.payload, version(0, 1, &format!("{text}\0")));
    }
}

#[test]
fn no_message_is_larger_than_the_server_s() {
    let (socket, server) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let it = Script(server);
        it.agree(r#"{"capabilities":{"max_msg_fds":3,"max_data_xfer_size":100}}"#);
        let mut counts = Vec::new();
        for _ in 0..3 {
            let asked = it.hear();
            let (access, data) = Access::split(&asked.payload).unwrap();
            counts.push((access.offset, data.len()));
            it.say(reply(&asked), &access.bytes(), &[]);
        }
        let eventfds = [(); 3].map(|()| it.reply(&[], &[]).descriptors.len());
        (counts, eventfds)
    });
    let client = Client::new(socket, LONG).unwrap();
    client.region_write(0, 7, &[0; 250]).unwrap();
    let (here, _there) = UnixStream::pair().unwrap();
    let eventfds = IrqData::Eventfds(vec![Some(here.as_fd()); 7]);
    client
        .set_irqs(2, 0, &IrqAction::Trigger(eventfds))
        .unwrap();
    let (counts, eventfds) = server.join().unwrap();
    assert_eq!(counts, [(7, 100), (107, 100), (207, 50)]);
    assert_eq!(eventfds, [3, 3, 1]);
}

#[test]
fn a_server_that_says_nothing_of_itself_gets_one_descriptor_at_a_time() {
    let (client, server) = agreed(|it| [(); 2].map(|()| it.reply(&[], &[]).descriptors.len()));
    let (here, _there) = UnixStream::pair().unwrap();
    let eventfds = IrqData::Eventfds(vec![Some(here.as_fd()); 2]);
    client
        .set_irqs(2, 0, &IrqAction::Trigger(eventfds))
        .unwrap();
    assert_eq!(server.join().unwrap(), [1, 1]);
}

/// What a client makes of a region, with so many files.
fn described(
    fixed: RegionRequest,
    capabilities: &[u8],
    files: usize,
) -> Result<crate::RegionInfo, Error> {
    let payload = [&fixed.bytes(), capabilities].concat();
    let (client, server) = agreed(move |it| {
        let (here, _there) = UnixStream::pair().unwrap();
        it.reply(&payload, &vec![here.as_fd(); files]);
    });
    let result = client.region_info(1);
    server.join().unwrap();
    result
}

const MMAP: u32 = 4;
const CAPS: u32 = 8;

/// A capability of areas.
fn sparse(id: u16, next: u32, count: u32, areas: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = [&id.to_le_bytes()[..], &1u16.to_le_bytes()].concat();
    bytes.extend(next.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend([0; 4]);
    for (offset, size) in areas {
        bytes.extend(offset.to_le_bytes());
        bytes.extend(size.to_le_bytes());
    }
    bytes
}

#[test]
fn capabilities_of_a_region_are_followed_to_their_end() {
    let unknown = sparse(9, 48, 0, &[]);
    let first = sparse(1, 80, 1, &[(0, 0x1000)]);
    let second = sparse(1, 0, 1, &[(0x2000, 0x2000)]);
    let capabilities = [unknown, first, vec![0; 0], second].concat();
    let info = described(region(MMAP | CAPS, &capabilities), &capabilities, 1).unwrap();
    let areas: Vec<_> = info.areas.iter().map(|it| (it.offset, it.size)).collect();
    assert_eq!(areas, [(0, 0x1000), (0x2000, 0x2000)]);
    assert!(info.file.is_some());
    // Without a file it cannot be mapped, whatever the server says; nor if it does not say so.
    for (flags, files) in [(MMAP | CAPS, 0), (CAPS, 1), (CAPS, 0)] {
        let info = described(region(flags, &capabilities), &capabilities, files).unwrap();
        assert!(!info.flags.contains(RegionFlags::MMAP));
        assert!(info.areas.is_empty() && info.file.is_none());
    }
}

#[test]
fn regions_that_cannot_be_are_none() {
    let area = |offset, size| sparse(1, 0, 1, &[(offset, size)]);
    let good = area(0, 0x1000);
    let at = |cap_offset| RegionRequest {
        cap_offset,
        ..region(MMAP | CAPS, &good)
    };
    let mut wrong = vec![
        // Capabilities that begin or go on where none are.
        (at(1), good.clone()),
        (at(31), good.clone()),
        (at(57), good.clone()),
        (at(64), good.clone()),
        (at(u32::MAX), good.clone()),
        (at(32), sparse(1, 32, 1, &[(0, 0x1000)])),
        (at(32), sparse(1, 39, 1, &[(0, 0x1000)])),
        (at(32), sparse(9, 16, 1, &[(0, 0x1000)])),
        (at(32), sparse(1, u32::MAX, 1, &[(0, 0x1000)])),
        // More areas than there are.
        (at(32), sparse(1, 0, 2, &[(0, 0x1000)])),
        (at(32), sparse(1, 0, u32::MAX, &[(0, 0x1000)])),
        // Areas outside of the region.
        (at(32), area(0, 0x4001)),
        (at(32), area(0x4000, 1)),
        (at(32), area(0x1000, 0)),
        (at(32), area(u64::MAX, 2)),
        (at(32), area(1, u64::MAX)),
        // More than was asked for.
        (
            RegionRequest {
                argsz: (16 << 10) + 1,
                ..at(32)
            },
            good.clone(),
        ),
        // Not all of it in a file.
        (
            RegionRequest {
                offset: u64::MAX,
                ..at(32)
            },
            good.clone(),
        ),
        (
            RegionRequest {
                offset: i64::MAX as u64 - 0x1000,
                ..at(32)
            },
            good.clone(),
        ),
    ];
    for length in 0..good.len() {
        wrong.push((at(32), good[..length].to_vec()));
    }
    for (fixed, capabilities) in wrong {
        let result = described(fixed, &capabilities, 1).map(drop);
        assert!(
            is_protocol(&result),
            "{fixed:?} {capabilities:?}: {result:?}"
        );
    }
    let two = described(region(MMAP, &[]), &[], 2).map(drop);
    assert!(is_protocol(&two), "{two:?}");
    let many = described(region(MMAP, &[]), &[], 65).map(drop);
    assert!(
        matches!(
            many,
            Err(Error::Protocol(ProtocolError::Descriptors { most: 64 }))
        ),
        "{many:?}"
    );
}
