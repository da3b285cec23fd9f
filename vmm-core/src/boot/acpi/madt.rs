//! MADT: interrupt controllers (ACPI 6.5, 5.2.12).

use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::{Aml, AmlSink, sdt::Sdt};

use super::{TIMER_PIN, field8, field32};
use crate::layout::{IO_APIC, LOCAL_APIC, SCI_IRQ};

const REVISION: u8 = 5;
/// There are two 8259 as well.
const PCAT_COMPAT: u32 = 1;

const INTERRUPT_OVERRIDE: u8 = 2;
const LOCAL_APIC_NMI: u8 = 4;
const LOCAL_X2APIC: u8 = 9;
const LOCAL_X2APIC_NMI: u8 = 10;

/// Polarity and trigger mode as on the ISA bus.
const BUS_DEFAULT: u16 = 0;
const LEVEL_ACTIVE_HIGH: u16 = 0b1101;

const LOCAL_APIC_ADDRESS: u32 = field32(LOCAL_APIC);
const IO_APIC_ADDRESS: u32 = field32(IO_APIC);
/// ISA's number of the system control interrupt is that of its input.
const SCI: u8 = field8(SCI_IRQ as u64);

/// The largest id that a local APIC entry can have.
const XAPIC_MAX: u32 = 254;

/// The table for vCPUs of these APIC ids; a vCPU's place is its ACPI id.
pub(super) fn table(apic_ids: &[u32]) -> Sdt {
    let mut body = Vec::new();
    body.dword(LOCAL_APIC_ADDRESS);
    body.dword(PCAT_COMPAT);
    for (uid, &id) in (0..).zip(apic_ids) {
        processor(&mut body, uid, id);
    }
    IoApic::new(0, IO_APIC_ADDRESS, 0).to_aml_bytes(&mut body);
    interrupt_override(&mut body, 0, TIMER_PIN, BUS_DEFAULT);
    interrupt_override(&mut body, SCI, SCI_IRQ, LEVEL_ACTIVE_HIGH);
    // On every processor, the NMI comes in by LINT1.
    body.vec(&[LOCAL_APIC_NMI, 6, 0xff, 0, 0, 1]);
    if apic_ids.iter().any(|&id| id > XAPIC_MAX) {
        let all = [0xff; 4];
        body.vec(&[LOCAL_X2APIC_NMI, 12, 0, 0]);
        body.vec(&all);
        body.vec(&[1, 0, 0, 0]);
    }
    super::table(*b"APIC", REVISION, &body)
}

fn processor(body: &mut Vec<u8>, uid: u32, id: u32) {
    match (u8::try_from(uid), u8::try_from(id)) {
        (Ok(uid), Ok(small)) if id <= XAPIC_MAX => {
            ProcessorLocalApic::new(uid, small, EnabledStatus::Enabled).to_aml_bytes(body);
        }
        _ => {
            body.vec(&[LOCAL_X2APIC, 16, 0, 0]);
            body.dword(id);
            body.dword(EnabledStatus::Enabled as u32);
            body.dword(uid);
        }
    }
}

fn interrupt_override(body: &mut Vec<u8>, irq: u8, pin: u32, flags: u16) {
    body.vec(&[INTERRUPT_OVERRIDE, 10, 0, irq]);
    body.dword(pin);
    body.word(flags);
}
