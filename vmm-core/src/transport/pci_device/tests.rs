#![expect(clippy::cast_possible_truncation, reason = "values made to be cut off")]

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::{ActivatedQueue, DeviceKind, QueueIndex, RingBase, StoppedQueue};
use super::*;
use crate::interrupt::InterruptError;
use crate::layout::MMIO32;
use crate::pci::NO_VECTOR;
use crate::pci::testing::FakeRouter;
use vmm_sys_util::eventfd::EventFd;

const VERSION_1: u64 = 1 << 32;

#[derive(Default)]
struct FakeDevice {
    active: Mutex<Vec<ActivatedQueue>>,
    features: Mutex<u64>,
    notifier: Mutex<Option<Arc<dyn DeviceNotifier>>>,
    config: Mutex<Vec<u8>>,
    refuse: AtomicBool,
    wired: Mutex<Vec<QueueIndex>>,
    resets: Mutex<usize>,
}

impl VirtioDevice for FakeDevice {
    fn name(&self) -> String {
        "fake0".into()
    }
    fn kind(&self) -> DeviceKind {
        DeviceKind::BLK
    }
    fn features(&self) -> u64 {
        VERSION_1 | 0x2_0000_0041
    }
    fn queues(&self) -> u16 {
        3
    }
    fn max_queue_size(&self) -> u16 {
        256
    }
    fn set_notifier(&self, notifier: Arc<dyn DeviceNotifier>) {
        *self.notifier.lock().unwrap() = Some(notifier);
    }
    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let config = self.config.lock().unwrap();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let mut config = self.config.lock().unwrap();
        for (i, &byte) in data.iter().enumerate() {
            if let Some(at) = config.get_mut(offset as usize + i) {
                *at = byte;
            }
        }
        Ok(())
    }
    fn wire(&self, _: u64, queues: Vec<ActivatedQueue>) -> Result<(), DeviceError> {
        *self.wired.lock().unwrap() = queues.iter().map(|queue| queue.index).collect();
        Ok(())
    }
    fn activate(&self, features: u64, queues: Vec<ActivatedQueue>) -> Result<(), DeviceError> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(DeviceError::new("device fake0 does not feel like it"));
        }
        *self.features.lock().unwrap() = features;
        *self.active.lock().unwrap() = queues;
        Ok(())
    }
    fn looks_at_rings(&self) -> bool {
        false
    }
    fn stop(&self) -> Result<Vec<StoppedQueue>, DeviceError> {
        let active = std::mem::take(&mut *self.active.lock().unwrap());
        Ok(active
            .into_iter()
            .map(|q| StoppedQueue {
                index: q.index,
                base: RingBase(q.base.0.wrapping_add(100)),
            })
            .collect())
    }
    fn reset(&self) -> Result<(), DeviceError> {
        self.active.lock().unwrap().clear();
        *self.resets.lock().unwrap() += 1;
        Ok(())
    }
}

#[derive(Default)]
struct FakeDoorbells(Mutex<Vec<(u64, EventFd)>>);
impl Doorbells for FakeDoorbells {
    fn register(&self, address: u64, event: &EventFd) -> Result<(), InterruptError> {
        let mut bells = self.0.lock().unwrap();
        assert!(bells.iter().all(|(a, _)| *a != address));
        bells.push((address, event.try_clone().unwrap()));
        Ok(())
    }
    fn unregister(&self, address: u64, _event: &EventFd) -> Result<(), InterruptError> {
        let mut bells = self.0.lock().unwrap();
        let before = bells.len();
        bells.retain(|(a, _)| *a != address);
        assert_eq!(bells.len() + 1, before);
        Ok(())
    }
}
impl FakeDoorbells {
    fn addresses(&self) -> Vec<u64> {
        self.0.lock().unwrap().iter().map(|b| b.0).collect()
    }
}

