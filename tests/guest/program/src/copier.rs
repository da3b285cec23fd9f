//! The copying device: `godwit-vfio --synthetic`, a PCI device that is not virtio. Its registers are
//! described with its program.

use crate::console::fail;
use crate::interrupts::{self, Vector};
use crate::mmio;
use crate::pci::{Function, MsixTable, Window};
use crate::protocol::Text;
use crate::virtio::Setup;
use crate::work::Spread;

const VENDOR: u16 = 0x1234;
const DEVICE: u16 = 0x6077;
const ID: u32 = 0x5444_5747;
const VERSION: u32 = 1;

/// Registers, in the first BAR.
mod register {
    pub const ID: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const SCRATCH: u64 = 0x08;
    pub const STATUS: u64 = 0x0c;
    pub const SOURCE: u64 = 0x10;
    pub const DESTINATION: u64 = 0x18;
    pub const LENGTH: u64 = 0x20;
    pub const VECTOR: u64 = 0x24;
    pub const COMMAND: u64 = 0x28;
    pub const ERROR: u64 = 0x2c;
    pub const COPIES: u64 = 0x30;
    pub const BYTES: u64 = 0x38;
}

const COPY: u32 = 1;
const DONE: u32 = 1;

/// Vectors of the device.
pub const VECTORS: usize = 4;
/// Bytes of its memory.
pub const MEMORY: u64 = 0x8000;

/// What a command is about.
#[derive(Clone, Copy)]
pub struct Order {
    pub source: u64,
    pub destination: u64,
    pub length: u32,
    /// Number of the vector that tells the end.
    pub vector: u32,
}

/// A copying device that answers.
pub struct Copier {
    registers: u64,
    memory: u64,
    vectors: [Vector; VECTORS],
    /// Whether interrupts arrive.
    pub interrupts: bool,
    /// The CPU that interrupts go to.
    pub cpu: usize,
    pub timeout_us: u64,
}

impl Copier {
    /// Whether `function` is one.
    pub fn is(function: &Function) -> bool {
        (function.vendor, function.device) == (VENDOR, DEVICE)
    }

    pub fn start(
        function: &Function,
        window: &mut Window<'_>,
        setup: Setup,
        spread: &mut Spread,
    ) -> Self {
        let (registers, memory) = (function.bar(0, window), function.bar(2, window));
        let bar = |index| match index {
            0 => registers,
            2 => memory,
            _ => fail("copier-table", index.into(), 0, Text::new("bar")),
        };
        let mut capabilities = function.capabilities().into_iter();
        let msix = capabilities.rfind(|(id, _)| *id == MsixTable::CAPABILITY && setup.msix);
        let table = msix.map(|(_, at)| MsixTable::enable(function, at, bar));
        function.enable();
        let cpu = spread.next_cpu();
        let vectors = [0, 1, 2, 3].map(|entry| {
            let place = spread.next_on(cpu);
            if let Some(table) = &table {
                table.connect(entry, place.vector, place.apic_id());
            }
            place.vector
        });
        let device = Self {
            registers,
            memory,
            vectors,
            interrupts: setup.interrupts && table.is_some(),
            cpu,
            timeout_us: setup.timeout_us,
        };
        let (id, version) = (device.get(register::ID), device.get(register::VERSION));
        if (id, version) != (ID, VERSION) {
            fail("not-a-copier", id.into(), version.into(), Text::new("id"));
        }
        device
    }

    fn get<T: mmio::Word>(&self, register: u64) -> T {
        mmio::read(self.registers + register)
    }

    fn set<T: mmio::Word>(&self, register: u64, value: T) {
        mmio::write(self.registers + register, value);
    }

    /// Gives a command. Its error, or 0 when it was done.
    pub fn command(&self, command: u32, order: Order) -> u32 {
        self.set(register::SOURCE, order.source);
        self.set(register::DESTINATION, order.destination);
        self.set(register::LENGTH, order.length);
        self.set(register::VECTOR, order.vector);
        self.set(register::COMMAND, command);
        let error = self.get(register::ERROR);
        match self.get::<u32>(register::STATUS) {
            DONE => error,
            _ => error.max(1),
        }
    }

    /// Copies as ordered. Its error, or 0.
    pub fn copy(&self, order: Order) -> u32 {
        self.command(COPY, order)
    }

    /// Whether a register keeps what is written to it.
    pub fn keeps(&self, value: u32) -> bool {
        self.set(register::SCRATCH, value);
        self.get::<u32>(register::SCRATCH) == value
    }

    /// Copies and bytes that it has counted.
    pub fn counted(&self) -> (u64, u64) {
        (self.get(register::COPIES), self.get(register::BYTES))
    }

    /// Interrupts of a vector that have come, modulo 2^32.
    pub fn interrupts_of(&self, vector: u32) -> u32 {
        interrupts::taken(self.vectors[vector as usize % VECTORS])
    }

    /// A word of its memory.
    pub fn word(&self, number: u64) -> u64 {
        mmio::read(self.memory + number * 8)
    }

    pub fn set_word(&self, number: u64, value: u64) {
        mmio::write(self.memory + number * 8, value);
    }
}
