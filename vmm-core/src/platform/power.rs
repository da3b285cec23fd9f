//! ACPI fixed hardware: power button and soft-off (ACPI 6.5, 4.8.3).
//!
//! | port | register | bits there are |
//! |---|---|---|
//! | +0 | PM1 status, a written 1 clears | `PWRBTN_STS` 8 |
//! | +2 | PM1 enable | `GBL_EN` 5, `PWRBTN_EN` 8 |
//! | +4 | PM1 control | `SCI_EN` 0 (always set), `BM_RLD` 1, `SLP_TYP` 10–12, `SLP_EN` 13 |
//!
//! The SCI is high while an enabled status bit is set. There is no SMI and so no switch
//! to ACPI mode: the machine is always in it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::boot::acpi::SLEEP_TYPE_S5;
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::machine::request::{Request, RequestSink};

use super::saved_state::{InvalidState, PowerSavedState};

/// Size of the PM1 event block in bytes; it comes first.
pub const PM1_EVENT_LEN: u8 = 4;
/// Offset of the PM1 control block.
pub const PM1_CONTROL: u64 = 4;
/// Size of the PM1 control block in bytes.
pub const PM1_CONTROL_LEN: u8 = 2;

const POWER_BUTTON: u16 = 1 << 8;
/// The global lock's event, which never occurs; drivers see whether it can be enabled.
const GLOBAL_LOCK: u16 = 1 << 5;
const STATUS_BITS: u16 = POWER_BUTTON;
const ENABLE_BITS: u16 = POWER_BUTTON | GLOBAL_LOCK;

const SCI_ENABLED: u16 = 1;
const BUS_MASTER_RELOAD: u16 = 1 << 1;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE: u16 = 0b111 << SLEEP_TYPE_SHIFT;
/// Reads as 0.
const SLEEP_ENABLE: u16 = 1 << 13;
const CONTROL_BITS: u16 = SCI_ENABLED | BUS_MASTER_RELOAD | SLEEP_TYPE;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            status: 0,
            enable: 0,
            control: SCI_ENABLED,
        }
    }
}

impl Registers {
    fn sci(self) -> bool {
        self.status & self.enable != 0
    }

    /// Takes one byte; whether it puts the machine to sleep.
    fn write_byte(&mut self, offset: u64, byte: u8) -> bool {
        let shift = 8 * (offset & 1);
        let value = u16::from(byte) << shift;
        let lane = 0xff << shift;
        match offset & !1 {
            0 => self.status &= !value,
            2 => self.enable = self.enable & !lane | value & ENABLE_BITS,
            PM1_CONTROL => {
                let kept = self.control & !lane;
                self.control = kept | value & CONTROL_BITS | SCI_ENABLED;
                return value & SLEEP_ENABLE != 0;
            }
            _ => {}
        }
        false
    }
}

/// The PM1 register blocks.
pub struct PowerManagement {
    registers: Mutex<Registers>,
    sci: Arc<dyn IrqLine>,
    requests: Arc<dyn RequestSink>,
}

impl PowerManagement {
    /// Power management that drives `sci` and asks `requests` for soft-off.
    pub fn new(sci: Arc<dyn IrqLine>, requests: Arc<dyn RequestSink>) -> Self {
        Self {
            registers: Mutex::default(),
            sci,
            requests,
        }
    }

    /// Presses the power button. The guest decides what becomes of it.
    pub fn power_button(&self) {
        self.change(|registers| registers.status |= POWER_BUTTON);
    }

    /// Returns to the state after power-on.
    pub fn reset(&self) {
        let mut registers = self.lock();
        *registers = Registers::default();
        self.drive(*registers);
    }

    /// What it was doing.
    #[must_use]
    pub fn save(&self) -> PowerSavedState {
        let Registers {
            status,
            enable,
            control,
        } = *self.lock();
        PowerSavedState {
            status,
            enable,
            control,
        }
    }

