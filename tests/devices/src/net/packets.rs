//! Packets and commands: what the conformance cases cannot know of.

use std::io::Write as _;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use test_framework::frontend::{Buffer, Machine, PATIENCE};
use test_framework::network::Frames;

use super::{BUFFER, HEADER, MAC, MQ, Net, PEER, Packet};

/// VIRTIO_NET_F_CSUM, GUEST_CSUM, CTRL_GUEST_OFFLOADS.
const CSUM: u64 = 1 | 1 << 1 | 1 << 2;
/// VIRTIO_NET_F_GUEST_USO4, GUEST_USO6.
const GUEST_USO: u64 = 1 << 54 | 1 << 55;
/// Long enough for a packet that comes, short enough to wait for one that must not.
const A_MOMENT: Duration = Duration::from_millis(50);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
const ECHO_PORT: u16 = 7;

#[test]
fn a_packet_takes_as_many_buffers_as_it_needs() -> Result<()> {
    let mut net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(0)?;
    net.post(&mut machine, 0, 60, 256)?;
    for (payload, buffers) in [(46, 1), (230, 1), (231, 2), (1500, 6), (46, 1), (1500, 6)] {
        let frame = net.host_sends(payload)?;
        let packet = net.receive(&mut machine, 0)?;
        assert_eq!(packet.frame, frame);
        assert_eq!(packet.header[..10], [0; 10]);
        assert_eq!(packet.header[10..], [buffers, 0], "{payload}");
    }
    Ok(())
}

#[test]
fn packets_wait_for_buffers_and_for_rings_that_are_stopped() -> Result<()> {
    let mut net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(0)?;
    for round in 0..4 {
        let stopped = round % 2 == 1;
        if stopped {
            net.post(&mut machine, 0, 10, BUFFER)?;
            machine.stop_rings()?;
        }
        let frames = (0..40)
            .map(|_| net.host_sends(1000))
            .collect::<Result<Vec<_>>>()?;
        if stopped {
            machine.start_rings()?;
        }
        for (at, frame) in frames.iter().enumerate() {
            if !stopped || at >= 10 {
                net.post(&mut machine, 0, 1, BUFFER)?;
            }
            let packet = net.receive(&mut machine, 0)?;
            ensure!(packet.frame == *frame, "frame {at} of round {round}");
        }
    }
    Ok(())
}

#[test]
fn a_packet_waits_for_as_many_buffers_as_it_needs() -> Result<()> {
    let mut net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(0)?;
    for round in 0..10 {
        let (large, small) = (net.host_sends(1500)?, net.host_sends(46)?);
        // Fewer than it needs, in steps that are each seen for themselves.
        let used = machine.rings[0].used_index(&machine.ram)?;
        for _ in 0..5 {
            net.post(&mut machine, 0, 1, 256)?;
            std::thread::sleep(Duration::from_millis(2));
            let now = machine.rings[0].used_index(&machine.ram)?;
            ensure!(now == used, "half a packet in round {round}");
        }
        if round % 2 == 1 {
            machine.stop_rings()?;
            machine.start_rings()?;
        }
        net.post(&mut machine, 0, 2, 256)?;
        let packet = net.receive(&mut machine, 0)?;
        ensure!(packet.frame == large, "another packet in round {round}");
        assert_eq!(packet.header[10..], [6, 0]);
        let packet = net.receive(&mut machine, 0)?;
        ensure!(packet.frame == small, "out of order in round {round}");
    }
    Ok(())
}

#[test]
fn only_wanted_packets_come() -> Result<()> {
    let mut net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(0)?;
    ensure!(net.command(&mut machine, &[0, 0, 0])?);
    ensure!(net.command(&mut machine, &[0, 1, 0])?);
    net.post(&mut machine, 0, 8, BUFFER)?;
    let other = net.frame([2, 7, 7, 7, 7, 7], PEER, 100);
    net.host.send(&other)?;
    let group = net.frame([1, 0, 0x5e, 0, 0, 9], PEER, 100);
    net.host.send(&group)?;
    let broadcast = net.frame([0xff; 6], PEER, 100);
    net.host.send(&broadcast)?;
    assert_eq!(net.receive(&mut machine, 0)?.frame, broadcast);
    let own = net.host_sends(100)?;
    assert_eq!(net.receive(&mut machine, 0)?.frame, own);
    // Everything again.
    ensure!(net.command(&mut machine, &[0, 0, 1])?);
    net.host.send(&other)?;
    assert_eq!(net.receive(&mut machine, 0)?.frame, other);
    Ok(())
}

