//! Bus 0: its functions, and the two ways to their configuration space.
//!
//! Device `k` is at slot `1 + k % 31`, function `k / 31`, so the first 31 devices have a
//! slot each. Function 0 of a slot shows the multifunction bit when there are others.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use thiserror::Error;

use super::saved_state::RootState;
use crate::bus::{Bus, BusDevice, BusError};
use crate::layout::{ECAM, PCI_CONFIG_PORT};
use crate::machine::request::{Request, RequestSink};

/// Devices that bus 0 can hold beyond the host bridge.
pub const MAX_DEVICES: usize = 31 * 8;

const HEADER_TYPE: u16 = 0x0e;
const MULTIFUNCTION: u8 = 0x80;
const ENABLE: u32 = 1 << 31;
/// Reset control: the bit whose rise resets, and the writable ones.
const RESET_CPU: u8 = 1 << 2;
const RESET_WRITABLE: u8 = 0x0e;

/// A function's place on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress {
    slot: u8,
    function: u8,
}

impl PciAddress {
    /// Where the host bridge is.
    pub const HOST_BRIDGE: Self = Self {
        slot: 0,
        function: 0,
    };

    /// Where device `index` is, if there is room for so many.
    pub fn of_device(index: usize) -> Option<Self> {
        let index = u8::try_from(index)
            .ok()
            .filter(|&i| usize::from(i) < MAX_DEVICES)?;
        Some(Self {
            slot: 1 + index % 31,
            function: index / 31,
        })
    }

    /// Device number, 0 to 31.
    pub fn slot(self) -> u8 {
        self.slot
    }

    /// Function number, 0 to 7.
    pub fn function(self) -> u8 {
        self.function
    }

    /// From bits 3 to 7 (slot) and 0 to 2 (function), as both mechanisms have them.
    fn from_devfn(devfn: u8) -> Self {
        Self {
            slot: devfn >> 3,
            function: devfn & 7,
        }
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.slot, self.function)
    }
}

/// A function's configuration space, as vCPUs see it.
pub trait PciFunction: Send + Sync {
    /// Fills `data` with the registers at `offset`.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Takes a guest's write of `data` at `offset`.
    fn write_config(&self, offset: u16, data: &[u8]);
}

/// Why a function is not on the bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RootError {
    /// There is one already.
    #[error("PCI address {0} is taken")]
    Taken(PciAddress),
}

#[derive(Default)]
struct Ports {
    address: u32,
    reset_control: u8,
}

/// Bus 0.
pub struct Root {
    functions: RwLock<BTreeMap<PciAddress, Arc<dyn PciFunction>>>,
    ports: Mutex<Ports>,
    requests: Arc<dyn RequestSink>,
}

impl Root {
    /// An empty bus; a guest's reset goes to `requests`.
    pub fn new(requests: Arc<dyn RequestSink>) -> Self {
        Self {
            functions: RwLock::default(),
            ports: Mutex::default(),
            requests,
        }
    }

    /// Puts a function on the bus.
    pub fn insert(
        &self,
        address: PciAddress,
        function: Arc<dyn PciFunction>,
    ) -> Result<(), RootError> {
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if functions.contains_key(&address) {
            return Err(RootError::Taken(address));
        }
        functions.insert(address, function);
        Ok(())
    }

    /// Makes both mechanisms answer.
    pub fn install(self: &Arc<Self>, ports: &Bus, mmio: &Bus) -> Result<(), BusError> {
        ports.insert(
            PCI_CONFIG_PORT.start,
            PCI_CONFIG_PORT.end - PCI_CONFIG_PORT.start,
            Arc::new(ConfigPorts(Arc::clone(self))),
        )?;
        mmio.insert(
            ECAM.start,
            ECAM.end - ECAM.start,
            Arc::new(Ecam(Arc::clone(self))),
        )
    }

    /// The registers of mechanism 1.
    pub fn save(&self) -> RootState {
        let ports = self.ports();
        RootState {
            config_address: ports.address,
            reset_control: ports.reset_control,
        }
    }

    /// Takes saved registers over; any value is one that a guest could have written.
    pub fn restore(&self, state: &RootState) {
        *self.ports() = Ports {
            address: state.config_address,
            reset_control: state.reset_control & RESET_WRITABLE,
        };
    }

    /// As after power-on. The functions are reset on their own.
    pub fn reset(&self) {
        *self.ports() = Ports::default();
    }

