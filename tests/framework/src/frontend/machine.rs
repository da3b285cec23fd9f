//! A machine with one device and no guest.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use migration::rings::{self, RingBase};
use tempfile::TempDir;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use super::connection::Connection;
use super::process::{DeviceProcess, DeviceSpec};
use super::ram::GuestRam;
use super::ring::Ring;

/// What the machine is made of.
#[derive(Clone, Debug)]
pub struct MachineOptions {
    /// The device.
    pub device: DeviceSpec,
    /// Feature bits that are accepted where they are offered.
    pub features: u64,
    /// Number of rings.
    pub queues: usize,
    /// Entries of each.
    pub queue_size: u16,
    /// Whether the rings use event indices.
    pub event_idx: bool,
    /// Whether requests in flight are recorded.
    pub inflight: bool,
}

/// Bytes of guest memory.
const RAM_SIZE: usize = 64 << 20;

/// The machine. Its memory and rings outlive the device process, as a guest does.
pub struct Machine {
    options: MachineOptions,
    folder: TempDir,
    generation: u32,
    /// Guest memory.
    pub ram: GuestRam,
    /// The rings, by queue.
    pub rings: Vec<Ring>,
    bases: Vec<u16>,
    inflight: Option<(VhostUserInflight, File)>,
    /// The process.
    pub process: DeviceProcess,
    /// The connection to it.
    pub connection: Connection,
}

impl Machine {
    /// Starts the device process and its rings.
    pub fn start(options: MachineOptions) -> Result<Self> {
        let mut machine = Self::connect(options)?;
        machine.start_rings()?;
        Ok(machine)
    }

