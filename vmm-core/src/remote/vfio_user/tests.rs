#![expect(unsafe_code, reason = "eventfds come as plain descriptors")]

mod description;
mod device;
mod lost;

use std::error::Error;
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryBackend as _;
use vmm_sys_util::eventfd::EventFd;

use self::device::{Log, MSI, MSIX, Made, PENDING, Server, TABLE};
use super::*;
use crate::bus::Bus;
use crate::interrupt::{Doorbells, InterruptError};
use crate::memory::{LayoutChange, Ram, Region, RegionKind};
use crate::pci::BarAllocator;
use crate::pci::testing::FakeRouter;
use crate::transport::TroubleSink;

const MIB: u64 = 1 << 20;
const COMMAND: u16 = 0x04;

struct NoDoorbells;
impl Doorbells for NoDoorbells {
    fn register(&self, _: u64, _: &EventFd) -> Result<(), InterruptError> {
        Ok(())
    }
    fn unregister(&self, _: u64, _: &EventFd) -> Result<(), InterruptError> {
        Ok(())
    }
}

#[derive(Default)]
struct Troubles(Mutex<Vec<String>>);
impl TroubleSink for Troubles {
    fn trouble(&self, device: &str, error: &(dyn Error + 'static)) {
        assert_eq!(device, "gpu0");
        self.0.lock().unwrap().push(error.to_string());
    }
}

/// Notes in the device's log what happens to its memory.
struct Watcher(Log);
impl LayoutListener for Watcher {
    fn name(&self) -> String {
        "watcher".into()
    }
    fn commit(&self, change: &LayoutChange<'_>) -> Result<(), Box<dyn Error + Send + Sync>> {
        let log = |what, regions: &[Region]| {
            for region in regions.iter().filter(|r| r.kind() == RegionKind::Device) {
                let at = format!("{what} {:#x}+{:#x}", region.gpa(), region.size());
                self.0.lock().unwrap().push(at);
            }
        };
        log("unmap", change.removed);
        log("map", change.added);
        Ok(())
    }
}

fn region(gpa: u64) -> Region {
    let ram = Ram::allocate(MIB, None).unwrap();
    let file: Arc<File> = Arc::clone(ram.regions().unwrap()[0].file());
    Region::map(gpa, MIB, file, 0).unwrap()
}

fn config() -> VfioUserConfig {
    VfioUserConfig {
        // Nothing here takes long, but the machine may be busy.
        deadline: Duration::from_secs(20),
        ..VfioUserConfig::new("gpu0")
    }
}

fn find(stream: UnixStream) -> Result<Found, VfioUserError> {
    Found::connect(config(), Endpoint::Connected(stream.into()))
}

/// What a machine has around the device.
struct Machine {
    device: VfioUserDevice,
    server: Option<Server>,
    memory: Arc<Memory>,
    mmio: Arc<Bus>,
    router: Arc<FakeRouter>,
    troubles: Arc<Troubles>,
    log: Log,
}

impl Machine {
    fn new() -> Self {
        Self::with(config(), Made::default())
    }

    fn with(config: VfioUserConfig, made: Made) -> Self {
        let log = Log::default();
        let (server, stream) = Server::start(made, &log);
        let memory = Arc::new(Memory::default());
        let found = Found::connect(config, Endpoint::Connected(stream.into())).unwrap();
        memory.subscribe(found.listener()).unwrap();
        memory
            .subscribe(Arc::new(Watcher(Arc::clone(&log))))
            .unwrap();
        let mut layout = memory.begin();
        layout.add(region(0)).unwrap();
        layout.add(region(MIB).of_kind(RegionKind::Rom)).unwrap();
        layout.commit().unwrap();
        let (mmio, router) = (Arc::new(Bus::default()), Arc::new(FakeRouter::default()));
        let troubles = Arc::new(Troubles::default());
        let wiring = Wiring {
            bars: Arc::new(BarAllocator::new().unwrap()),
            mmio: Arc::clone(&mmio),
            router: Arc::clone(&router) as _,
            doorbells: Arc::new(NoDoorbells),
            trouble: Arc::clone(&troubles) as _,
        };
        let device = VfioUserDevice::new(found, &wiring, &memory).unwrap();
        Self {
            device,
            server: Some(server),
            memory,
            mmio,
            router,
            troubles,
            log,
        }
    }

