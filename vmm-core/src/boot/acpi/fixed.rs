//! FADT: the fixed hardware (ACPI 6.5, 5.2.9).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{ACPI_PM_PORT, PCI_CONFIG_PORT, SCI_IRQ};
use crate::platform::{CENTURY_REGISTER, PM1_CONTROL, PM1_CONTROL_LEN, PM1_EVENT_LEN};

/// Writing this to the reset register resets the machine (bits 1 and 2 of port 0xcf9).
const RESET_VALUE: u8 = 6;

/// `IAPC_BOOT_ARCH`: there are devices on the ISA bus that the OS does not find itself.
const LEGACY_DEVICES: u16 = 1 << 0;
/// There is no VGA, which need not be probed.
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// No link has power management to control.
const PCIE_ASPM_CONTROLS: u16 = 1 << 4;

/// A latency above this says that there is no such processor state (ACPI 5.2.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// The table, for a FACS and a DSDT below 4 GiB.
///
/// Bit 1 of the boot flags, an 8042, stays clear: of that there is the reset line only,
/// and Linux would wait for a keyboard otherwise.
pub(super) fn table(facs: u64, dsdt: u64) -> FADT {
    let event = low16(ACPI_PM_PORT.start);
    let control = low16(ACPI_PM_PORT.start + PM1_CONTROL);
    let port = |bits: u8, access, address: u16| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, address.into())
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(u32::try_from(facs).unwrap_or(0))
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.sci_int = u16::try_from(SCI_IRQ).unwrap_or(0).into();
    fadt.pm1a_evt_blk = u32::from(event).into();
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.pm1_evt_len = PM1_EVENT_LEN;
    fadt.pm1_cnt_len = PM1_CONTROL_LEN;
    fadt.x_pm1a_evt_blk = port(PM1_EVENT_LEN * 8, AccessSize::WordAccess, event);
    fadt.x_pm1a_cnt_blk = port(PM1_CONTROL_LEN * 8, AccessSize::WordAccess, control);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CENTURY_REGISTER;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT | PCIE_ASPM_CONTROLS).into();
    let reset = low16(PCI_CONFIG_PORT.start) + 1;
    fadt.reset_reg = port(8, AccessSize::ByteAccess, reset);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// Of a port.
fn low16(port: u64) -> u16 {
    u16::try_from(port).unwrap_or(0)
}