    /// Starts the device process, with memory and without rings.
    pub fn connect(options: MachineOptions) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut ram = GuestRam::new(0x10_0000, RAM_SIZE)?;
        let rings = (0..options.queues)
            .map(|_| Ring::new(&mut ram, options.queue_size, options.event_idx))
            .collect::<Result<Vec<_>>>()?;
        let process = DeviceProcess::start(&options.device, &generation(&folder, 0)?)?;
        let connection = Connection::open(process.socket(), options.features, options.event_idx)?;
        let mut machine = Machine {
            bases: vec![0; rings.len()],
            folder,
            generation: 0,
            ram,
            rings,
            inflight: None,
            process,
            connection,
            options,
        };
        machine.introduce()?;
        Ok(machine)
    }

    /// Tells a new connection what it needs before the rings.
    fn introduce(&mut self) -> Result<()> {
        self.connection.set_memory(&[&self.ram])?;
        if self.options.inflight {
            if self.inflight.is_none() {
                let queues = u16::try_from(self.rings.len())?;
                let made = self
                    .connection
                    .make_inflight(queues, self.options.queue_size)?;
                self.inflight = Some(made);
            }
            let inflight = self.inflight.as_ref().context("it was just made")?;
            self.connection.set_inflight(inflight)?;
        }
        Ok(())
    }

    /// Starts all rings where they were stopped.
    pub fn start_rings(&mut self) -> Result<()> {
        for (at, ring) in self.rings.iter().enumerate() {
            self.connection
                .start_ring(at, ring, &self.ram, self.bases[at])?;
        }
        Ok(())
    }

    /// Has the device know all rings and serve none, as a machine does before it moves in.
    pub fn wire_rings(&mut self) -> Result<()> {
        for (at, ring) in self.rings.iter().enumerate() {
            self.connection
                .set_up_ring(at, ring, &self.ram, self.bases[at])?;
        }
        Ok(())
    }

    /// Starts all wired rings where they were stopped, by one message.
    ///
    /// # Errors
    /// The device's reason, if it cannot.
    pub fn start_wired(&mut self) -> Result<()> {
        let ring = |(index, base)| RingBase { index, base };
        let rings: Vec<_> = (0..).zip(self.bases.iter().copied()).map(ring).collect();
        let refused = self
            .connection
            .wired(rings::START, &rings::encode(&rings))?;
        ensure!(refused.is_empty(), "{}", String::from_utf8_lossy(&refused));
        Ok(())
    }

    /// Stops all rings by one message, which leaves them wired; how many ran.
    pub fn stop_wired(&mut self) -> Result<usize> {
        let answer = self.connection.wired(rings::STOP, &0u32.to_ne_bytes())?;
        self.note_bases(&answer)
    }

    /// As [`Self::stop_wired`], and the device saves its state at once, by the same message; and gives
    /// up what only one process may have, if it `leaves`.
    pub fn stop_and_save(&mut self, leaves: bool) -> Result<(usize, Vec<u8>)> {
        let (answer, state) = self.connection.stop_and_save(leaves)?;
        Ok((self.note_bases(&answer)?, state))
    }

    fn note_bases(&mut self, answer: &[u8]) -> Result<usize> {
        let stopped = rings::decode(answer).context("an answer to STOP that is none")?;
        for ring in &stopped {
            let base = self.bases.get_mut(usize::from(ring.index));
            *base.context("a ring that there is not")? = ring.base;
        }
        Ok(stopped.len())
    }

    /// Stops all rings.
    pub fn stop_rings(&mut self) -> Result<()> {
        for at in 0..self.rings.len() {
            self.bases[at] = self.connection.stop_ring(at)?;
        }
        Ok(())
    }

    /// The index at which each ring was stopped.
    pub fn bases(&self) -> &[u16] {
        &self.bases
    }

    /// Disconnects from the process and connects again, rings and all.
    pub fn reconnect(&mut self) -> Result<()> {
        self.stop_rings()?;
        self.connection.disconnect();
        self.connection = self.open()?;
        self.introduce()?;
        self.start_rings()
    }

    /// Cuts the connection with requests in flight and connects again.
    pub fn reconnect_roughly(&mut self) -> Result<()> {
        self.connection.disconnect();
        self.connection = self.open()?;
        self.introduce()?;
        self.forget_bases()?;
        self.start_rings()
    }

    fn open(&self) -> Result<Connection> {
        Connection::open(
            self.process.socket(),
            self.options.features,
            self.options.event_idx,
        )
    }

    /// Starts another process for the device in the place of one that is gone, as a front-end does
    /// that knows nothing but the rings.
    pub fn replace_process(&mut self) -> Result<()> {
        self.generation += 1;
        let folder = generation(&self.folder, self.generation)?;
        self.process = DeviceProcess::start(&self.options.device, &folder)?;
        self.connection = self.open()?;
        self.introduce()?;
        self.forget_bases()?;
        self.start_rings()
    }

    /// Takes the used indices for the bases: what is known when a process died.
    fn forget_bases(&mut self) -> Result<()> {
        for (base, ring) in self.bases.iter_mut().zip(&self.rings) {
            *base = ring.used_index(&self.ram)?;
        }
        Ok(())
    }

    /// Moves the device to another process: stop, save, end, load, resume. `device` is what is
    /// started there. The state is returned.
    pub fn move_to(&mut self, device: DeviceSpec) -> Result<Vec<u8>> {
        self.stop_rings()?;
        let state = self.connection.save()?;
        self.options.device = device;
        self.generation += 1;
        let folder = generation(&self.folder, self.generation)?;
        let successor = DeviceProcess::start(&self.options.device, &folder)?;
        let predecessor = std::mem::replace(&mut self.process, successor);
        self.connection = self.open()?;
        self.introduce()?;
        self.connection.load(&state)?;
        drop(predecessor);
        self.start_rings()?;
        Ok(state)
    }

    /// Resets the device, as a guest that reboots does, and starts with empty rings.
    pub fn reset(&mut self) -> Result<()> {
        self.connection.frontend().reset_device()?;
        let (size, event_idx) = (self.options.queue_size, self.options.event_idx);
        for ring in &mut self.rings {
            *ring = Ring::new(&mut self.ram, size, event_idx)?;
        }
        self.bases.fill(0);
        self.start_rings()
    }
}

fn generation(folder: &TempDir, number: u32) -> Result<PathBuf> {
    let path = folder.path().join(number.to_string());
    std::fs::create_dir_all(&path)?;
    Ok(path)
}