#[derive(Default)]
struct Troubles(Mutex<Vec<String>>);
impl TroubleSink for Troubles {
    fn trouble(&self, device: &str, error: &(dyn Error + 'static)) {
        self.0.lock().unwrap().push(format!("{device}: {error}"));
    }
}

struct Guest {
    pci: Arc<VirtioPciDevice>,
    device: Arc<FakeDevice>,
    router: Arc<FakeRouter>,
    doorbells: Arc<FakeDoorbells>,
    troubles: Arc<Troubles>,
    mmio: Arc<Bus>,
}

impl Guest {
    fn new() -> Self {
        let device = Arc::new(FakeDevice::default());
        *device.config.lock().unwrap() = (1..=60).collect();
        let router = Arc::new(FakeRouter::default());
        let doorbells = Arc::new(FakeDoorbells::default());
        let troubles = Arc::new(Troubles::default());
        let mmio = Arc::new(Bus::default());
        let wiring = Wiring {
            bars: Arc::new(BarAllocator::new().unwrap()),
            mmio: mmio.clone(),
            router: router.clone(),
            doorbells: doorbells.clone(),
            trouble: troubles.clone(),
        };
        let pci = VirtioPciDevice::new(device.clone(), &wiring).unwrap();
        Self {
            pci,
            device,
            router,
            doorbells,
            troubles,
            mmio,
        }
    }

    fn booted() -> Self {
        let guest = Self::new();
        guest.pci.write_config(4, &[0x06, 0]);
        guest
    }

    fn config<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.pci.read_config(offset, &mut data);
        data
    }

    fn bar(&self, bar: u16) -> u64 {
        u64::from(u32::from_le_bytes(self.config(0x10 + 4 * bar)) & !0xf)
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.mmio.read(self.bar(0) + offset, &mut data);
        data
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.mmio.write(self.bar(0) + offset, data);
    }

    fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    /// All steps up to FEATURES_OK (virtio 1.3, 3.1.1).
    fn negotiate(&self, features: u64) -> u8 {
        self.write(0x14, &[0]);
        self.write(0x14, &[1]);
        self.write(0x14, &[3]);
        for half in 0..2u32 {
            self.write(0x08, &half.to_le_bytes());
            let bits = (features >> (32 * half)) as u32;
            self.write(0x0c, &bits.to_le_bytes());
        }
        self.write(0x14, &[0x0b]);
        self.status()
    }

    fn set_up_queue(&self, index: u16, vector: u16) {
        self.write(0x16, &index.to_le_bytes());
        self.write(0x18, &64u16.to_le_bytes());
        self.write(0x1a, &vector.to_le_bytes());
        let base = 0x10_0000 * (u64::from(index) + 1);
        self.write(0x20, &base.to_le_bytes());
        self.write(0x28, &(base as u32 + 0x1000).to_le_bytes());
        self.write(0x2c, &1u32.to_le_bytes());
        self.write(0x30, &(base + 0x2000).to_le_bytes());
        self.write(0x1c, &1u16.to_le_bytes());
    }

    fn enable_msix(&self) {
        for vector in 0..4u64 {
            let at = self.bar(1) + vector * 16;
            self.mmio.write(at, &0xfee0_0000u64.to_le_bytes());
            self.mmio
                .write(at + 8, &(0x40 + vector as u32).to_le_bytes());
            self.mmio.write(at + 12, &0u32.to_le_bytes());
        }
        self.pci.write_config(0x42, &0x8000u16.to_le_bytes());
    }

    fn start(&self) {
        self.enable_msix();
        assert_eq!(self.negotiate(VERSION_1 | 1), 0x0b);
        self.write(0x10, &0u16.to_le_bytes());
        self.set_up_queue(0, 1);
        self.set_up_queue(2, 2);
        self.write(0x14, &[0x0f]);
        assert_eq!(self.status(), 0x0f);
    }

    fn signal(&self, queue: u16) {
        let active = self.device.active.lock().unwrap();
        let queue = active.iter().find(|q| q.index.0 == queue).unwrap();
        queue.call.write(1).unwrap();
    }

    fn notifier(&self) -> Arc<dyn DeviceNotifier> {
        self.device.notifier.lock().unwrap().clone().unwrap()
    }
}