#[test]
fn malformed_packets_are_dropped_and_the_next_one_passes() -> Result<()> {
    let mut net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(0)?;
    let address = machine.ram.allocate(200_000, 4096)?;
    for (len, gso_type) in [
        (1, 0),
        (HEADER, 0),
        (HEADER + 13, 0),
        (200_000, 0),
        (100, 77),
        (100, 1),
    ] {
        machine.ram.write(address, &[0, gso_type])?;
        let buffer = Buffer {
            address,
            len: u32::try_from(len)?,
            writable: false,
        };
        let Machine { rings, ram, .. } = &mut machine;
        rings[1].add(ram, &[buffer])?;
        rings[1].kick()?;
        rings[1].wait_used(ram, PATIENCE)?;
        ensure!(net.host.receive(A_MOMENT)?.is_none(), "{len} {gso_type}");
        net.transmit(
            &mut machine,
            0,
            &[&PEER[..], &MAC, &[0x88, 0xb5, 0, 0]].concat(),
        )?;
        machine.rings[1].kick()?;
        machine.rings[1].wait_used(&machine.ram, PATIENCE)?;
        ensure!(net.host.receive(PATIENCE)?.is_some(), "{len} {gso_type}");
    }
    Ok(())
}

#[test]
fn a_receive_buffer_that_cannot_be_written_breaks_the_queue_only() -> Result<()> {
    let mut net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(0)?;
    let Machine { rings, ram, .. } = &mut machine;
    let address = ram.allocate(64, 64)?;
    let buffer = Buffer {
        address,
        len: 64,
        writable: false,
    };
    rings[0].add(ram, &[buffer])?;
    rings[0].kick()?;
    rings[0].wait_broken(PATIENCE)?;
    ensure!(net.command(&mut machine, &[0, 0, 1])?);
    machine.stop_rings()?;
    Ok(())
}

#[test]
fn malformed_commands_are_answered_with_an_error() -> Result<()> {
    let mut net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(0)?;
    for command in [&[0][..], &[0, 0], &[0, 0, 7], &[9, 9, 9], &[4, 0, 1, 0]] {
        ensure!(!net.command(&mut machine, command)?, "{command:?}");
    }
    ensure!(!net.command(&mut machine, &vec![1; 100_000])?);
    ensure!(net.command(&mut machine, &[0, 0, 1])?);
    // Without room for an answer there is nobody to tell.
    let Machine { rings, ram, .. } = &mut machine;
    let address = ram.allocate(16, 16)?;
    let buffer = Buffer {
        address,
        len: 3,
        writable: false,
    };
    rings[2].add(ram, &[buffer])?;
    rings[2].kick()?;
    rings[2].wait_broken(PATIENCE)?;
    machine.stop_rings()?;
    Ok(())
}

#[test]
fn a_driver_is_asked_to_announce_itself_after_a_move() -> Result<()> {
    let mut net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(0)?;
    assert_eq!(machine.connection.config(6, 2)?, [1, 0]);
    ensure!(net.command(&mut machine, &[0, 0, 0])?);
    let twin = crate::subject::Subject::spec(&net);
    machine.move_to(twin)?;
    assert_eq!(machine.connection.config(6, 2)?, [3, 0]);
    ensure!(net.command(&mut machine, &[3, 0])?);
    assert_eq!(machine.connection.config(6, 2)?, [1, 0]);
    // The filter came along: only what is wanted is ever seen, however often both are sent.
    net.post(&mut machine, 0, 1, BUFFER)?;
    let other = net.frame([2, 7, 7, 7, 7, 7], PEER, 100);
    while machine.rings[0].in_flight() > 0 {
        net.host.send(&other)?;
        net.receive_or_send_again(&mut machine)?;
    }
    Ok(())
}

#[test]
fn a_reverse_request_is_sent_when_asked_for() -> Result<()> {
    let net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(0)?;
    let frames = Frames::listen()?;
    let mut stream: &UnixStream = machine.connection.stream();
    // SEND_RARP, version 1, 8 bytes of which 6 are the address
    let mut message: Vec<u8> = [19u32, 1, 8].iter().flat_map(|w| w.to_ne_bytes()).collect();
    message.extend([2, 9, 9, 9, 9, 9, 0, 0]);
    stream.write_all(&message)?;
    let is_rarp = |frame: &[u8]| frame.get(12..14) == Some(&[0x80, 0x35]);
    let frame = frames.wait(is_rarp, PATIENCE)?;
    assert_eq!(
        frame[..12],
        *b"\xff\xff\xff\xff\xff\xff\x02\x09\x09\x09\x09\x09"
    );
    // The session goes on.
    assert_eq!(machine.connection.config(6, 2)?, [1, 0]);
    Ok(())
}