    fn ports(&self) -> MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn function(&self, address: PciAddress) -> Option<Arc<dyn PciFunction>> {
        let functions = self
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        functions.get(&address).cloned()
    }

    fn is_multifunction(&self, slot: u8) -> bool {
        let (from, to) = (
            PciAddress { slot, function: 1 },
            PciAddress { slot, function: 7 },
        );
        let functions = self
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        functions.range(from..=to).next().is_some()
    }

    fn read_config(&self, address: PciAddress, offset: u16, data: &mut [u8]) {
        let Some(function) = self.function(address) else {
            data.fill(0xff);
            return;
        };
        function.read_config(offset, data);
        let header_type = HEADER_TYPE
            .checked_sub(offset)
            .and_then(|at| data.get_mut(usize::from(at)));
        if let Some(byte) = header_type
            && address.function == 0
            && self.is_multifunction(address.slot)
        {
            *byte |= MULTIFUNCTION;
        }
    }

    fn write_config(&self, address: PciAddress, offset: u16, data: &[u8]) {
        if let Some(function) = self.function(address) {
            function.write_config(offset, data);
        }
    }
}

/// The memory-mapped configuration space (PCI Express base 5.0, 7.2.2): 20 bits of
/// bus, slot, function and register. The window holds bus 0 only.
struct Ecam(Arc<Root>);

