//! DSDT: the devices that a guest cannot find by itself.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, Path,
    ResourceTemplate, Return, Scope, Uuid,
};
use acpi_tables::{Aml, sdt::Sdt};

use super::{AcpiConfig, SLEEP_TYPE_S5};
use crate::layout::{ECAM, MMIO32, PCI_CONFIG_PORT, RTC_IRQ, RTC_PORT, SERIAL_IRQ, SERIAL_PORT};

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

/// I/O ports from `range`, which is at a fixed address.
fn ports(range: &std::ops::Range<u64>) -> IO {
    let start = u16::try_from(range.start).unwrap_or(0);
    let len = u8::try_from(range.end - range.start).unwrap_or(0);
    IO::new(start, start, 1, len)
}

fn root_bridge(config: &AcpiConfig) -> Encoded {
    let bus = AddressSpace::<u16>::new_bus_number(0, 0);
    let config_ports = ports(&PCI_CONFIG_PORT);
    let window = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        u32::try_from(MMIO32.start).unwrap_or(0),
        u32::try_from(MMIO32.end - 1).unwrap_or(0),
        None,
    );
    let high_window = config.mmio64.as_ref().map(|range| {
        AddressSpace::<u64>::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            range.start,
            range.end - 1,
            None,
        )
    });
    let mut resources: Vec<&dyn Aml> = vec![&bus, &config_ports, &window];
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
    let ecam = Memory32Fixed::new(
        true,
        u32::try_from(ECAM.start).unwrap_or(0),
        u32::try_from(ECAM.end - ECAM.start).unwrap_or(0),
    );
    let serial_ports = ports(&SERIAL_PORT);
    let serial_irq = irq(SERIAL_IRQ);
    let clock_ports = ports(&RTC_PORT);
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
