//! `godwit-net` as a subject, and what is tested of it alone.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use test_framework::frontend::{Buffer, DeviceSpec, Machine, PATIENCE};
use vm_memory::GuestAddress;

use crate::subject::{Subject, options};
use host::{ETHERTYPE, Host, TAP};

mod host;
mod packets;
mod program;

/// VIRTIO_NET_F_{MAC, MRG_RXBUF, STATUS, CTRL_VQ, CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA,
/// GUEST_ANNOUNCE, CTRL_MAC_ADDR}.
const FEATURES: u64 =
    1 << 5 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23;
/// VIRTIO_NET_F_MQ.
const MQ: u64 = 1 << 22;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const HEADER: usize = 12;
/// Bytes of a receive buffer that holds any frame of these tests.
const BUFFER: usize = 2048;
/// Requests of one load on each queue.
const LOAD: usize = 10;

/// After this long without a packet the host sends another one.
const RETRANSMIT: Duration = Duration::from_millis(100);

/// A packet as the guest got it.
#[derive(Debug)]
struct Packet {
    header: Vec<u8>,
    frame: Vec<u8>,
}

/// The device and the host that it is connected to.
pub(crate) struct Net {
    host: Host,
    pairs: usize,
    control: usize,
    /// Receive buffers in flight.
    posted: BTreeMap<(usize, u16), (GuestAddress, usize)>,
    /// Frames sent by the host and not yet seen by the guest.
    coming: VecDeque<Vec<u8>>,
    /// Frames sent by the guest and not yet seen by the host.
    sent: Vec<Vec<u8>>,
    /// Where the answer to each command in flight goes.
    commands: BTreeMap<u16, GuestAddress>,
    counter: u64,
}

impl Net {
    /// With so many queue pairs, of which the driver knows all or one.
    fn with_pairs(pairs: usize, multi: bool) -> Result<Net> {
        Ok(Net {
            host: Host::new()?,
            pairs,
            control: if multi { 2 * pairs } else { 2 },
            posted: BTreeMap::new(),
            coming: VecDeque::new(),
            sent: Vec::new(),
            commands: BTreeMap::new(),
            counter: 0,
        })
    }

    /// A machine with all queues of this device, whose driver accepts also `features`.
    fn machine(&self, features: u64) -> Result<Machine> {
        let mut options = options(self);
        options.features |= features;
        options.queues = 2 * self.pairs + 1;
        Machine::start(options)
    }

    /// A frame that is like no other.
    fn frame(&mut self, to: [u8; 6], from: [u8; 6], payload: usize) -> Vec<u8> {
        self.counter += 1;
        let mut frame = [to, from].concat();
        frame.extend(ETHERTYPE.to_be_bytes());
        let number = self.counter.to_le_bytes();
        frame.extend(number.iter().cycle().take(payload.max(46)));
        frame
    }

    /// Gives the device receive buffers of `len` bytes.
    fn post(&mut self, machine: &mut Machine, pair: usize, count: usize, len: usize) -> Result<()> {
        let queue = 2 * pair;
        for _ in 0..count {
            let Machine { rings, ram, .. } = &mut *machine;
            let address = ram.allocate(len, 64)?;
            let buffer = Buffer {
                address,
                len: u32::try_from(len)?,
                writable: true,
            };
            let head = rings[queue].add(ram, &[buffer])?;
            self.posted.insert((queue, head), (address, len));
        }
        machine.rings[queue].kick()
    }

    /// Sends a frame to the guest.
    fn host_sends(&mut self, payload: usize) -> Result<Vec<u8>> {
        let frame = self.frame(MAC, PEER, payload);
        self.host.send(&frame)?;
        self.coming.push_back(frame.clone());
        Ok(frame)
    }

    /// Notes that a frame came; those before it are lost.
    fn came(&mut self, packet: &Packet) -> Result<()> {
        let at = self
            .coming
            .iter()
            .position(|frame| *frame == packet.frame)
            .with_context(|| format!("nobody sent {packet:x?}"))?;
        self.coming.drain(..=at);
        Ok(())
    }

