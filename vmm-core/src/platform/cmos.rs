//! Real-time clock and CMOS memory (MC146818).
//!
//! The clock is that of the host, plus what the guest has set it ahead. It counts in BCD
//! and 24 hours, UTC. It raises no interrupts: alarm, periodic and update interrupts can
//! be enabled and never come, and Linux keeps time by other means.
//!
//! While the guest holds `SET` in status B, the time registers stand still and take what
//! it writes; when it lets go, the clock goes on from there. A time that does not exist
//! is forgotten.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;
use crate::layout::{HIGH_MEMORY, LOW_RAM_END};

use super::calendar::Calendar;
use super::saved_state::{ClockSetting, CmosSavedState, InvalidState};

/// Register with the first two digits of the year, which the FADT names.
pub const CENTURY_REGISTER: u8 = 0x32;

const INDEX_BITS: u8 = 0x7f;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
const SHUTDOWN: u8 = 0x0f;
const ALARM: [u8; 3] = [1, 3, 5];

/// Status A: an update is about to begin.
const UPDATING: u8 = 1 << 7;
/// Divider for 32768 Hz and the usual periodic rate.
const STATUS_A_RESET: u8 = 0x26;
/// Status B: the registers stand still.
const SET: u8 = 1 << 7;
const DECIMAL_24_HOURS: u8 = 1 << 1;
/// Status B: all but the data mode, which is BCD, and the 24 hours.
const STATUS_B_BITS: u8 = 0b1111_1001;
/// Status D: the battery is good.
const VALID: u8 = 1 << 7;

/// How long before a new second the update bit says so: 244 µs in which registers may
/// still be read, and 1984 µs of the update (MC146818 data sheet).
const UPDATE_TIME: Duration = Duration::from_micros(244 + 1984);

/// More than the years that the registers can say.
const AHEAD_MAX: u64 = 10_000 * 366 * 86_400;

/// Sizes of RAM that firmware reads from CMOS, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamSize {
    /// Of the RAM that starts at 0.
    pub low: u64,
    /// Of the RAM from 4 GiB on.
    pub high: u64,
}

impl RamSize {
    /// Of a machine with so many bytes of RAM, by the layout of [`crate::layout`].
    #[must_use]
    pub fn of(total: u64) -> Self {
        let low = total.min(LOW_RAM_END);
        Self {
            low,
            high: total - low,
        }
    }

    /// The CMOS register at `index`; 0 where there is none.
    fn register(self, index: u8) -> u8 {
        const KIB: u64 = 1 << 10;
        const UNIT: u64 = 64 << 10;
        let count = |bytes: u64, unit: u64, max: u64| (bytes / unit).min(max).to_le_bytes();
        let extended = self.low.saturating_sub(HIGH_MEMORY);
        let above_16_mib = self.low.saturating_sub(16 << 20);
        let (value, first) = match index {
            0x15..=0x16 => (count(self.low, KIB, 640), 0x15),
            0x17..=0x18 => (count(extended, KIB, 0xffff), 0x17),
            0x30..=0x31 => (count(extended, KIB, 0xffff), 0x30),
            0x34..=0x35 => (count(above_16_mib, UNIT, 0xffff), 0x34),
            0x5b..=0x5d => (count(self.high, UNIT, 0xff_ffff), 0x5b),
            _ => return 0,
        };
        value[usize::from(index - first)]
    }
}

/// Where the time comes from: since 1970.
pub type WallClock = Box<dyn Fn() -> Duration + Send + Sync>;

struct Registers {
    index: u8,
    ahead: i64,
    status_a: u8,
    status_b: u8,
    alarm: [u8; 3],
    shutdown: u8,
    setting: Option<Calendar>,
}

/// The clock and its memory.
pub struct Cmos {
    registers: Mutex<Registers>,
    ram: RamSize,
    clock: WallClock,
}

impl Cmos {
    /// A clock that shows the host's time.
    #[must_use]
    pub fn new(ram: RamSize) -> Self {
        Self::with_clock(
            ram,
            Box::new(|| {
                SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default()
            }),
        )
    }