#[test]
fn capabilities_lead_to_the_structures() {
    let guest = Guest::new();
    assert_eq!(guest.config(0), [0xf4, 0x1a, 0x42, 0x10]);
    let mut found = Vec::new();
    let [mut at] = guest.config(0x34);
    while at != 0 {
        let cap: [u8; 20] = guest.config(at.into());
        if cap[0] == 9 {
            let word = |i: usize| u32::from_le_bytes(cap[i..i + 4].try_into().unwrap());
            found.push((cap[2], cap[3], cap[4], word(8), word(12)));
        } else {
            assert_eq!((cap[0], cap[2]), (0x11, 3), "four vectors");
        }
        at = cap[1];
    }
    assert_eq!(
        found,
        [
            (16, 1, 0, 0, 0x40),
            (20, 2, 0, 0x3000, 12),
            (16, 3, 0, 0x1000, 1),
            (16, 4, 0, 0x2000, 0xf00),
            (20, 5, 0, 0, 0),
        ]
    );
}

#[test]
fn nothing_is_decoded_before_the_guest_says_so() {
    let guest = Guest::new();
    assert_eq!(guest.read::<1>(0x14), [0xff]);
    assert!(guest.doorbells.addresses().is_empty());
    guest.pci.write_config(4, &[2, 0]);
    assert_eq!(guest.read::<1>(0x14), [0]);
    let at = guest.bar(0) + 0x3000;
    assert_eq!(guest.doorbells.addresses(), [at, at + 4, at + 8]);
    guest.pci.write_config(4, &[0, 0]);
    assert_eq!(guest.read::<1>(0x14), [0xff]);
    assert!(guest.doorbells.addresses().is_empty());
}

#[test]
fn a_bar_moves_with_its_doorbells() {
    let guest = Guest::booted();
    let old = guest.bar(0);
    let new = MMIO32.end as u32 - 0x4000;
    guest.pci.write_config(0x10, &u32::MAX.to_le_bytes());
    assert!(guest.doorbells.addresses().is_empty(), "sizing");
    assert_eq!(guest.config(0x10), 0xffff_c000u32.to_le_bytes());
    guest.pci.write_config(0x10, &new.to_le_bytes());
    assert_eq!(guest.doorbells.addresses()[2], u64::from(new) + 0x3008);
    assert_eq!(guest.read::<2>(0x12), [3, 0]);
    let mut data = [0];
    guest.mmio.read(old + 0x14, &mut data);
    assert_eq!(data, [0xff]);
}

#[test]
fn a_bar_on_top_of_another_waits_until_there_is_room() {
    let guest = Guest::booted();
    let (virtio, msix) = (guest.bar(0), guest.bar(1));
    guest.pci.write_config(0x14, &(virtio as u32).to_le_bytes());
    let mut data = [0; 2];
    guest.mmio.read(virtio + 0x12, &mut data);
    assert_eq!(data, [3, 0], "the first keeps its place");
    guest.pci.write_config(0x14, &(msix as u32).to_le_bytes());
    guest.mmio.read(virtio + 0x12, &mut data);
    assert_eq!(data, [3, 0]);
    let mut masked = [0; 4];
    guest.mmio.read(msix + 12, &mut masked);
    assert_eq!(masked, [1, 0, 0, 0]);
}

#[test]
fn features_are_offered_by_halves_and_checked() {
    let guest = Guest::booted();
    let half = |select: u32| {
        guest.write(0, &select.to_le_bytes());
        u32::from_le_bytes(guest.read(4))
    };
    assert_eq!([half(0), half(1), half(2)], [0x41, 3, 0]);
    assert_eq!(guest.negotiate(VERSION_1 | 0x40), 0x0b);
    assert_eq!(guest.negotiate(VERSION_1 | 2), 0x03, "never offered");
    assert_eq!(guest.negotiate(0x40), 0x03, "no VERSION_1");
    guest.write(0x14, &[0x0f]);
    assert_eq!(guest.status(), 0x03, "no DRIVER_OK either");
    guest.write(0x14, &[0]);
    guest.write(0x08, &2u32.to_le_bytes());
    guest.write(0x0c, &1u32.to_le_bytes());
    assert_eq!(guest.negotiate(VERSION_1), 0x0b, "forgotten by the reset");
    guest.write(0x0c, &u32::MAX.to_le_bytes());
    guest.write(0x08, &1u32.to_le_bytes());
    assert_eq!(guest.read::<4>(0x0c), [1, 0, 0, 0], "too late");
}