    /// Takes the next packet, or sends one more, as networks do: what a process that died had read
    /// is lost, and what comes to its queue until the kernel has closed it, too.
    fn receive_or_send_again(&mut self, machine: &mut Machine) -> Result<()> {
        match self.receive_within(machine, 0, RETRANSMIT) {
            Ok(packet) => self.came(&packet),
            Err(_) if machine.process.has_ended() => anyhow::bail!("the device has ended"),
            Err(_) => self.host_sends(1500).map(drop),
        }
    }

    /// Waits for the next packet of a pair.
    fn receive(&mut self, machine: &mut Machine, pair: usize) -> Result<Packet> {
        self.receive_within(machine, pair, PATIENCE)
    }

    fn receive_within(
        &mut self,
        machine: &mut Machine,
        pair: usize,
        patience: Duration,
    ) -> Result<Packet> {
        let queue = 2 * pair;
        let Machine { rings, ram, .. } = machine;
        let used = rings[queue].wait_used(ram, patience)?;
        let mut bytes = self.take_buffer(ram, queue, used)?;
        let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..buffers {
            // All buffers of a packet are shown at once.
            let used = rings[queue]
                .take_used(ram)?
                .with_context(|| format!("a packet of {buffers} buffers was cut"))?;
            bytes.extend(self.take_buffer(ram, queue, used)?);
        }
        let frame = bytes.split_off(HEADER);
        Ok(Packet {
            header: bytes,
            frame,
        })
    }

    fn take_buffer(
        &mut self,
        ram: &test_framework::frontend::GuestRam,
        queue: usize,
        used: test_framework::frontend::Used,
    ) -> Result<Vec<u8>> {
        let (address, len) = self
            .posted
            .remove(&(queue, used.head))
            .with_context(|| format!("queue {queue} answered {used:?} unasked"))?;
        let written = usize::try_from(used.len)?;
        ensure!(written <= len, "{written} bytes in a buffer of {len}");
        ram.read(address, written)
    }

    /// Makes a frame available, in two buffers, and does not kick.
    fn transmit(&mut self, machine: &mut Machine, pair: usize, frame: &[u8]) -> Result<()> {
        let Machine { rings, ram, .. } = machine;
        let header = ram.allocate(HEADER, 16)?;
        let data = ram.allocate(frame.len(), 16)?;
        ram.write(header, &[0; HEADER])?;
        ram.write(data, frame)?;
        let buffer = |address, len| -> Result<Buffer> {
            Ok(Buffer {
                address,
                len: u32::try_from(len)?,
                writable: false,
            })
        };
        let buffers = [buffer(header, HEADER)?, buffer(data, frame.len())?];
        rings[2 * pair + 1].add(ram, &buffers)?;
        self.sent.push(frame.to_vec());
        Ok(())
    }

    /// Verifies that all frames that the guest sent came out. A frame may come twice when the
    /// process died in between; frames that nobody sent may not come.
    fn verify_sent(&mut self) -> Result<()> {
        let all = std::mem::take(&mut self.sent);
        let mut missing = all.clone();
        while !missing.is_empty() {
            let frame = self
                .host
                .receive(PATIENCE)?
                .with_context(|| format!("{} frames did not come out", missing.len()))?;
            missing.retain(|other| *other != frame);
        }
        Ok(())
    }

    /// Makes a command available and does not kick.
    fn submit_command(&mut self, machine: &mut Machine, command: &[u8]) -> Result<()> {
        let Machine { rings, ram, .. } = machine;
        let data = ram.allocate(command.len(), 16)?;
        ram.write(data, command)?;
        let answer = ram.allocate(1, 4096)?;
        ram.write(answer, &[0xff])?;
        let buffers = [
            Buffer {
                address: data,
                len: u32::try_from(command.len())?,
                writable: false,
            },
            Buffer {
                address: answer,
                len: 1,
                writable: true,
            },
        ];
        let head = rings[self.control].add(ram, &buffers)?;
        self.commands.insert(head, answer);
        Ok(())
    }

    /// Waits for the answer to the next command.
    fn answer(&mut self, machine: &mut Machine) -> Result<u8> {
        let Machine { rings, ram, .. } = machine;
        let used = rings[self.control].wait_used(ram, PATIENCE)?;
        let address = self
            .commands
            .remove(&used.head)
            .with_context(|| format!("{used:?} was no command"))?;
        Ok(ram.read(address, 1)?[0])
    }

