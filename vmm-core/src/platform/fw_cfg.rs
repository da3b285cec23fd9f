//! QEMU's firmware configuration device, by which a firmware learns of the machine
//! (QEMU, `docs/specs/fw_cfg`).
//!
//! | port | access | what |
//! |---|---|---|
//! | +0 | 16 bits written | selects an item |
//! | +1 | bytes read | its next bytes; zeros behind its end |
//! | +4 | 32 bits written, big-endian | upper half of the address of a DMA access |
//! | +8 | 32 bits written, big-endian | lower half, which begins it |
//! | +4 | 64 bits read | `QEMU CFG` |
//!
//! Items can only be read. Those that have names are files, and the directory, an item too, has
//! their names. A DMA access is done when the write that began it is: what it has read is in RAM,
//! and its control word is zero, or says that it failed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestAddress};

use super::saved_state::FwCfgSavedState;
use crate::bus::BusDevice;
use crate::memory::Memory;
use crate::migration::ram::CoreWrites;

const SIGNATURE: u16 = 0x00;
const INTERFACES: u16 = 0x01;
const CPUS: u16 = 0x05;
const MAX_CPUS: u16 = 0x0f;
const DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// In the directory.
const NAME_SIZE: usize = 56;

/// There are the ports and the DMA access.
const PORTS_AND_DMA: u32 = 0b11;
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// Offsets of the registers.
const SELECTOR: u64 = 0;
const DATA: u64 = 1;
const DMA_HIGH: u64 = 4;
const DMA_LOW: u64 = 8;

/// Bits of a DMA access' control word; the upper half is the item that `SELECT` selects.
const ERROR: u32 = 1 << 0;
const READ: u32 = 1 << 1;
const SKIP: u32 = 1 << 2;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;

/// Most bytes that one DMA access reads: more than any item has.
const MOST: u32 = 1 << 20;

/// Names and contents of files.
pub type Files = Vec<(&'static str, Vec<u8>)>;

/// The device.
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    registers: Mutex<FwCfgSavedState>,
    memory: Arc<Memory>,
    writes: CoreWrites,
}

impl FwCfg {
    /// Tells of `cpus` vCPUs, and has `files`. What it writes to `memory` is noted in `writes`.
    #[must_use]
    pub fn new(cpus: u16, files: Files, memory: Arc<Memory>, writes: CoreWrites) -> Self {
        let mut items = BTreeMap::from([
            (SIGNATURE, b"QEMU".to_vec()),
            (INTERFACES, PORTS_AND_DMA.to_le_bytes().to_vec()),
            (CPUS, cpus.to_le_bytes().to_vec()),
            (MAX_CPUS, cpus.to_le_bytes().to_vec()),
        ]);
        let count = u32::try_from(files.len()).unwrap_or(u32::MAX);
        let mut directory = count.to_be_bytes().to_vec();
        for (key, (name, content)) in (FIRST_FILE..).zip(files) {
            let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
            directory.extend(size.to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            let end = directory.len() + NAME_SIZE;
            directory.extend(name.bytes().take(NAME_SIZE - 1));
            directory.resize(end, 0);
            items.insert(key, content);
        }
        items.insert(DIRECTORY, directory);
        Self {
            items,
            registers: Mutex::default(),
            memory,
            writes,
        }
    }

    /// As after power-on.
    pub fn reset(&self) {
        *self.lock() = FwCfgSavedState::default();
    }

    /// What it was doing.
    #[must_use]
    pub fn save(&self) -> FwCfgSavedState {
        *self.lock()
    }

    /// Goes on from saved state.
    pub fn restore(&self, state: FwCfgSavedState) {
        *self.lock() = state;
    }

    fn lock(&self) -> MutexGuard<'_, FwCfgSavedState> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills `data` with the item's next bytes.
    fn take(&self, registers: &mut FwCfgSavedState, data: &mut [u8]) {
        data.fill(0);
        let item = self.items.get(&registers.key);
        let at = usize::try_from(registers.offset).unwrap_or(usize::MAX);
        if let Some(rest) = item.and_then(|item| item.get(at..)) {
            let length = rest.len().min(data.len());
            data[..length].copy_from_slice(&rest[..length]);
        }
        skip(registers, u32::try_from(data.len()).unwrap_or(u32::MAX));
    }

    /// Carries out the access that the guest has described at `address`: control, length, and
    /// address of 8 bytes, all big-endian. One that is not described in RAM is none.
    fn access(&self, registers: &mut FwCfgSavedState, address: u64) {
        let mut words = [[0; 4]; 4];
        let guest = self.memory.guest();
        if !self.is_ram(address, 16) {
            return;
        }
        if guest
            .read_slice(words.as_flattened_mut(), GuestAddress(address))
            .is_err()
        {
            return;
        }
        let [control, length, high, low] = words.map(u32::from_be_bytes);
        if control & SELECT != 0 {
            *registers = FwCfgSavedState {
                key: (control >> 16) as u16,
                offset: 0,
                ..*registers
            };
        }
        let target = u64::from(high) << 32 | u64::from(low);
        let done = match control & (READ | WRITE | SKIP) {
            op if op & READ != 0 => self.read_into(registers, target, length),
            op if op & WRITE != 0 => false,
            SKIP => {
                skip(registers, length);
                true
            }
            _ => true,
        };
        let result = if done { 0 } else { ERROR };
        // It was read there.
        let _ = guest.write_slice(&result.to_be_bytes(), GuestAddress(address));
        self.writes.note();
    }

    fn read_into(&self, registers: &mut FwCfgSavedState, target: u64, length: u32) -> bool {
        if length > MOST || !self.is_ram(target, length.into()) {
            return false;
        }
        let mut data = vec![0; length as usize];
        self.take(registers, &mut data);
        let written = self.memory.guest().write_slice(&data, GuestAddress(target));
        written.is_ok()
    }

    /// Whether one region of RAM has all of it.
    fn is_ram(&self, at: u64, length: u64) -> bool {
        self.memory.regions().iter().any(|region| {
            let offset = at.checked_sub(region.gpa());
            let room = offset.and_then(|offset| region.size().checked_sub(offset));
            region.is_ram() && room.is_some_and(|room| length <= room)
        })
    }
}

fn skip(registers: &mut FwCfgSavedState, bytes: u32) {
    registers.offset = registers.offset.saturating_add(bytes);
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset {
            // Several bytes are as many reads of the port, by a string instruction.
            DATA => self.take(&mut self.lock(), data),
            DMA_HIGH.. => {
                let register = (offset - DMA_HIGH..).zip(data);
                for (at, byte) in register {
                    let at = usize::try_from(at).unwrap_or(usize::MAX);
                    *byte = DMA_SIGNATURE.get(at).copied().unwrap_or(0xff);
                }
            }
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let registers = &mut *self.lock();
        match (offset, data) {
            (SELECTOR, &[low, high]) => {
                registers.key = u16::from_le_bytes([low, high]);
                registers.offset = 0;
            }
            (DMA_HIGH, &[a, b, c, d]) => registers.address_high = u32::from_be_bytes([a, b, c, d]),
            (DMA_LOW, &[a, b, c, d]) => {
                let low = u32::from_be_bytes([a, b, c, d]);
                let high = std::mem::take(&mut registers.address_high);
                self.access(registers, u64::from(high) << 32 | u64::from(low));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
