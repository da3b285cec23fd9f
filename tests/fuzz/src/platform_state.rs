//! Saved state of the platform's devices, from a hostile peer, and a guest's accesses after it.

use std::sync::Arc;

use vmm_core::bus::BusDevice;
use vmm_core::interrupt::{InterruptError, IrqLine};
use vmm_core::machine::request::{Request, RequestSink};
use vmm_core::memory::Memory;
use vmm_core::migration::ram::CoreWrites;
use vmm_core::platform::{Cmos, FwCfg, OutputBuffer, PowerManagement, RamSize, SerialPort};

struct Nobody;
impl IrqLine for Nobody {
    fn set_level(&self, _: bool) -> Result<(), InterruptError> {
        Ok(())
    }
}
impl RequestSink for Nobody {
    fn request(&self, _: Request) {}
}

fn use_it(device: &dyn BusDevice) {
    for offset in 0..8 {
        let mut byte = [0];
        device.read(offset, &mut byte);
        device.write(offset, &byte);
    }
}

/// See the module.
pub fn platform_state(data: &[u8]) {
    let Ok(serial) = SerialPort::new(Arc::new(Nobody), OutputBuffer::new(64)) else {
        return;
    };
    if rmp_serde::from_slice(data).is_ok_and(|state| serial.restore(&state).is_ok()) {
        use_it(&serial);
    }
    let cmos = Cmos::new(RamSize::of(1 << 30));
    if rmp_serde::from_slice(data).is_ok_and(|state| cmos.restore(&state).is_ok()) {
        use_it(&cmos);
    }
    let power = PowerManagement::new(Arc::new(Nobody), Arc::new(Nobody));
    if rmp_serde::from_slice(data).is_ok_and(|state| power.restore(&state).is_ok()) {
        use_it(&power);
    }
    let fw_cfg = fw_cfg();
    if let Ok(state) = rmp_serde::from_slice(data) {
        fw_cfg.restore(state);
        use_it(&fw_cfg);
    }
}

/// Of a machine without memory.
fn fw_cfg() -> FwCfg {
    let files = vec![("etc/file", vec![1; 100])];
    FwCfg::new(1, files, Arc::new(Memory::default()), CoreWrites::default())
}

/// What these devices save.
pub fn platform_seeds() -> Vec<Vec<u8>> {
    let serial = SerialPort::new(Arc::new(Nobody), OutputBuffer::new(64));
    let power = PowerManagement::new(Arc::new(Nobody), Arc::new(Nobody));
    let states = [
        serial
            .ok()
            .map(|serial| rmp_serde::to_vec_named(&serial.save())),
        Some(rmp_serde::to_vec_named(
            &Cmos::new(RamSize::of(1 << 30)).save(),
        )),
        Some(rmp_serde::to_vec_named(&power.save())),
        Some(rmp_serde::to_vec_named(&fw_cfg().save())),
    ];
    states.into_iter().flatten().flatten().collect()
}
