//! `godwit-blk` as a subject, and what is tested of it alone.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;
use test_framework::frontend::{Buffer, DeviceSpec, Machine, PATIENCE};
use vm_memory::GuestAddress;

use crate::subject::Subject;

mod requests;

const SECTOR: usize = 512;
const IMAGE_SECTORS: u64 = 64 << 10;
/// VIRTIO_BLK_F_{SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ}.
const FEATURES: u64 = 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12;
const WRITEBACK_AT: u32 = 32;
/// Requests of one load on each queue.
const LOAD: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    In = 0,
    Out = 1,
    Flush = 4,
    GetId = 8,
    Discard = 11,
}

/// A request in flight.
#[derive(Debug)]
struct Pending {
    kind: Kind,
    sector: u64,
    data: GuestAddress,
    len: usize,
    status: GuestAddress,
}

/// The device with its image, and what the image must hold.
pub(crate) struct Blk {
    image: NamedTempFile,
    pending: BTreeMap<(usize, u16), Pending>,
    /// By sector: the byte that each of its bytes must be.
    expected: BTreeMap<u64, u8>,
    counter: u64,
}

impl Blk {
    fn image_argument(&self) -> String {
        format!("--blk-file={}", self.image.path().display())
    }

    /// Makes a request available.
    fn submit(
        &mut self,
        machine: &mut Machine,
        queue: usize,
        kind: Kind,
        sector: u64,
        payload: &[u8],
        room: usize,
    ) -> Result<u16> {
        let header = machine.ram.allocate(16, 16)?;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&(kind as u32).to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        machine.ram.write(header, &bytes)?;
        let len = payload.len().max(room);
        let data = machine.ram.allocate(len.max(1), 4096)?;
        machine.ram.write(data, payload)?;
        let status = machine.ram.allocate(1, 1)?;
        machine.ram.write(status, &[0xff])?;
        let buffer = |address, len: usize, writable| -> Result<Buffer> {
            let len = u32::try_from(len)?;
            Ok(Buffer {
                address,
                len,
                writable,
            })
        };
        let mut buffers = vec![buffer(header, 16, false)?];
        if !payload.is_empty() {
            buffers.push(buffer(data, payload.len(), false)?);
        }
        if room > 0 {
            buffers.push(buffer(data, room, true)?);
        }
        buffers.push(buffer(status, 1, true)?);
        let Machine { rings, ram, .. } = machine;
        let head = rings[queue].add(ram, &buffers)?;
        let pending = Pending {
            kind,
            sector,
            data,
            len,
            status,
        };
        self.pending.insert((queue, head), pending);
        Ok(head)
    }

    /// Waits for the next answer of a queue and returns its status and data.
    fn finish(&mut self, machine: &mut Machine, queue: usize) -> Result<(Pending, u8, Vec<u8>)> {
        let Machine { rings, ram, .. } = machine;
        let used = rings[queue].wait_used(ram, PATIENCE)?;
        let pending = self
            .pending
            .remove(&(queue, used.head))
            .with_context(|| format!("queue {queue} answered {used:?} unasked"))?;
        let status = ram.read(pending.status, 1)?[0];
        let data = ram.read(pending.data, pending.len)?;
        Ok((pending, status, data))
    }

    /// One request, from beginning to end.
    fn request(
        &mut self,
        machine: &mut Machine,
        queue: usize,
        kind: Kind,
        sector: u64,
        payload: &[u8],
        room: usize,
    ) -> Result<(u8, Vec<u8>)> {
        self.submit(machine, queue, kind, sector, payload, room)?;
        machine.rings[queue].kick()?;
        let (_, status, data) = self.finish(machine, queue)?;
        Ok((status, data))
    }

    /// Takes the next answer, which must be a success, and verifies data that was read.
    fn verify_one(&mut self, machine: &mut Machine, queue: usize) -> Result<()> {
        let (pending, status, data) = self.finish(machine, queue)?;
        ensure!(status == 0, "{pending:?} ended with status {status}");
        if pending.kind == Kind::In {
            for (at, sector) in (pending.sector..).zip(data.chunks(SECTOR)) {
                let expected = self.expected.get(&at).copied().unwrap_or(0);
                ensure!(
                    sector.iter().all(|byte| *byte == expected),
                    "sector {at} reads as {:#x}, not {expected:#x}",
                    sector[0]
                );
            }
        }
        Ok(())
    }

    /// A byte that tells one write from another.
    fn next_byte(&mut self) -> u8 {
        self.counter += 1;
        u8::try_from(self.counter % 255).unwrap_or(0) + 1
    }