    /// A clock that shows the time of `clock`.
    #[must_use]
    pub fn with_clock(ram: RamSize, clock: WallClock) -> Self {
        Self {
            registers: Mutex::new(Registers {
                index: 0,
                ahead: 0,
                status_a: STATUS_A_RESET,
                status_b: DECIMAL_24_HOURS,
                alarm: [0; 3],
                shutdown: 0,
                setting: None,
            }),
            ram,
            clock,
        }
    }

    /// As after a reset: the time goes on, what was about to be set is forgotten.
    pub fn reset(&self) {
        let mut registers = self.lock();
        let ahead = registers.ahead;
        *registers = Registers {
            index: 0,
            ahead,
            status_a: STATUS_A_RESET,
            status_b: DECIMAL_24_HOURS,
            alarm: [0; 3],
            shutdown: 0,
            setting: None,
        };
    }

    /// What it was doing.
    #[must_use]
    pub fn save(&self) -> CmosSavedState {
        let r = self.lock();
        CmosSavedState {
            index: r.index,
            ahead: r.ahead,
            status_a: r.status_a,
            status_b: r.status_b,
            alarm: r.alarm,
            shutdown: r.shutdown,
            setting: r.setting.map(|c| ClockSetting {
                second: c.second,
                minute: c.minute,
                hour: c.hour,
                weekday: c.weekday,
                day: c.day,
                month: c.month,
                year: c.year,
                century: c.century,
            }),
        }
    }