#[test]
fn enabled_queues_are_activated_as_they_were_set_up() {
    let guest = Guest::booted();
    guest.start();
    assert_eq!(*guest.device.features.lock().unwrap(), VERSION_1 | 1);
    let active = guest.device.active.lock().unwrap();
    let seen: Vec<_> = active
        .iter()
        .map(|q| {
            (
                q.index.0,
                q.size,
                q.descriptors,
                q.driver,
                q.device,
                q.base.0,
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            (0, 64, 0x10_0000, 0x1_0010_1000, 0x10_2000, 0),
            (2, 64, 0x30_0000, 0x1_0030_1000, 0x30_2000, 0)
        ]
    );
    guest.write(0x3008, &2u16.to_le_bytes());
    assert!(active[1].kick.read().is_ok(), "the slow doorbell");
    assert!(active[0].kick.read().is_err());
}

#[test]
fn a_running_queue_cannot_be_changed() {
    let guest = Guest::booted();
    guest.start();
    guest.write(0x16, &[0, 0]);
    guest.write(0x18, &128u16.to_le_bytes());
    guest.write(0x20, &0u64.to_le_bytes());
    guest.write(0x1c, &[0, 0]);
    assert_eq!(guest.read(0x18), 64u16.to_le_bytes());
    assert_eq!(guest.read(0x20), 0x10_0000u64.to_le_bytes());
    assert_eq!(guest.read::<4>(0x2c), [1, 0, 0, 0]);
    assert_eq!(guest.read::<2>(0x1c), [1, 0]);
}

#[test]
fn absent_queues_read_as_zero() {
    let guest = Guest::booted();
    guest.write(0x16, &3u16.to_le_bytes());
    guest.write(0x18, &64u16.to_le_bytes());
    assert_eq!(guest.read::<2>(0x18), [0, 0]);
    assert_eq!(guest.read::<8>(0x20), [0; 8]);
    guest.write(0x1a, &1u16.to_le_bytes());
    assert_eq!(guest.read(0x1a), NO_VECTOR.to_le_bytes());
    guest.write(0x16, &0u16.to_le_bytes());
    guest.write(0x18, &300u16.to_le_bytes());
    assert_eq!(guest.read(0x18), 256u16.to_le_bytes(), "no power of two");
    guest.write(0x1a, &4u16.to_le_bytes());
    assert_eq!(guest.read(0x1a), NO_VECTOR.to_le_bytes(), "no such vector");
}

#[test]
fn interrupts_take_their_vector() {
    let guest = Guest::booted();
    guest.start();
    guest.signal(2);
    assert_eq!(guest.router.fired(), [0x42]);
    guest.signal(0);
    assert_eq!(guest.router.fired(), [0x41]);
    guest.notifier().config_changed(&mut || ());
    assert_eq!(guest.router.fired(), [0x40]);
    assert_eq!(guest.read::<1>(0x15), [1], "a new generation");
}

#[test]
fn without_msix_everything_is_in_the_status_register() {
    let guest = Guest::booted();
    guest.negotiate(VERSION_1);
    guest.set_up_queue(0, NO_VECTOR);
    guest.write(0x14, &[0x0f]);
    guest.signal(0);
    guest.notifier().config_changed(&mut || ());
    assert_eq!(guest.read::<1>(0x1000), [3]);
    assert_eq!(guest.read::<1>(0x1000), [0], "reading clears");
    guest.signal(0);
    assert_eq!(guest.read::<1>(0x1000), [1]);
}

#[test]
fn a_failed_activation_asks_for_a_reset() {
    let guest = Guest::booted();
    guest.device.refuse.store(true, Ordering::SeqCst);
    guest.enable_msix();
    guest.negotiate(VERSION_1);
    guest.write(0x10, &3u16.to_le_bytes());
    guest.set_up_queue(0, 0);
    guest.write(0x14, &[0x0f]);
    assert_eq!(guest.status(), 0x4f);
    assert_eq!(guest.router.fired(), [0x43], "the driver is told");
    assert_eq!(
        *guest.troubles.0.lock().unwrap(),
        ["fake0: device fake0 does not feel like it"]
    );
    guest.device.refuse.store(false, Ordering::SeqCst);
    guest.start();
}

#[test]
fn a_misplaced_ring_is_refused_before_the_device_sees_it() {
    let guest = Guest::booted();
    guest.negotiate(VERSION_1);
    guest.write(0x16, &[0, 0]);
    guest.write(0x20, &8u64.to_le_bytes());
    guest.write(0x1c, &[1, 0]);
    guest.write(0x14, &[0x0f]);
    assert_eq!(guest.status(), 0x4f);
    assert!(guest.device.active.lock().unwrap().is_empty());
}

#[test]
fn the_configuration_is_reached_both_ways() {
    let guest = Guest::booted();
    assert_eq!(guest.read::<4>(0x2004), [5, 6, 7, 8]);
    guest.write(0x2000, &[0xaa]);
    assert_eq!(guest.read::<2>(0x2000), [0xaa, 2]);
    assert_eq!(guest.read::<4>(0x2efc), [0; 4], "zeros beyond its end");

    let at = u16::from(guest.pci.registers().pci_access);
    guest.pci.write_config(at + 4, &[0]);
    guest.pci.write_config(at + 8, &0x2004u32.to_le_bytes());
    guest.pci.write_config(at + 12, &2u32.to_le_bytes());
    assert_eq!(guest.config::<2>(at + 16), [5, 6]);
    guest.pci.write_config(at + 16, &[0x11, 0x22]);
    assert_eq!(guest.read::<4>(0x2004), [0x11, 0x22, 7, 8]);
    guest.pci.write_config(at + 8, &0x3fffu32.to_le_bytes());
    assert_eq!(guest.config::<2>(at + 16), [0x11, 0x22], "beyond the BAR");
}

#[test]
fn stop_covers_active_queues_and_resume_kicks_them() {
    let guest = Guest::booted();
    guest.start();
    guest.pci.stop().unwrap();
    guest.pci.stop().unwrap();
    assert!(guest.device.active.lock().unwrap().is_empty());
    guest.pci.resume().unwrap();
    guest.pci.resume().unwrap();
    {
        let active = guest.device.active.lock().unwrap();
        let seen: Vec<_> = active.iter().map(|q| (q.index.0, q.base.0)).collect();
        assert_eq!(seen, [(0, 100), (2, 100)]);
        assert!(active.iter().all(|q| q.kick.read().unwrap() == 1));
    }
    assert_eq!(guest.router.fired(), [0x41, 0x42], "held-back signals");
}

#[test]
fn an_idle_device_is_stopped_and_resumed_without_effect() {
    let guest = Guest::booted();
    guest.pci.stop().unwrap();
    guest.pci.resume().unwrap();
    assert!(guest.device.active.lock().unwrap().is_empty());
    guest.start();
}

#[test]
fn a_device_goes_on_elsewhere() {
    let here = Guest::booted();
    here.start();
    let new_bar = MMIO32.start as u32 + 0x100_0000;
    here.pci.write_config(0x10, &new_bar.to_le_bytes());
    here.notifier().config_changed(&mut || ());
    here.router.fired();
    let refused = here.pci.save().unwrap_err();
    assert_eq!(
        refused.to_string(),
        "device fake0 runs; it must be stopped first"
    );
    here.pci.stop().unwrap();
    let state = here.pci.save().unwrap();

    let there = Guest::new();
    there.pci.restore(&state).unwrap();
    assert!(there.device.active.lock().unwrap().is_empty());
    there.pci.resume().unwrap();
    assert_eq!(there.bar(0), u64::from(new_bar));
    assert_eq!(there.doorbells.addresses().len(), 3);
    assert_eq!((there.status(), there.read(0x15)), (0x0f, [1]));
    there.router.fired();
    there.signal(2);
    assert_eq!(there.router.fired(), [0x42]);
    let active = there.device.active.lock().unwrap();
    assert_eq!((active[1].index, active[1].base.0), (QueueIndex(2), 100));
    assert_eq!(active[1].driver, 0x1_0030_1000);
}

#[test]
fn hostile_state_is_refused() {
    let here = Guest::booted();
    here.start();
    here.pci.stop().unwrap();
    let good = here.pci.save().unwrap();
    let refuse = |change: fn(&mut VirtioPciState)| {
        let mut state = good.clone();
        change(&mut state);
        let there = Guest::new();
        let error = there.pci.restore(&state).unwrap_err();
        there.pci.reset().unwrap();
        there.pci.write_config(4, &[6, 0]);
        there.start();
        error
    };
    refuse(|s| s.transport.queues.truncate(2));
    refuse(|s| s.transport.queues[0].size = 3);
    refuse(|s| s.transport.queues[0].size = 512);
    refuse(|s| s.transport.queues[2].device = !3);
    refuse(|s| s.transport.driver_features |= 4);
    refuse(|s| s.transport.status = 0x40);
    refuse(|s| s.transport.status = 0x07);
    refuse(|s| s.registers[0] = 0);
    refuse(|s| s.registers.truncate(255));
    refuse(|s| s.msix.entries.truncate(1));
    let error = refuse(|s| s.msix.pending.push(true));
    assert_eq!(
        error.source().unwrap().to_string(),
        "saved MSI-X state has 5 pending bits, this device has 4"
    );
}

#[test]
fn a_guests_reset_stops_the_device() {
    let guest = Guest::booted();
    guest.start();
    guest.signal(0);
    let before = *guest.device.resets.lock().unwrap();
    guest.write(0x14, &[0]);
    assert_eq!(*guest.device.resets.lock().unwrap(), before + 1);
    assert_eq!(guest.status(), 0);
    guest.write(0x16, &[2, 0]);
    assert_eq!(guest.read(0x1a), NO_VECTOR.to_le_bytes());
    assert_eq!(guest.read::<2>(0x1c), [0, 0]);
    assert_eq!(guest.read(0x18), 256u16.to_le_bytes());
    assert_eq!(guest.router.attached(), 0);
    guest.start();
}

#[test]
fn the_machines_reset_brings_the_first_registers_back() {
    let guest = Guest::booted();
    let first = guest.bar(0);
    guest.start();
    guest.pci.write_config(0x10, &0xd000_0000u32.to_le_bytes());
    guest.pci.reset().unwrap();
    assert_eq!(guest.bar(0), first);
    assert_eq!(guest.read::<1>(0x14), [0xff], "not decoded");
    assert!(guest.doorbells.addresses().is_empty());
    guest.pci.write_config(4, &[6, 0]);
    guest.start();
}

#[test]
fn dropping_takes_everything_down() {
    let guest = Guest::booted();
    guest.start();
    let at = guest.bar(0);
    let (mmio, doorbells) = (guest.mmio.clone(), guest.doorbells.clone());
    drop(guest);
    let mut data = [0];
    mmio.read(at + 0x14, &mut data);
    assert_eq!(data, [0xff]);
    assert!(doorbells.addresses().is_empty());
    assert!(!mmio.remove(at));
}

#[test]
fn no_access_panics() {
    let guest = Guest::booted();
    let mut seed = 7_u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        seed >> 16
    };
    for round in 0..30_000 {
        if round % 500 == 0 {
            guest.pci.reset().unwrap();
            guest.pci.write_config(4, &[6, 0]);
            guest.start();
        }
        let (value, len) = (random().to_le_bytes(), 1 << (random() & 3));
        let base = if random() & 1 == 0 { 0 } else { 0x2000 };
        let at = match random() & 3 {
            0 => base + (random() & 0x3f),
            1 => random() & 0x3fff,
            2 => 0x3000 + (random() & 0x1f),
            _ => {
                guest
                    .pci
                    .write_config(random() as u16 & 0xff, &value[..len]);
                0x1000
            }
        };
        guest.write(at, &value[..len]);
        let mut data = [0; 8];
        guest
            .mmio
            .read(guest.bar(1) + (random() & 0x1fff), &mut data[..len]);
        guest.mmio.read(guest.bar(0) + at, &mut data[..len]);
    }
}