    /// The image itself, past the device.
    fn verify_image(&self) -> Result<()> {
        let mut sector = [0; SECTOR];
        for (at, expected) in &self.expected {
            let offset = at * SECTOR as u64;
            self.image.as_file().read_exact_at(&mut sector, offset)?;
            ensure!(
                sector.iter().all(|byte| byte == expected),
                "sector {at} of the image is {:#x}, not {expected:#x}",
                sector[0]
            );
        }
        Ok(())
    }

    /// Where a queue's requests go, so that queues do not overwrite each other's sectors.
    fn sector_of(queue: usize, at: usize) -> u64 {
        (queue * 4096 + at * 16) as u64
    }
}

impl Subject for Blk {
    const PROGRAM: &'static str = "godwit-blk";
    const KIND: &'static str = "blk";
    const TYPE: &'static str = "block";
    const FEATURES: u64 = FEATURES;
    const QUEUES: usize = 3;

    fn new() -> Result<Self> {
        let image = NamedTempFile::new()?;
        image.as_file().set_len(IMAGE_SECTORS * SECTOR as u64)?;
        Ok(Blk {
            image,
            pending: BTreeMap::new(),
            expected: BTreeMap::new(),
            counter: 0,
        })
    }

    fn spec(&self) -> DeviceSpec {
        DeviceSpec {
            program: Self::PROGRAM,
            arguments: vec![
                self.image_argument(),
                format!("--num-queues={}", Self::QUEUES),
                "--serial=conformance".to_owned(),
            ],
        }
    }

    fn twin_spec(&self) -> DeviceSpec {
        let mut spec = self.spec();
        spec.arguments.push("--lock=off".to_owned());
        spec
    }

    fn exchange(&mut self, machine: &mut Machine) -> Result<()> {
        for queue in 0..Self::QUEUES {
            for at in 0..4 {
                let (sector, byte) = (Self::sector_of(queue, 1000 + at), self.next_byte());
                let data = vec![byte; 8 * SECTOR];
                self.submit(machine, queue, Kind::Out, sector, &data, 0)?;
                self.expected
                    .extend((sector..sector + 8).map(|at| (at, byte)));
            }
            machine.rings[queue].kick()?;
            for _ in 0..4 {
                self.verify_one(machine, queue)?;
            }
            self.submit(machine, queue, Kind::Flush, 0, &[], 0)?;
            for at in 0..4 {
                let sector = Self::sector_of(queue, 1000 + at);
                self.submit(machine, queue, Kind::In, sector, &[], 8 * SECTOR)?;
            }
            machine.rings[queue].kick()?;
            for _ in 0..5 {
                self.verify_one(machine, queue)?;
            }
        }
        self.verify_image()
    }

    fn load(&mut self, machine: &mut Machine) -> Result<()> {
        for queue in 0..Self::QUEUES {
            for at in 0..LOAD {
                let (sector, byte) = (Self::sector_of(queue, at), self.next_byte());
                let data = vec![byte; 16 * SECTOR];
                self.submit(machine, queue, Kind::Out, sector, &data, 0)?;
                self.expected
                    .extend((sector..sector + 16).map(|at| (at, byte)));
                machine.rings[queue].kick()?;
            }
        }
        Ok(())
    }

    fn settle(&mut self, machine: &mut Machine) -> Result<()> {
        for queue in 0..Self::QUEUES {
            while machine.rings[queue].in_flight() > 0 {
                self.verify_one(machine, queue)?;
            }
        }
        ensure!(self.pending.is_empty(), "lost: {:?}", self.pending);
        self.verify_image()
    }

    fn write_to_guest(&mut self, machine: &mut Machine) -> Result<Vec<u64>> {
        let mut pages = Vec::new();
        for queue in 0..Self::QUEUES {
            let head = self.submit(machine, queue, Kind::In, 0, &[], 3 * 4096)?;
            let pending = &self.pending[&(queue, head)];
            pages.extend((0..3).map(|page| pending.data.0 + page * 4096));
            pages.push(pending.status.0 & !4095);
            machine.rings[queue].kick()?;
            self.verify_one(machine, queue)?;
        }
        Ok(pages)
    }

    fn change_state(&mut self, machine: &mut Machine) -> Result<()> {
        machine.connection.set_config(WRITEBACK_AT, &[0])
    }

    fn verify_state(&mut self, machine: &mut Machine) -> Result<()> {
        let mode = machine.connection.config(WRITEBACK_AT, 1)?;
        ensure!(mode == [0], "the cache mode is {mode:?}");
        Ok(())
    }
}