impl Net {
    /// The guest's IP stack: answers ARP, and returns the next packet that is UDP.
    fn receive_udp(&mut self, machine: &mut Machine, pair: usize) -> Result<Packet> {
        loop {
            let packet = self.receive(machine, pair)?;
            self.post(machine, pair, 1, BUFFER)?;
            if self.answer_arp(machine, pair, &packet.frame)? {
                continue;
            }
            if packet.frame.get(12..14) == Some(&[8, 0]) && packet.frame[23] == 17 {
                return Ok(packet);
            }
        }
    }

    fn answer_arp(&mut self, machine: &mut Machine, pair: usize, frame: &[u8]) -> Result<bool> {
        if frame.get(12..14) != Some(&[8, 6]) {
            return Ok(false);
        }
        let mut reply = [&frame[6..12], &MAC, &frame[12..20], &[0, 2], &MAC].concat();
        reply.extend([&GUEST.octets()[..], &frame[22..32]].concat());
        self.send_plainly(machine, pair, &reply, [0; HEADER])?;
        Ok(true)
    }

    fn send_plainly(
        &mut self,
        machine: &mut Machine,
        pair: usize,
        frame: &[u8],
        header: [u8; HEADER],
    ) -> Result<()> {
        let Machine { rings, ram, .. } = machine;
        let bytes = [&header[..], frame].concat();
        let address = ram.allocate(bytes.len(), 16)?;
        ram.write(address, &bytes)?;
        let buffer = Buffer {
            address,
            len: u32::try_from(bytes.len())?,
            writable: false,
        };
        let ring = &mut rings[2 * pair + 1];
        ring.add(ram, &[buffer])?;
        ring.kick()?;
        ring.wait_used(ram, PATIENCE)?;
        Ok(())
    }