    /// Goes on from saved state; the time is that of this host and what it was ahead.
    ///
    /// # Errors
    /// A register has bits that it cannot have, or the time is beyond all calendars.
    pub fn restore(&self, state: &CmosSavedState) -> Result<(), InvalidState> {
        let invalid = |field, value: u64, rule| {
            Err(InvalidState {
                device: "clock",
                field,
                value,
                rule,
            })
        };
        if state.index > INDEX_BITS {
            return invalid("index", state.index.into(), "more than 0x7f");
        }
        if state.ahead.unsigned_abs() > AHEAD_MAX {
            let ahead = state.ahead.unsigned_abs();
            return invalid("ahead", ahead, "more than 10000 years");
        }
        if state.status_a & UPDATING != 0 {
            return invalid("status_a", state.status_a.into(), "with its update bit");
        }
        if state.status_b & !STATUS_B_BITS != DECIMAL_24_HOURS {
            return invalid("status_b", state.status_b.into(), "not BCD and 24 hours");
        }
        if (state.status_b & SET != 0) != state.setting.is_some() {
            return invalid(
                "status_b",
                state.status_b.into(),
                "whose SET bit contradicts the setting",
            );
        }
        *self.lock() = Registers {
            index: state.index,
            ahead: state.ahead,
            status_a: state.status_a,
            status_b: state.status_b,
            alarm: state.alarm,
            shutdown: state.shutdown,
            setting: state.setting.map(|s| Calendar {
                second: s.second,
                minute: s.minute,
                hour: s.hour,
                weekday: s.weekday,
                day: s.day,
                month: s.month,
                year: s.year,
                century: s.century,
            }),
        };
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn host_seconds(&self) -> i64 {
        i64::try_from((self.clock)().as_secs()).unwrap_or(i64::MAX)
    }

    fn calendar(&self, registers: &Registers) -> Calendar {
        registers
            .setting
            .unwrap_or_else(|| Calendar::at(self.host_seconds().saturating_add(registers.ahead)))
    }

    /// Goes on from a time, if there is such a time.
    fn set_clock(&self, registers: &mut Registers, time: Calendar) {
        if let Some(seconds) = time.unix() {
            registers.ahead = seconds.saturating_sub(self.host_seconds());
        }
    }

    fn read_register(&self, registers: &Registers) -> u8 {
        let index = registers.index;
        if let Some(value) = time_register(&mut self.calendar(registers), index).copied() {
            return value;
        }
        match index {
            STATUS_A => {
                let fraction = Duration::from_nanos((self.clock)().subsec_nanos().into());
                let updating =
                    registers.setting.is_none() && fraction >= Duration::from_secs(1) - UPDATE_TIME;
                registers.status_a | if updating { UPDATING } else { 0 }
            }
            STATUS_B => registers.status_b,
            STATUS_D => VALID,
            SHUTDOWN => registers.shutdown,
            _ => match ALARM.iter().position(|&a| a == index) {
                Some(i) => registers.alarm[i],
                None => self.ram.register(index),
            },
        }
    }

    fn write_register(&self, registers: &mut Registers, value: u8) {
        let index = registers.index;
        let mut calendar = self.calendar(registers);
        if let Some(register) = time_register(&mut calendar, index) {
            *register = value;
            match &mut registers.setting {
                Some(setting) => *setting = calendar,
                None => self.set_clock(registers, calendar),
            }
            return;
        }
        match index {
            STATUS_A => registers.status_a = value & !UPDATING,
            STATUS_B => {
                registers.status_b = value & STATUS_B_BITS | DECIMAL_24_HOURS;
                if value & SET != 0 {
                    registers.setting = Some(calendar);
                } else if let Some(time) = registers.setting.take() {
                    self.set_clock(registers, time);
                }
            }
            SHUTDOWN => registers.shutdown = value,
            _ => {
                if let Some(i) = ALARM.iter().position(|&a| a == index) {
                    registers.alarm[i] = value;
                }
            }
        }
    }
}

/// The time register at `index`.
fn time_register(calendar: &mut Calendar, index: u8) -> Option<&mut u8> {
    Some(match index {
        0 => &mut calendar.second,
        2 => &mut calendar.minute,
        4 => &mut calendar.hour,
        6 => &mut calendar.weekday,
        7 => &mut calendar.day,
        8 => &mut calendar.month,
        9 => &mut calendar.year,
        CENTURY_REGISTER => &mut calendar.century,
        _ => return None,
    })
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        for (at, byte) in (offset..).zip(data) {
            // The index can only be written.
            *byte = if at == 1 {
                self.read_register(&registers)
            } else {
                0xff
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        for (at, &byte) in (offset..).zip(data) {
            match at {
                0 => registers.index = byte & INDEX_BITS,
                1 => self.write_register(&mut registers, byte),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// 2026-11-21 02:25:22.
    const NOW: u64 = 1_795_227_922;

    struct Rig {
        cmos: Cmos,
        micros: Arc<AtomicU64>,
    }

    fn rig() -> Rig {
        let micros = Arc::new(AtomicU64::new(NOW * 1_000_000));
        let clock = Arc::clone(&micros);
        Rig {
            cmos: Cmos::with_clock(
                RamSize::of(5 << 30),
                Box::new(move || Duration::from_micros(clock.load(Ordering::Relaxed))),
            ),
            micros,
        }
    }

    impl Rig {
        fn get(&self, index: u8) -> u8 {
            let mut data = [0];
            self.cmos.write(0, &[index]);
            self.cmos.read(1, &mut data);
            data[0]
        }

        fn set(&self, index: u8, value: u8) {
            self.cmos.write(0, &[index, value]);
        }

        fn time(&self) -> [u8; 7] {
            [CENTURY_REGISTER, 9, 8, 7, 4, 2, 0].map(|index| self.get(index))
        }

        fn pass(&self, micros: u64) {
            self.micros.fetch_add(micros, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_time_is_the_hosts_in_bcd() {
        let rig = rig();
        assert_eq!(rig.time(), [0x20, 0x26, 0x11, 0x21, 0x02, 0x25, 0x22]);
        assert_eq!(rig.get(6), 7);
        rig.pass(38_000_000);
        assert_eq!(rig.time(), [0x20, 0x26, 0x11, 0x21, 0x02, 0x26, 0x00]);
    }

    #[test]
    fn the_update_bit_comes_before_each_second() {
        let rig = rig();
        assert_eq!(rig.get(0x0a), 0x26);
        rig.pass(997_771);
        assert_eq!(rig.get(0x0a), 0x26);
        rig.pass(1);
        assert_eq!(rig.get(0x0a), 0xa6);
        rig.pass(2_228);
        assert_eq!(rig.get(0x0a), 0x26);
        assert_eq!(rig.get(0), 0x23);
    }

    #[test]
    fn status_registers_say_bcd_24_hours_and_a_good_battery() {
        let rig = rig();
        assert_eq!((rig.get(0x0b), rig.get(0x0c), rig.get(0x0d)), (2, 0, 0x80));
        rig.set(0x0b, 0x74);
        assert_eq!(rig.get(0x0b), 0x72, "data mode and hours cannot be changed");
        rig.set(0x0f, 0x0a);
        assert_eq!(rig.get(0x0f), 0x0a);
        rig.set(5, 0x17);
        assert_eq!(rig.get(5), 0x17);
        let mut index = [0];
        rig.cmos.read(0, &mut index);
        assert_eq!(index, [0xff]);
        assert_eq!(rig.get(0x8d), 0x80, "the index has 7 bits");
    }

    #[test]
    fn a_time_that_was_set_goes_on() {
        let rig = rig();
        rig.set(0x0b, 0x82);
        for (index, value) in [(0, 0x58), (2, 0x59), (4, 0x23), (7, 0x31), (8, 0x12)] {
            rig.set(index, value);
        }
        rig.pass(5_000_000);
        assert_eq!(rig.time(), [0x20, 0x26, 0x12, 0x31, 0x23, 0x59, 0x58]);
        rig.set(0x0b, 0x02);
        rig.pass(2_000_000);
        assert_eq!(rig.time(), [0x20, 0x27, 0x01, 0x01, 0, 0, 0]);
    }

    #[test]
    fn a_time_that_does_not_exist_is_forgotten() {
        let rig = rig();
        rig.set(0x0b, 0x82);
        rig.set(8, 0x13);
        assert_eq!(rig.get(8), 0x13);
        rig.set(0x0b, 0x02);
        assert_eq!(rig.get(8), 0x11);
    }

    #[test]
    fn ram_sizes_are_where_firmware_looks() {
        let rig = rig();
        let word = |index| u16::from_le_bytes([rig.get(index), rig.get(index + 1)]);
        assert_eq!(word(0x15), 640);
        assert_eq!((word(0x17), word(0x30)), (0xffff, 0xffff));
        assert_eq!(word(0x34), 0xbf00);
        assert_eq!((word(0x5b), rig.get(0x5d)), (0x8000, 0));
        let small = RamSize::of(8 << 20);
        assert_eq!((small.register(0x17), small.register(0x18)), (0, 0x1c));
        assert_eq!((small.register(0x34), small.register(0x5b)), (0, 0));
    }

    #[test]
    fn state_travels_with_the_time_that_was_set() {
        let from = rig();
        from.set(0x0b, 0x82);
        from.set(4, 0x09);
        let setting = from.cmos.save();
        from.set(0x0b, 0x02);
        let set = from.cmos.save();
        assert_eq!(set.ahead, 7 * 3600);
        for state in [setting, set] {
            let to = rig();
            to.cmos.restore(&state).unwrap();
            assert_eq!(to.cmos.save(), state);
            assert_eq!(to.get(4), 0x09);
        }
    }

    #[test]
    fn a_reset_keeps_the_time() {
        let rig = rig();
        rig.set(4, 0x09);
        rig.set(0x0f, 5);
        rig.set(0x0b, 0x92);
        rig.cmos.reset();
        assert_eq!((rig.get(4), rig.get(0x0f), rig.get(0x0b)), (0x09, 0, 2));
    }

    #[test]
    fn impossible_state_is_refused_and_changes_nothing() {
        let rig = rig();
        let good = rig.cmos.save();
        for (bad, field) in [
            (
                CmosSavedState {
                    index: 0x80,
                    ..good.clone()
                },
                "index is 0x80",
            ),
            (
                CmosSavedState {
                    ahead: i64::MIN,
                    ..good.clone()
                },
                "ahead is 0x8",
            ),
            (
                CmosSavedState {
                    status_a: 0xa6,
                    ..good.clone()
                },
                "status_a is 0xa6",
            ),
            (
                CmosSavedState {
                    status_b: 0,
                    ..good.clone()
                },
                "status_b is 0x0",
            ),
            (
                CmosSavedState {
                    status_b: 6,
                    ..good.clone()
                },
                "status_b is 0x6",
            ),
            (
                CmosSavedState {
                    status_b: 0x82,
                    ..good.clone()
                },
                "status_b is 0x82",
            ),
        ] {
            let error = rig.cmos.restore(&bad).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
            assert_eq!(rig.cmos.save(), good);
        }
        // Extreme but legal: no overflow, whatever the time.
        let far = CmosSavedState {
            ahead: -(10_000 * 366 * 86_400),
            ..good
        };
        rig.cmos.restore(&far).unwrap();
        assert_eq!(rig.time()[..2], [0x19, 0x70]);
    }
}