    /// What the device was told since the last call.
    fn told(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    fn config(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.device.function.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&self, offset: u16, data: &[u8]) {
        self.device.function.write_config(offset, data);
    }

    /// Where BAR `index` is.
    fn bar(&self, index: u16) -> u64 {
        self.config(0x10 + 4 * index).into()
    }

    fn read(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, address: u64, value: u32) {
        self.mmio.write(address, &value.to_le_bytes());
    }

    /// What a driver does to use vector `number`.
    fn set_up_vector(&self, number: u64, data: u32) {
        let entry = self.bar(2) + TABLE + 16 * number;
        self.write(entry, 0xfee0_0000);
        self.write(entry + 8, data);
        self.write(entry + 12, 0);
    }

    fn enable_msix(&self) {
        self.set_config(u16::from(MSIX) + 2, &[0x03, 0x80]);
    }

    fn mapped(&self) -> Vec<u64> {
        let regions = self.memory.regions();
        let mapped = regions.iter().filter(|r| r.kind() == RegionKind::Device);
        mapped.map(Region::gpa).collect()
    }

    fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }
}

fn eventually(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < end, "it does not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn registers_are_the_devices_but_for_what_is_the_machines() {
    let machine = Machine::new();
    assert_eq!(machine.config(0x00), 0x6077_1234);
    assert_eq!(machine.config(0x08), 0xff00_0001);
    assert_eq!(machine.config(0x0c), 0, "not with others in its slot");
    assert_eq!(machine.config(0x3c), 0, "no interrupt pin");
    assert_eq!(machine.config(MSI.into()) & 0xff, 0, "no capability");
    assert_eq!(machine.config(MSIX.into()), 0x0003_5011);
    assert_eq!(machine.config(0x100), u32::MAX, "nothing extended");
    for bar in 0..6 {
        machine.set_config(0x10 + 4 * bar, &u32::MAX.to_le_bytes());
    }
    let sizes: Vec<_> = (0..6).map(|bar| machine.bar(bar)).collect();
    assert_eq!(sizes, [0xffff_f000, 0, 0xffff_0000, 0, 0, 0]);
    machine.set_config(0x30, &u32::MAX.to_le_bytes());
    assert_eq!(machine.config(0x30), 0, "no ROM");
    machine.told();
    machine.set_config(0x10, &[0; 4]);
    machine.set_config(0x60, &[7]);
    assert_eq!(machine.told(), ["config 0x60 [07]"]);
}

#[test]
fn accesses_to_bars_reach_the_device() {
    let machine = Machine::new();
    let (bar0, bar2) = (machine.bar(0), machine.bar(2));
    assert_eq!(machine.read(bar0), u32::MAX, "decoding is off");
    machine.set_config(COMMAND, &[6, 0]);
    machine.write(bar0 + 8, 0x1234);
    assert_eq!(machine.read(bar0 + 8), 0x1234);
    assert_eq!(machine.read(bar2 + 4), u32::MAX, "it refuses to be read");
    machine.set_up_vector(1, 5);
    assert_eq!(machine.read(bar2 + TABLE + 24), 5, "it is not asked");
    machine.write(bar2 + PENDING, u32::MAX);
    assert_eq!(machine.read(bar2 + PENDING), 0);
}

#[test]
fn memory_of_the_device_is_the_guests_while_it_is_decoded() {
    let machine = Machine::new();
    machine.told();
    let bar2 = machine.bar(2);
    machine.set_config(COMMAND, &[6, 0]);
    let mapped = |at: u64| {
        [
            format!("map {at:#x}+0x8000"),
            format!("map {:#x}+0x3000", at + 0x9000),
            format!("map {:#x}+0x3000", at + 0xd000),
        ]
    };
    let told = machine.told();
    assert_eq!(told[0], "config 0x4 [06, 00]", "before it is mapped");
    assert_eq!(told[1..], mapped(bar2));
    machine.set_config(0x18, &0xd000_0000u32.to_le_bytes());
    assert_eq!(machine.told()[3..], mapped(0xd000_0000));
    machine.set_config(COMMAND, &[0, 0]);
    assert!(machine.mapped().is_empty());
    assert_eq!(machine.told()[3], "config 0x4 [00, 00]", "after that");
    assert_eq!(machine.memory.guest().num_regions(), 2);
}

#[test]
fn interrupts_of_the_device_reach_their_vectors() {
    let machine = Machine::new();
    machine.set_config(COMMAND, &[6, 0]);
    machine.set_up_vector(3, 0x41);
    assert!(!machine.server().interrupt(3), "it has no eventfd yet");
    machine.enable_msix();
    assert!(machine.server().interrupt(3));
    assert_eq!(machine.router.fired(), [0x41]);
    assert!(machine.server().interrupt(2));
    assert!(machine.router.fired().is_empty(), "masked");
    assert_eq!(machine.read(machine.bar(2) + PENDING), 1 << 2);
    machine.set_up_vector(2, 0x42);
    assert_eq!(machine.router.fired(), [0x42], "what waited");
    machine.set_config(u16::from(MSIX) + 2, &[0x03, 0x00]);
    assert!(!machine.server().interrupt(3));
}

#[test]
fn a_device_without_a_table_interrupts_by_msi() {
    for is_wide in [false, true] {
        let mut made = Made::default();
        made.registers[0x40] = 9;
        made.registers[0x52] = if is_wide { 0x84 } else { 0x04 };
        let machine = Machine::with(config(), made);
        let control = u16::from(MSI) + 2;
        let shown = machine.config(MSI.into());
        assert_eq!(shown >> 16, if is_wide { 0x84 } else { 0x04 }, "no masks");
        assert_eq!(shown & 0xff, 5);
        machine.set_config(control + 2, &0xfee0_1003u32.to_le_bytes());
        let data = if is_wide { control + 10 } else { control + 6 };
        machine.set_config(data, &0x4047u16.to_le_bytes());
        assert_eq!(machine.config(control + 2), 0xfee0_1000);
        machine.set_config(control, &[0x21, 0]);
        assert!((0..4).all(|vector| machine.server().interrupt(vector)));
        assert_eq!(machine.router.fired(), [0x4044, 0x4045, 0x4046, 0x4047]);
        machine.set_config(control, &[0x11, 0]);
        assert!((0..4).all(|vector| machine.server().interrupt(vector)));
        assert_eq!(machine.router.fired(), [0x4046, 0x4047], "only two");
        // It has no more than four.
        machine.set_config(control, &[0x71, 0]);
        assert_eq!(machine.router.fired(), [0x4046, 0x4047], "what waited");
        machine.device.reset();
        assert!(!machine.server().interrupt(0));
        assert_eq!(machine.router.attached(), 0);
        assert_eq!(machine.config(control + 2), 0);
    }
}

#[test]
fn the_device_reaches_ram_and_nothing_else() {
    let machine = Machine::new();
    assert_eq!(machine.told(), ["reach 0x0+0x100000"]);
    let mut layout = machine.memory.begin();
    layout.add(region(4 * MIB)).unwrap();
    layout.remove(MIB).unwrap();
    layout.remove(0).unwrap();
    layout.commit().unwrap();
    assert_eq!(machine.told(), ["leave 0x0", "reach 0x400000+0x100000"]);
    machine.set_config(COMMAND, &[6, 0]);
    assert!(!machine.mapped().is_empty());
    assert!(machine.told().iter().all(|what| !what.starts_with("reach")));
}

#[test]
fn memory_that_it_cannot_reach_is_no_memory() {
    let log = Log::default();
    let made = Made {
        most_memory: 1,
        ..Made::default()
    };
    let (_server, stream) = Server::start(made, &log);
    let memory = Memory::default();
    memory.subscribe(find(stream).unwrap().listener()).unwrap();
    let mut layout = memory.begin();
    layout.add(region(0)).unwrap();
    layout.add(region(MIB)).unwrap();
    let error = crate::machine::chain(&layout.commit().unwrap_err());
    assert!(
        error.starts_with("device gpu0 did not take the new memory layout: "),
        "{error}"
    );
    assert!(error.contains("refused DMA_MAP"), "{error}");
    assert_eq!(*log.lock().unwrap(), ["reach 0x0+0x100000", "leave 0x0"]);
}

#[test]
fn a_reset_brings_everything_back() {
    let machine = Machine::new();
    let first = machine.bar(2);
    machine.set_config(0x18, &0xd000_0000u32.to_le_bytes());
    machine.set_config(COMMAND, &[6, 0]);
    machine.set_up_vector(0, 1);
    machine.enable_msix();
    machine.told();
    machine.device.reset();
    assert_eq!(machine.told()[3..], ["config 0x4 [00, 00]", "reset"]);
    assert!(machine.mapped().is_empty());
    assert_eq!(machine.router.attached(), 0);
    assert!(!machine.server().interrupt(0));
    assert_eq!(
        (machine.bar(2), machine.config(COMMAND) & 0xffff),
        (first, 0)
    );
    assert_eq!(machine.config(MSIX.into()), 0x0003_5011);
    assert!(machine.troubles.0.lock().unwrap().is_empty());
}

#[test]
fn no_access_panics() {
    let machine = Machine::new();
    let mut seed = 1_u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        seed >> 16
    };
    for _ in 0..4000 {
        let length = 1 << (random() & 3);
        let data = random().to_le_bytes();
        let offset = u16::try_from(random() & 0x1ff).unwrap();
        match random() & 3 {
            0 => machine.set_config(offset, &data[..length]),
            1 => machine
                .device
                .function
                .read_config(offset, &mut data.to_vec()),
            2 => machine.write(machine.bar(2) + (random() & 0xffff), 7),
            _ => drop(machine.read(machine.bar(0) + (random() & 0xffff))),
        }
    }
    machine.device.reset();
    machine.set_config(COMMAND, &[6, 0]);
    assert_eq!(machine.mapped().len(), 3);
}