    fn udp_socket(&self) -> Result<UdpSocket> {
        self.host.set_address(HOST)?;
        let socket = UdpSocket::bind((HOST, 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    }
}

/// The datagram in `frame`, sent back.
fn echo(frame: &[u8]) -> Vec<u8> {
    let mut back = [&frame[6..12], &frame[..6], &frame[12..26]].concat();
    back.extend([&frame[30..34], &frame[26..30]].concat());
    back.extend([&frame[36..38], &frame[34..36], &frame[38..]].concat());
    back
}

#[test]
fn a_real_socket_is_echoed() -> Result<()> {
    let mut net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(0)?;
    let socket = net.udp_socket()?;
    net.post(&mut machine, 0, 16, BUFFER)?;
    for round in 0..50u8 {
        let message = vec![round; 1 + usize::from(round) * 20];
        socket.send_to(&message, (GUEST, ECHO_PORT))?;
        let packet = net.receive_udp(&mut machine, 0)?;
        // Nothing was left to the guest: it accepted no offload.
        assert_eq!(packet.header[..2], [0, 0]);
        net.send_plainly(&mut machine, 0, &echo(&packet.frame), [0; HEADER])?;
        let mut answer = [0; 2000];
        let (len, from) = socket.recv_from(&mut answer)?;
        assert_eq!(from, (GUEST, ECHO_PORT).into());
        assert_eq!(answer[..len], message);
    }
    Ok(())
}

#[test]
fn offloads_are_used_as_far_as_the_driver_takes_them() -> Result<()> {
    let mut net = Net::with_pairs(1, false)?;
    let mut machine = net.machine(CSUM | GUEST_USO)?;
    let uso = machine.connection.features() & GUEST_USO == GUEST_USO;
    let socket = net.udp_socket()?;
    net.post(&mut machine, 0, 50, BUFFER)?;
    socket.send_to(&[1; 100], (GUEST, ECHO_PORT))?;
    let packet = net.receive_udp(&mut machine, 0)?;
    assert_eq!(
        packet.header[0], 1,
        "the checksum was not left to the guest"
    );

    // Back with the checksum left to the host, as virtio's header says: from byte 34, at 6.
    let mut header = [0; HEADER];
    header[0] = 1;
    header[6..8].copy_from_slice(&34u16.to_le_bytes());
    header[8..10].copy_from_slice(&6u16.to_le_bytes());
    net.send_plainly(&mut machine, 0, &echo(&packet.frame), header)?;
    let mut answer = [0; 2000];
    assert_eq!(socket.recv_from(&mut answer)?.0, 100);

    if uso {
        setsockopt(&socket, sockopt::UdpGsoSegment, &1000)?;
        let message: Vec<u8> = (0..20_000u32).map(|at| at.to_le_bytes()[0]).collect();
        socket.send_to(&message, (GUEST, ECHO_PORT))?;
        let packet = net.receive_udp(&mut machine, 0)?;
        assert_eq!(packet.header[1], 5, "it was segmented");
        assert_eq!(packet.header[10..], [10, 0]);
        assert_eq!(packet.frame[42..], message);
        // Until the driver takes it no longer.
        net.post(&mut machine, 0, 9, BUFFER)?;
        let mut command = vec![5, 0];
        command.extend((1u64 << 1).to_le_bytes());
        ensure!(net.command(&mut machine, &command)?);
        socket.send_to(&message, (GUEST, ECHO_PORT))?;
        for part in message.chunks(1000) {
            let packet = net.receive_udp(&mut machine, 0)?;
            assert_eq!(packet.header[1], 0);
            assert_eq!(packet.frame[42..], *part);
        }
    }
    Ok(())
}

#[test]
fn flows_spread_over_the_pairs_that_the_driver_uses() -> Result<()> {
    const PAIRS: usize = 4;
    const FLOWS: u16 = 64;
    let mut net = Net::with_pairs(PAIRS, true)?;
    let mut machine = net.machine(MQ)?;
    assert_eq!(machine.connection.config(8, 2)?, [4, 0]);
    let socket = net.udp_socket()?;
    net.post(&mut machine, 0, 60, BUFFER)?;
    socket.send_to(b"hello", (GUEST, 1000))?;
    net.receive_udp(&mut machine, 0)?;
    let count = |net: &mut Net, machine: &mut Machine, again: bool| -> Result<[usize; PAIRS]> {
        for flow in 0..FLOWS {
            socket.send_to(&flow.to_le_bytes(), (GUEST, 1000 + flow))?;
        }
        let mut sent = std::time::Instant::now();
        let mut seen = [0; PAIRS];
        let mut missing: std::collections::BTreeSet<_> = (0..FLOWS).collect();
        let deadline = std::time::Instant::now() + PATIENCE;
        while !missing.is_empty() {
            ensure!(
                std::time::Instant::now() < deadline,
                "flows {missing:?} were lost, {seen:?} came: {}",
                machine.process.log()
            );
            if again && sent.elapsed() > A_MOMENT {
                for flow in &missing {
                    socket.send_to(&flow.to_le_bytes(), (GUEST, 1000 + flow))?;
                }
                sent = std::time::Instant::now();
            }
            for (pair, seen) in seen.iter_mut().enumerate() {
                let Ok(packet) = net.receive_within(machine, pair, Duration::from_millis(1)) else {
                    continue;
                };
                net.post(machine, pair, 1, BUFFER)?;
                if net.answer_arp(machine, pair, &packet.frame)? || packet.frame[23] != 17 {
                    continue;
                }
                let flow = packet.frame.get(42..44).context("a flow's number")?;
                let flow = u16::from_le_bytes([flow[0], flow[1]]);
                ensure!(missing.remove(&flow) || again, "flow {flow} came twice");
                *seen += 1;
            }
        }
        Ok(seen)
    };
    for pair in 1..PAIRS {
        net.post(&mut machine, pair, 60, BUFFER)?;
    }
    assert_eq!(
        count(&mut net, &mut machine, false).context("one pair")?,
        [64, 0, 0, 0]
    );
    ensure!(net.command(&mut machine, &[4, 0, 4, 0])?);
    let spread = count(&mut net, &mut machine, false).context("four pairs")?;
    ensure!(spread.iter().all(|seen| *seen > 0), "{spread:?}");
    ensure!(!net.command(&mut machine, &[4, 0, 5, 0])?);
    ensure!(net.command(&mut machine, &[4, 0, 2, 0])?);
    let spread = count(&mut net, &mut machine, false).context("two pairs")?;
    ensure!(spread[2..] == [0, 0], "{spread:?}");
    // The number of pairs goes along. The kernel closes the queues of a process that was killed a
    // moment after its end is seen, and what they hold is lost: it is sent again.
    let twin = crate::subject::Subject::spec(&net);
    machine.move_to(twin)?;
    let spread = count(&mut net, &mut machine, true).context("moved")?;
    ensure!(spread[2..] == [0, 0] && spread[1] > 0, "{spread:?}");
    Ok(())
}

#[test]
fn a_driver_without_mq_has_its_control_queue_behind_the_first_pair() -> Result<()> {
    let mut net = Net::with_pairs(4, false)?;
    let mut machine = net.machine(0)?;
    net.post(&mut machine, 0, 10, BUFFER)?;
    ensure!(net.command(&mut machine, &[0, 1, 1])?);
    for _ in 0..10 {
        let frame = net.host_sends(100)?;
        assert_eq!(net.receive(&mut machine, 0)?.frame, frame);
    }
    Ok(())
}
