//! DSDT: the devices that a guest cannot find by itself.

use std::ops::Range;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, Path,
    ResourceTemplate, Return, Scope, Uuid,
};
use acpi_tables::{Aml, sdt::Sdt};

use super::{AcpiConfig, SLEEP_TYPE_S5, field8, field16, field32};
use crate::layout::{
    ECAM, MMIO32, MMIO32_HIGH, PCI_CONFIG_PORT, RTC_IRQ, RTC_PORT, SERIAL_IRQ, SERIAL_PORT,
};

/// With 64-bit integers.
const REVISION: u8 = 2;

/// Of the PCI features that an OS may ask to control, those that it gets: all but the
/// standard hot-plug controller (PCI firmware specification 4.5.1).
const PCI_CONTROL: u32 = 0x3d;

/// The table.
pub(super) fn table(config: &AcpiConfig) -> Sdt {
    let mut body = Vec::new();
    let (s5, zero) = (SLEEP_TYPE_S5, 0_u8);
    Name::new("\\_S5_".into(), &Package::new(vec![&s5, &s5, &zero, &zero])).to_aml_bytes(&mut body);
    let root = root_bridge(config);
    let fixed = fixed_devices();
    let cpus: Vec<_> = (0..config.apic_ids.len()).map(processor).collect();
    let devices = [&root, &fixed].into_iter().chain(&cpus);
    Scope::new("\\_SB_".into(), devices.map(|d| d as &dyn Aml).collect()).to_aml_bytes(&mut body);
    super::table(*b"DSDT", REVISION, &body)
}

/// AML that is finished.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

impl Encoded {
    fn of(parts: &[&dyn Aml]) -> Self {
        let mut bytes = Vec::new();
        for part in parts {
            part.to_aml_bytes(&mut bytes);
        }
        Self(bytes)
    }
}

/// A named object.
fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(path.into(), value)
}

/// I/O ports at a fixed place.
struct Ports {
    start: u16,
    len: u8,
}

impl Ports {
    const fn of(range: Range<u64>) -> Self {
        Self {
            start: field16(range.start),
            len: field8(range.end - range.start),
        }
    }

    fn resource(&self) -> IO {
        IO::new(self.start, self.start, 1, self.len)
    }
}

const CONFIG_PORTS: Ports = Ports::of(PCI_CONFIG_PORT);
const SERIAL_PORTS: Ports = Ports::of(SERIAL_PORT);
const CLOCK_PORTS: Ports = Ports::of(RTC_PORT);
/// First and last addresses.
const WINDOWS: [(u32, u32); 2] = [
    (field32(MMIO32.start), field32(MMIO32.end - 1)),
    (field32(MMIO32_HIGH.start), field32(MMIO32_HIGH.end - 1)),
];
const ECAM_START: u32 = field32(ECAM.start);
const ECAM_LEN: u32 = field32(ECAM.end - ECAM.start);

fn root_bridge(config: &AcpiConfig) -> Encoded {
    let bus = AddressSpace::<u16>::new_bus_number(0, 0);
    let config_ports = CONFIG_PORTS.resource();
    let [low_window, window] = WINDOWS.map(|(start, last)| {
        let not_cacheable = AddressSpaceCacheable::NotCacheable;
        AddressSpace::<u32>::new_memory(not_cacheable, true, start, last, None)
    });
    let high_window = config.mmio64.as_ref().map(|range| {
        AddressSpace::<u64>::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            range.start,
            range.end - 1,
            None,
        )
    });
    let mut resources: Vec<&dyn Aml> = vec![&bus, &config_ports, &low_window, &window];
    resources.extend(high_window.as_ref().map(|w| w as &dyn Aml));
    let control = pci_control();
    Encoded::of(&[&Device::new(
        "PCI0".into(),
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_UID", &0_u8),
            &name("_SEG", &0_u8),
            &name("_BBN", &0_u8),
            &name("_CRS", &ResourceTemplate::new(resources)),
            &control,
        ],
    )])
}

/// `_OSC`: the OS takes over what it asks for (ACPI 6.5, 6.2.11).
fn pci_control() -> Encoded {
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let (uuid, revision, buffer) = (Arg(0), Arg(1), Arg(3));
    let pci = Uuid::new("33db4df7-1ff7-401c-9657-7441c03dd766");
    let granted = Local(0);
    let allowed = PCI_CONTROL;
    let (unknown_uuid, unknown_revision, masked) = (4_u8, 8_u8, 16_u8);
    Encoded::of(&[&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &buffer, &0_u8),
            &If::new(
                &Equal::new(&uuid, &pci),
                vec![
                    &CreateDWordField::new(&control, &buffer, &8_u8),
                    &And::new(&granted, &control, &allowed),
                    &If::new(
                        &NotEqual::new(&revision, &1_u8),
                        vec![&Or::new(&status, &status, &unknown_revision)],
                    ),
                    &If::new(
                        &NotEqual::new(&granted, &control),
                        vec![&Or::new(&status, &status, &masked)],
                    ),
                    &And::new(&control, &control, &allowed),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &unknown_uuid)]),
            &Return::new(&buffer),
        ],
    )])
}

fn fixed_devices() -> Encoded {
    let irq = |number| Interrupt::new(true, true, false, false, number);
    // Linux uses the configuration space only if a motherboard resource covers it.
    let ecam = Memory32Fixed::new(true, ECAM_START, ECAM_LEN);
    let serial_ports = SERIAL_PORTS.resource();
    let serial_irq = irq(SERIAL_IRQ);
    let clock_ports = CLOCK_PORTS.resource();
    let clock_irq = irq(RTC_IRQ);
    Encoded::of(&[
        &Device::new(
            "ECAM".into(),
            vec![
                &name("_HID", &EISAName::new("PNP0C02")),
                &name("_UID", &0_u8),
                &name("_CRS", &ResourceTemplate::new(vec![&ecam])),
            ],
        ),
        &Device::new(
            "COM1".into(),
            vec![
                &name("_HID", &EISAName::new("PNP0501")),
                &name("_UID", &0_u8),
                &name("_DDN", &"COM1"),
                &name(
                    "_CRS",
                    &ResourceTemplate::new(vec![&serial_ports, &serial_irq]),
                ),
            ],
        ),
        &Device::new(
            "RTC_".into(),
            vec![
                &name("_HID", &EISAName::new("PNP0B00")),
                &name(
                    "_CRS",
                    &ResourceTemplate::new(vec![&clock_ports, &clock_irq]),
                ),
            ],
        ),
    ])
}

/// A processor device; its `_UID` leads to the entry in the MADT.
fn processor(index: usize) -> Encoded {
    Encoded::of(&[&Device::new(
        format!("C{index:03X}").as_str().into(),
        vec![&name("_HID", &"ACPI0007"), &name("_UID", &index)],
    )])
}
