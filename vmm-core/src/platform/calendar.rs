//! The clock's time registers: calendar time in BCD, 24 hours, UTC.

use time::{Date, Month, OffsetDateTime, Time};

/// Second at which the year 10000 begins, which two digits of century cannot say.
const YEAR_10000: i64 = 253_402_300_800;

/// The registers, as the guest reads and writes them: after a write they may hold
/// anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Calendar {
    pub(super) second: u8,
    pub(super) minute: u8,
    pub(super) hour: u8,
    pub(super) weekday: u8,
    pub(super) day: u8,
    pub(super) month: u8,
    pub(super) year: u8,
    pub(super) century: u8,
}

impl Calendar {
    /// At so many seconds since 1970, from year 1970 to 9999.
    pub(super) fn at(unix: i64) -> Self {
        let unix = unix.clamp(0, YEAR_10000 - 1);
        let now = OffsetDateTime::from_unix_timestamp(unix).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let year = now.year().unsigned_abs();
        Self {
            second: bcd(now.second().into()),
            minute: bcd(now.minute().into()),
            hour: bcd(now.hour().into()),
            weekday: now.weekday().number_from_sunday(),
            day: bcd(now.day().into()),
            month: bcd(u8::from(now.month()).into()),
            year: bcd(year % 100),
            century: bcd(year / 100),
        }
    }

    /// Seconds since 1970, or `None` if this is no date. The weekday is not looked at.
    pub(super) fn unix(&self) -> Option<i64> {
        let year = i32::from(decimal(self.century)?) * 100 + i32::from(decimal(self.year)?);
        let month = Month::try_from(decimal(self.month)?).ok()?;
        let date = Date::from_calendar_date(year, month, decimal(self.day)?).ok()?;
        let time = Time::from_hms(
            decimal(self.hour)?,
            decimal(self.minute)?,
            decimal(self.second)?,
        )
        .ok()?;
        Some(date.with_time(time).assume_utc().unix_timestamp())
    }
}

/// Two decimal digits of a number below 100.
fn bcd(n: u32) -> u8 {
    u8::try_from(n / 10 % 10 * 16 + n % 10).unwrap_or(0)
}

fn decimal(bcd: u8) -> Option<u8> {
    let (tens, ones) = (bcd >> 4, bcd & 0xf);
    (tens < 10 && ones < 10).then_some(tens * 10 + ones)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_have_their_registers() {
        // 2026-11-21 02:25:22, a Saturday.
        let now = Calendar::at(1_795_227_922);
        let expected = Calendar {
            second: 0x22,
            minute: 0x25,
            hour: 0x02,
            weekday: 7,
            day: 0x21,
            month: 0x11,
            year: 0x26,
            century: 0x20,
        };
        assert_eq!(now, expected);
        assert_eq!(now.unix(), Some(1_795_227_922));
        // 2000-02-29 23:59:59, a Tuesday.
        let leap = Calendar::at(951_868_799);
        assert_eq!((leap.day, leap.month, leap.weekday), (0x29, 2, 3));
        assert_eq!((leap.hour, leap.minute, leap.second), (0x23, 0x59, 0x59));
    }

    #[test]
    fn the_range_has_ends() {
        assert_eq!(Calendar::at(i64::MIN), Calendar::at(0));
        let last = Calendar::at(i64::MAX);
        assert_eq!((last.century, last.year), (0x99, 0x99));
        assert_eq!(last.unix(), Some(YEAR_10000 - 1));
    }

    #[test]
    fn what_is_no_date_is_none() {
        let good = Calendar::at(1_795_227_922);
        for bad in [
            Calendar {
                second: 0x60,
                ..good
            },
            Calendar {
                minute: 0x0a,
                ..good
            },
            Calendar { hour: 0x24, ..good },
            Calendar { day: 0x31, ..good },
            Calendar { day: 0, ..good },
            Calendar {
                month: 0x13,
                ..good
            },
            Calendar {
                century: 0xff,
                ..good
            },
        ] {
            assert_eq!(bad.unix(), None, "{bad:?}");
        }
    }
}