    /// A command from beginning to end: whether it was accepted.
    fn command(&mut self, machine: &mut Machine, command: &[u8]) -> Result<bool> {
        self.submit_command(machine, command)?;
        machine.rings[self.control].kick()?;
        match self.answer(machine)? {
            0 => Ok(true),
            1 => Ok(false),
            other => anyhow::bail!("answer {other:#x}"),
        }
    }
}

impl Subject for Net {
    const PROGRAM: &'static str = "godwit-net";
    const KIND: &'static str = "net";
    const TYPE: &'static str = "net";
    const FEATURES: u64 = FEATURES;
    const QUEUES: usize = 3;

    fn new() -> Result<Self> {
        Net::with_pairs(1, false)
    }

    fn spec(&self) -> DeviceSpec {
        DeviceSpec {
            program: Self::PROGRAM,
            arguments: vec![
                format!("--tap={TAP}"),
                format!("--queue-pairs={}", self.pairs),
                "--mac=02:00:00:00:00:01".to_owned(),
            ],
        }
    }

    fn twin_spec(&self) -> DeviceSpec {
        self.spec()
    }

    fn exchange(&mut self, machine: &mut Machine) -> Result<()> {
        for payload in [46, 100, 1000, 1500] {
            self.host_sends(payload)?;
            // One at least, and what an earlier load left in the tap.
            while !self.coming.is_empty() {
                if machine.rings[0].in_flight() == 0 {
                    self.post(machine, 0, 1, BUFFER)?;
                }
                self.receive_or_send_again(machine)?;
            }

            let frame = self.frame(PEER, MAC, payload);
            self.transmit(machine, 0, &frame)?;
            machine.rings[1].kick()?;
            machine.rings[1].wait_used(&machine.ram, PATIENCE)?;
            self.verify_sent()?;
        }
        ensure!(self.command(machine, &[0, 1, 1])?, "ALLMULTI was refused");
        Ok(())
    }

    fn load(&mut self, machine: &mut Machine) -> Result<()> {
        self.post(machine, 0, LOAD, BUFFER)?;
        for _ in 0..LOAD {
            self.host_sends(1500)?;
            let frame = self.frame(PEER, MAC, 1500);
            self.transmit(machine, 0, &frame)?;
            machine.rings[1].kick()?;
        }
        for _ in 0..LOAD {
            self.submit_command(machine, &[0, 1, 1])?;
            machine.rings[self.control].kick()?;
        }
        Ok(())
    }

    fn settle(&mut self, machine: &mut Machine) -> Result<()> {
        while machine.rings[0].in_flight() > 0 {
            self.receive_or_send_again(machine)?;
        }
        while machine.rings[1].in_flight() > 0 {
            machine.rings[1].wait_used(&machine.ram, PATIENCE)?;
        }
        self.verify_sent()?;
        while machine.rings[self.control].in_flight() > 0 {
            ensure!(self.answer(machine)? == 0, "ALLMULTI was refused");
        }
        Ok(())
    }

    fn write_to_guest(&mut self, machine: &mut Machine) -> Result<Vec<u64>> {
        let mut pages = Vec::new();
        self.post(machine, 0, 1, BUFFER)?;
        pages.extend(self.posted.values().map(|(address, _)| address.0 & !4095));
        self.host_sends(1500)?;
        let packet = self.receive(machine, 0)?;
        self.came(&packet)?;
        let frame = self.frame(PEER, MAC, 46);
        self.transmit(machine, 0, &frame)?;
        machine.rings[1].kick()?;
        machine.rings[1].wait_used(&machine.ram, PATIENCE)?;
        self.verify_sent()?;
        self.submit_command(machine, &[0, 1, 1])?;
        pages.extend(self.commands.values().map(|address| address.0 & !4095));
        machine.rings[self.control].kick()?;
        self.answer(machine)?;
        Ok(pages)
    }

    fn change_state(&mut self, machine: &mut Machine) -> Result<()> {
        let set = self.command(machine, &[1, 1, 2, 9, 9, 9, 9, 9])?;
        ensure!(set, "the MAC address was refused");
        Ok(())
    }

    fn verify_state(&mut self, machine: &mut Machine) -> Result<()> {
        let mac = machine.connection.config(0, 6)?;
        ensure!(mac == [2, 9, 9, 9, 9, 9], "the MAC address is {mac:x?}");
        Ok(())
    }
}
