//! Network I/O: numbered probes to one peer, each answered by an echo of its content.
//!
//! ```text
//! resolve (ARP, every 200 ms) ─► probe: a window of unanswered probes ─► all answered or lost
//! ```
//!
//! Networks lose packets, so a lost probe is counted and is no error; a wrong answer is one. Pings
//! and ARP requests from others are answered all the time.

use super::devices::Account;
use super::packet::{Addresses, Frame, Incoming, MAX_PAYLOAD};
use super::pattern::mix;
use super::{Step, Task, stopping, wrong};
use crate::clock;
use crate::console::{fail, report};
use crate::protocol::{Ipv4, NetMode, Report, Text, Workload};
use crate::virtio::net::{MAX_FRAME, Nic};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const ARP_PERIOD_US: u64 = 200_000;
/// A probe is lost when it has not been answered for so long.
const PATIENCE_US: u64 = 1_000_000;
/// Unanswered UDP probes of one queue pair.
const WINDOW: usize = 8;
/// Frames that are handled before other tasks have a turn.
const BATCH: usize = 32;
const FIRST_PORT: u16 = 20_000;

#[derive(Default)]
struct Total {
    number: u32,
    sent: AtomicU64,
    received: AtomicU64,
    lost: AtomicU64,
    duplicates: AtomicU64,
    errors: AtomicU64,
    frames: AtomicU64,
    pinged: AtomicU64,
    ended: AtomicBool,
}

