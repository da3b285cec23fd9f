//! FADT: the fixed hardware (ACPI 6.5, 5.2.9).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, field16};
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

const EVENT_PORT: u16 = field16(ACPI_PM_PORT.start);
const CONTROL_PORT: u16 = field16(ACPI_PM_PORT.start + PM1_CONTROL);
/// Second byte of PCI's configuration address.
const RESET_PORT: u16 = field16(PCI_CONFIG_PORT.start + 1);
const SCI: u16 = field16(SCI_IRQ as u64);

/// The table, for a FACS and a DSDT at these addresses.
///
/// Bit 1 of the boot flags, an 8042, stays clear: of that there is the reset line only,
/// and Linux would wait for a keyboard otherwise.
pub(super) fn table(facs: u32, dsdt: u64) -> FADT {
    let port = |bits: u8, access, address: u16| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, address.into())
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.sci_int = SCI.into();
    fadt.pm1a_evt_blk = u32::from(EVENT_PORT).into();
    fadt.pm1a_cnt_blk = u32::from(CONTROL_PORT).into();
    fadt.pm1_evt_len = PM1_EVENT_LEN;
    fadt.pm1_cnt_len = PM1_CONTROL_LEN;
    fadt.x_pm1a_evt_blk = port(PM1_EVENT_LEN * 8, AccessSize::WordAccess, EVENT_PORT);
    fadt.x_pm1a_cnt_blk = port(PM1_CONTROL_LEN * 8, AccessSize::WordAccess, CONTROL_PORT);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CENTURY_REGISTER;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT | PCIE_ASPM_CONTROLS).into();
    fadt.reset_reg = port(8, AccessSize::ByteAccess, RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}