    /// Goes on from saved state, with the SCI at its level.
    ///
    /// # Errors
    /// A register has bits that it cannot have.
    pub fn restore(&self, state: &PowerSavedState) -> Result<(), InvalidState> {
        for (field, value, bits) in [
            ("status", state.status, STATUS_BITS),
            ("enable", state.enable, ENABLE_BITS),
            ("control", state.control, CONTROL_BITS),
        ] {
            if value & !bits != 0 {
                return Err(invalid(field, value, "which has reserved bits"));
            }
        }
        if state.control & SCI_ENABLED == 0 {
            return Err(invalid("control", state.control, "without SCI_EN"));
        }
        let mut registers = self.lock();
        *registers = Registers {
            status: state.status,
            enable: state.enable,
            control: state.control,
        };
        self.drive(*registers);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes registers, and the SCI if its level follows.
    fn change<T>(&self, change: impl FnOnce(&mut Registers) -> T) -> T {
        let mut registers = self.lock();
        let before = registers.sci();
        let result = change(&mut registers);
        if registers.sci() != before {
            self.drive(*registers);
        }
        result
    }

    fn drive(&self, registers: Registers) {
        if let Err(error) = self.sci.set_level(registers.sci()) {
            tracing::warn!(%error, "the system control interrupt was not delivered");
        }
    }
}

fn invalid(field: &'static str, value: u16, rule: &'static str) -> InvalidState {
    InvalidState {
        device: "power management",
        field,
        value: value.into(),
        rule,
    }
}

impl BusDevice for PowerManagement {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = *self.lock();
        let image = [registers.status, registers.enable, registers.control, 0];
        let mut bytes = image.iter().flat_map(|r| r.to_le_bytes());
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut bytes = bytes.by_ref().skip(skipped);
        data.fill_with(|| bytes.next().unwrap_or(0));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let sleep = self.change(|registers| {
            (offset..).zip(data).fold(false, |sleep, (at, &byte)| {
                registers.write_byte(at, byte) || sleep
            }) && registers.control & SLEEP_TYPE == u16::from(SLEEP_TYPE_S5) << SLEEP_TYPE_SHIFT
        });
        if sleep {
            self.requests.request(Request::PowerOff);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::testing::{Line, Requests};

    struct Rig {
        power: PowerManagement,
        sci: Arc<Line>,
        requests: Arc<Requests>,
    }

    fn rig() -> Rig {
        let sci = Arc::new(Line::default());
        let requests = Arc::new(Requests::default());
        let power = PowerManagement::new(sci.clone(), requests.clone());
        Rig {
            power,
            sci,
            requests,
        }
    }

    impl Rig {
        fn read16(&self, offset: u64) -> u16 {
            let mut data = [0; 2];
            self.power.read(offset, &mut data);
            u16::from_le_bytes(data)
        }

        fn write16(&self, offset: u64, value: u16) {
            self.power.write(offset, &value.to_le_bytes());
        }
    }

    #[test]
    fn the_button_raises_the_sci_until_its_status_is_cleared() {
        let rig = rig();
        rig.write16(2, 1 << 8);
        assert!(!rig.sci.level());
        rig.power.power_button();
        assert_eq!(rig.read16(0), 1 << 8);
        assert!(rig.sci.level());
        rig.write16(0, !(1 << 8));
        assert!(rig.sci.level(), "zeros clear nothing");
        rig.write16(0, 1 << 8);
        assert_eq!(rig.read16(0), 0);
        assert!(!rig.sci.level());
    }

    #[test]
    fn a_button_that_is_not_enabled_waits() {
        let rig = rig();
        rig.power.power_button();
        assert!(!rig.sci.level());
        rig.power.write(3, &[1]);
        assert!(rig.sci.level());
        rig.power.write(3, &[0]);
        assert!(!rig.sci.level());
        assert_eq!(rig.read16(0), 1 << 8);
    }

    #[test]
    fn the_level_is_set_only_when_it_changes() {
        let rig = rig();
        rig.write16(2, 0x120);
        rig.power.power_button();
        rig.power.power_button();
        rig.write16(2, 0x100);
        assert_eq!(rig.sci.history(), [true]);
    }

    #[test]
    fn reserved_bits_read_as_zero_and_sci_enable_as_one() {
        let rig = rig();
        rig.power.write(0, &[0xff; 8]);
        assert_eq!(rig.read16(0), 0);
        assert_eq!(rig.read16(2), 0x120);
        assert_eq!(rig.read16(4), 0x1c03);
        rig.write16(4, 0);
        assert_eq!(rig.read16(4), 1);
        let mut wide = [0xaa; 8];
        rig.power.read(0, &mut wide);
        assert_eq!(wide, [0, 0, 0x20, 1, 1, 0, 0, 0]);
    }

    #[test]
    fn only_soft_off_powers_off() {
        let rig = rig();
        rig.write16(4, 0);
        rig.write16(4, 5 << 10 | 1 << 13);
        assert_eq!(rig.requests.taken(), []);
        rig.write16(4, 1 << 13);
        assert_eq!(rig.requests.taken(), [Request::PowerOff]);
        rig.power.write(5, &[1 << 5]);
        assert_eq!(rig.requests.taken(), [Request::PowerOff]);
        assert_eq!(rig.read16(4), 1);
    }

    #[test]
    fn state_travels_with_the_level() {
        let rig1 = rig();
        rig1.write16(2, 0x100);
        rig1.power.power_button();
        let state = rig1.power.save();
        let rig2 = rig();
        rig2.power.restore(&state).unwrap();
        assert!(rig2.sci.level());
        assert_eq!(rig2.power.save(), state);
        rig2.power.reset();
        assert!(!rig2.sci.level());
        assert_eq!(rig2.power.save(), rig().power.save());
    }

    #[test]
    fn impossible_state_is_refused_and_changes_nothing() {
        let rig = rig();
        let good = rig.power.save();
        for (bad, field) in [
            (
                PowerSavedState {
                    status: 1,
                    ..good.clone()
                },
                "status is 0x1",
            ),
            (
                PowerSavedState {
                    enable: 2,
                    ..good.clone()
                },
                "enable is 0x2",
            ),
            (
                PowerSavedState {
                    control: 0,
                    ..good.clone()
                },
                "control is 0x0",
            ),
            (
                PowerSavedState {
                    control: 0x2001,
                    ..good.clone()
                },
                "control is 0x2001",
            ),
        ] {
            let error = rig.power.restore(&bad).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
            assert_eq!(rig.power.save(), good);
        }
    }
}