impl Account for Total {
    fn report(&self) -> Report {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Report::Net {
            dev: self.number,
            sent: read(&self.sent),
            received: read(&self.received),
            lost: read(&self.lost),
            dup: read(&self.duplicates),
            errors: read(&self.errors),
            frames: read(&self.frames),
            pinged: read(&self.pinged),
            end: self.ended.load(Ordering::Relaxed),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Describes a network device and hands out its work, if it has any.
pub fn assign(number: u32, nic: Nic, workload: &Workload) -> Option<Arc<dyn Account>> {
    let in_subnet = |Ipv4([a, b, c, d])| Ipv4([a, b, c.wrapping_add(number as u8), d]);
    let (ip, peer) = (in_subnet(workload.ip), in_subnet(workload.peer));
    report(&Report::Nic {
        dev: number,
        pairs: nic.pairs.len() as u16,
        offered: nic.offered,
        mac: nic
            .mac
            .iter()
            .fold(0, |mac, &byte| mac << 8 | u64::from(byte)),
        ip,
    });
    if workload.net == NetMode::Off {
        return None;
    }
    let size = usize::from(workload.packet_size);
    if !(16..=MAX_PAYLOAD).contains(&size) {
        fail("packet-size", size as u64, 0, Text::new("16-to-1400"));
    }
    let total = Arc::new(Total {
        number,
        ..Total::default()
    });
    let window = if workload.net == NetMode::Ping {
        1
    } else {
        WINDOW * nic.pairs.len()
    };
    super::assign(
        nic.cpu,
        Box::new(Talker {
            total: total.clone(),
            addresses: Addresses {
                mac: nic.mac,
                ip: ip.0,
                peer: peer.0,
                peer_mac: None,
            },
            nic,
            mode: workload.net,
            port: workload.port,
            size,
            limit: match workload.net {
                NetMode::Ping | NetMode::Udp => u64::from(workload.packets),
                _ => u64::MAX,
            },
            next_arp: 0,
            next_probe: 0,
            window: alloc::vec![None; window],
            stray_seen: 0,
        }),
    );
    Some(total)
}

#[derive(Clone, Copy)]
struct Unanswered {
    number: u64,
    since: u64,
}

/// One device's work.
struct Talker {
    total: Arc<Total>,
    nic: Nic,
    addresses: Addresses,
    mode: NetMode,
    port: u16,
    size: usize,
    /// Probes to send.
    limit: u64,
    next_arp: u64,
    next_probe: u64,
    /// Probe n waits in place n modulo the window; it is not sent while the place is taken.
    window: Vec<Option<Unanswered>>,
    stray_seen: u64,
}

impl Talker {
    fn receive_all(&mut self) -> bool {
        let mut frame = [0; MAX_FRAME];
        let mut any = false;
        for pair in 0..self.nic.pairs.len() {
            for _ in 0..BATCH {
                let Some(length) = self.nic.pairs[pair].receive(&mut frame) else {
                    break;
                };
                any = true;
                count(&self.total.frames);
                self.handle(pair, &frame[..length]);
            }
        }
        any
    }

    fn handle(&mut self, pair: usize, frame: &[u8]) {
        let answer = match self.addresses.read(frame) {
            Incoming::PeerMac(mac) => {
                self.addresses.peer_mac = Some(mac);
                return;
            }
            Incoming::ArpRequest { mac, ip } => Frame::arp_reply(&self.addresses, mac, ip),
            Incoming::EchoRequest { mac, ip, body } => {
                count(&self.total.pinged);
                Frame::echo_reply(&self.addresses, mac, ip, body)
            }
            Incoming::EchoReply(payload) | Incoming::Udp(payload) => return self.answered(payload),
            Incoming::Other => return,
        };
        // A full ring loses the answer, as networks do; the other side asks again.
        self.nic.pairs[pair].transmit(answer.bytes());
    }

    fn answered(&mut self, payload: &[u8]) {
        let number = payload
            .first_chunk()
            .map(|bytes| u64::from_le_bytes(*bytes));
        let Some(number) =
            number.filter(|&number| number < self.next_probe && self.mode != NetMode::Flood)
        else {
            return self.wrong_answer();
        };
        let mut want = [0; MAX_PAYLOAD];
        if payload != self.payload(number, &mut want) {
            return self.wrong_answer();
        }
        let place = number as usize % self.window.len();
        match self.window[place] {
            Some(waiting) if waiting.number == number => {
                self.window[place] = None;
                count(&self.total.received);
            }
            _ => count(&self.total.duplicates),
        }
    }

    fn wrong_answer(&self) {
        if self.mode == NetMode::Flood || self.mode == NetMode::Count {
            return; // nothing is expected
        }
        wrong(1);
        count(&self.total.errors);
    }

    /// A probe's number, then words that follow from it.
    fn payload<'a>(&self, number: u64, buffer: &'a mut [u8; MAX_PAYLOAD]) -> &'a [u8] {
        let payload = &mut buffer[..self.size];
        for (word, bytes) in (0u64..).zip(payload.chunks_mut(8)) {
            let value = if word == 0 {
                number
            } else {
                mix(number ^ word << 48)
            };
            bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
        }
        payload
    }

    fn send_all(&mut self, now: u64) -> bool {
        let Some(mac) = self.addresses.peer_mac else {
            return self.send_arp(now);
        };
        let mut any = false;
        for _ in 0..BATCH {
            let place = self.next_probe as usize % self.window.len();
            if self.next_probe == self.limit
                || stopping()
                || self.window[place].is_some()
                || !self.probe(mac)
            {
                break;
            }
            any = true;
            count(&self.total.sent);
            if self.mode != NetMode::Flood {
                self.window[place] = Some(Unanswered {
                    number: self.next_probe,
                    since: now,
                });
            }
            self.next_probe += 1;
        }
        any
    }

    fn send_arp(&mut self, now: u64) -> bool {
        if now < self.next_arp {
            return false;
        }
        self.next_arp = now + clock::ticks(ARP_PERIOD_US);
        self.nic.pairs[0].transmit(Frame::arp_request(&self.addresses).bytes())
    }

    fn probe(&mut self, mac: [u8; 6]) -> bool {
        let mut buffer = [0; MAX_PAYLOAD];
        let payload = self.payload(self.next_probe, &mut buffer);
        let pair = self.next_probe as usize % self.nic.pairs.len();
        let frame = if self.mode == NetMode::Ping {
            Frame::echo_request(&self.addresses, mac, self.next_probe as u16, payload)
        } else {
            // A port for each pair, so that a host that spreads flows uses them all.
            Frame::udp(
                &self.addresses,
                mac,
                FIRST_PORT + pair as u16,
                self.port,
                payload,
            )
        };
        self.nic.pairs[pair].transmit(frame.bytes())
    }

    fn give_up_late_ones(&mut self, now: u64) {
        let patience = clock::ticks(PATIENCE_US);
        for place in &mut self.window {
            if place.is_some_and(|waiting| now.saturating_sub(waiting.since) > patience) {
                *place = None;
                count(&self.total.lost);
            }
        }
    }

    fn ended(&self) -> bool {
        let sent = self.next_probe == self.limit || stopping();
        sent && self.window.iter().all(Option::is_none)
    }

    fn count_stray(&mut self) {
        let stray: u64 = self.nic.pairs.iter().map(|pair| pair.stray).sum();
        if stray > self.stray_seen {
            wrong(stray - self.stray_seen);
            self.total
                .errors
                .fetch_add(stray - self.stray_seen, Ordering::Relaxed);
            self.stray_seen = stray;
        }
    }
}

impl Task for Talker {
    fn poll(&mut self) -> Step {
        let now = clock::now();
        let received = self.receive_all();
        let sent = self.mode != NetMode::Count && self.send_all(now);
        self.nic.pairs.iter_mut().for_each(|pair| pair.kick());
        self.count_stray();
        if received || sent {
            return Step::Busy;
        }
        self.give_up_late_ones(now);
        if self.ended() {
            self.total.ended.store(true, Ordering::Relaxed);
            report(&self.total.report());
            return Step::Finished;
        }
        Step::Idle {
            until: now + clock::ticks(ARP_PERIOD_US),
        }
    }
}