impl Ecam {
    fn split(offset: u64) -> (PciAddress, u16) {
        let [low, high, ..] = (offset >> 12).to_le_bytes();
        debug_assert_eq!(high, 0, "the window ends with bus 0");
        let register = (offset & 0xfff) as u16;
        (PciAddress::from_devfn(low), register)
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (address, register) = Self::split(offset);
        self.0.read_config(address, register, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (address, register) = Self::split(offset);
        self.0.write_config(address, register, data);
    }
}

/// Ports 0xcf8 to 0xcff: mechanism 1 (PCI local bus 3.0, 3.2.2.3.2), with the reset
/// control register as the byte at 0xcf9.
struct ConfigPorts(Arc<Root>);

impl ConfigPorts {
    /// What the data ports lead to, if the address register enables them.
    fn target(&self, offset: u64) -> Option<(PciAddress, u16)> {
        let address = self.0.ports().address;
        let [register, devfn, bus, _] = address.to_le_bytes();
        (address & ENABLE != 0 && bus == 0).then(|| {
            let register = u16::from(register & 0xfc) + (offset & 3) as u16;
            (PciAddress::from_devfn(devfn), register)
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.0.ports().address.to_le_bytes()),
            (1, 1) => data[0] = self.0.ports().reset_control,
            (4.., _) => match self.target(offset) {
                Some((address, register)) => self.0.read_config(address, register, data),
                None => data.fill(0xff),
            },
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                self.0.ports().address = u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc;
            }
            (1, &[value]) => {
                let before = {
                    let mut ports = self.0.ports();
                    std::mem::replace(&mut ports.reset_control, value & RESET_WRITABLE)
                };
                if value & !before & RESET_CPU != 0 {
                    self.0.requests.request(Request::Reset);
                }
            }
            (4.., _) => {
                if let Some((address, register)) = self.target(offset) {
                    self.0.write_config(address, register, data);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::HostBridge;
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Resets(AtomicUsize);
    impl RequestSink for Resets {
        fn request(&self, request: Request) {
            assert_eq!(request, Request::Reset);
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    struct Machine {
        root: Arc<Root>,
        ports: Bus,
        mmio: Bus,
        resets: Arc<Resets>,
    }

    fn machine(devices: usize) -> Machine {
        let resets = Arc::new(Resets::default());
        let root = Arc::new(Root::new(resets.clone()));
        let bridge = Arc::new(HostBridge::default());
        root.insert(PciAddress::HOST_BRIDGE, bridge).unwrap();
        for k in 0..devices {
            let at = PciAddress::of_device(k).unwrap();
            root.insert(at, Arc::new(HostBridge::default())).unwrap();
        }
        let (ports, mmio) = (Bus::default(), Bus::default());
        root.install(&ports, &mmio).unwrap();
        Machine {
            root,
            ports,
            mmio,
            resets,
        }
    }

    impl Machine {
        fn ecam(&self, slot: u64, function: u64, register: u64) -> u32 {
            let mut data = [0; 4];
            let at = ECAM.start | slot << 15 | function << 12 | register;
            self.mmio.read(at, &mut data);
            u32::from_le_bytes(data)
        }

        fn ports(&self, slot: u32, function: u32, register: u32) -> u32 {
            let address = ENABLE | slot << 11 | function << 8 | register;
            self.ports.write(0xcf8, &address.to_le_bytes());
            let mut data = [0; 4];
            self.ports.read(0xcfc, &mut data);
            u32::from_le_bytes(data)
        }
    }

    #[test]
    fn both_mechanisms_see_the_same() {
        let machine = machine(1);
        assert_eq!(machine.ecam(0, 0, 0), 0x0d57_8086);
        assert_eq!(machine.ports(0, 0, 0), 0x0d57_8086);
        assert_eq!(machine.ports(1, 0, 8), machine.ecam(1, 0, 8));
        assert_eq!(machine.ecam(2, 0, 0), u32::MAX, "nobody there");
        assert_eq!(machine.ports(2, 0, 0), u32::MAX);
        assert_eq!(machine.ecam(0, 0, 0x100), u32::MAX, "no extended space");
    }

    #[test]
    fn nothing_answers_while_mechanism_1_is_disabled() {
        let machine = machine(0);
        machine.ports.write(0xcf8, &[0; 4]);
        let mut data = [0; 4];
        machine.ports.read(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4]);
        machine
            .ports
            .write(0xcf8, &(ENABLE | 1 << 16).to_le_bytes());
        machine.ports.read(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4], "bus 1");
    }

    #[test]
    fn narrow_accesses_hit_their_byte() {
        let machine = machine(0);
        let class = ENABLE | 0x08;
        machine.ports.write(0xcf8, &class.to_le_bytes());
        let mut data = [0];
        machine.ports.read(0xcff, &mut data);
        assert_eq!(data, [0x06], "base class: bridge");
    }

    #[test]
    fn forty_devices_share_slots() {
        let machine = machine(40);
        assert_eq!(machine.ecam(1, 1, 0), 0x0d57_8086);
        assert_eq!(machine.ecam(9, 1, 0), 0x0d57_8086);
        assert_eq!(machine.ecam(10, 1, 0), u32::MAX);
        let multifunction = |slot| machine.ecam(slot, 0, 0x0c) >> 16 & 0x80 != 0;
        assert!(multifunction(9) && !multifunction(10) && !multifunction(0));
        assert_eq!(machine.ecam(1, 1, 0x0c) >> 16 & 0x80, 0, "function 0 only");
        let taken = machine.root.insert(
            PciAddress::of_device(39).unwrap(),
            Arc::new(HostBridge::default()),
        );
        assert_eq!(
            taken.unwrap_err().to_string(),
            "PCI address 00:09.1 is taken"
        );
        assert_eq!(PciAddress::of_device(MAX_DEVICES), None);
    }

    #[test]
    fn the_reset_register_resets_once_for_each_rise() {
        let machine = machine(0);
        machine.ports.write(0xcf9, &[0x02]);
        assert_eq!(machine.resets.0.load(Ordering::SeqCst), 0);
        machine.ports.write(0xcf9, &[0x06]);
        machine.ports.write(0xcf9, &[0x06]);
        assert_eq!(machine.resets.0.load(Ordering::SeqCst), 1);
        let mut data = [0];
        machine.ports.read(0xcf9, &mut data);
        assert_eq!(data, [0x06]);
        machine.root.reset();
        machine.ports.write(0xcf9, &[0x0e]);
        assert_eq!(machine.resets.0.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn the_address_register_survives() {
        let machine = machine(0);
        machine.ports(0, 0, 8);
        let saved = machine.root.save();
        machine.root.reset();
        machine.root.restore(&saved);
        let mut data = [0; 4];
        machine.ports.read(0xcfc, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x0600_0000);
    }

    #[test]
    fn no_access_panics() {
        let machine = machine(33);
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut data = [0; 8];
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let len = 1 << (seed >> 60 & 3);
            let at = seed >> 20 & 0xf_ffff;
            data = seed.to_le_bytes();
            machine.mmio.write(ECAM.start + at, &data[..len]);
            machine.mmio.read(ECAM.start + at, &mut data[..len]);
            machine.ports.write(0xcf8 + (at & 7), &data[..len]);
            machine.ports.read(0xcf8 + (at & 7), &mut data[..len]);
        }
        assert_ne!(data, [0; 8]);
    }
}
