//! The CMOS clock (MC146818) as far as kernels read it: time of day and memory size.
//!
//! The clock is read-only: guests set their own time, not the host's. It has no interrupts.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::state::{CmosState, RestoreError};

/// Where the time of day comes from.
pub type WallClock = Box<dyn FnMut() -> SystemTime + Send>;

const SECONDS_PER_DAY: u64 = 86_400;
/// Register A: divider running, no update in progress.
const STATUS_A: u8 = 0x26;
/// Register B: 24 hours, BCD.
const STATUS_B: u8 = 0x02;
/// Register D: the battery is good.
const STATUS_D: u8 = 0x80;
/// Most memory that the extended-memory word can state, in KiB above 1 MiB.
const EXTENDED_MAX_KIB: u64 = 0xfc00;

/// A CMOS clock.
pub struct Cmos {
    clock: WallClock,
    memory: u64,
    index: u8,
}

impl Cmos {
    /// A clock that shows what `clock` says, in UTC, and `memory` bytes of memory below 4 GiB.
    pub fn new(clock: WallClock, memory: u64) -> Self {
        Self {
            clock,
            memory,
            index: 0,
        }
    }

    /// Writes a port: 0 selects a register (bit 7 masks NMIs, which has no effect here), 1 is data
    /// and is ignored.
    pub fn write(&mut self, offset: u8, value: u8) {
        if offset == 0 {
            self.index = value & 0x7f;
        }
    }

    /// Reads a port: 1 is the selected register.
    pub fn read(&mut self, offset: u8) -> u8 {
        if offset == 0 {
            return 0xff;
        }
        let extended = (self.memory >> 10)
            .saturating_sub(1024)
            .min(EXTENDED_MAX_KIB);
        let above_16m = (self.memory.saturating_sub(16 << 20) >> 16).min(0xffff);
        match self.index {
            0x00 | 0x02 | 0x04 | 0x06..=0x09 | 0x32 => self.time_register(),
            0x0a => STATUS_A,
            0x0b => STATUS_B,
            0x0d => STATUS_D,
            0x15 => 0x80,
            0x16 => 0x02,
            0x17 | 0x30 => extended as u8,
            0x18 | 0x31 => (extended >> 8) as u8,
            0x34 => above_16m as u8,
            0x35 => (above_16m >> 8) as u8,
            _ => 0,
        }
    }

    /// What the guest set.
    pub fn save(&self) -> CmosState {
        CmosState { index: self.index }
    }

    /// Takes over what [`Cmos::save`] gave.
    ///
    /// # Errors
    /// When there is no such register.
    pub fn restore(&mut self, state: &CmosState) -> Result<(), RestoreError> {
        if state.index > 0x7f {
            return Err(RestoreError::Value {
                device: "CMOS",
                what: "the index",
                value: state.index.into(),
                allowed: "0 to 127",
            });
        }
        self.index = state.index;
        Ok(())
    }

    fn time_register(&mut self) -> u8 {
        let now = (self.clock)()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        let (year, month, day) = civil_from_days(now / SECONDS_PER_DAY);
        let second = now % SECONDS_PER_DAY;
        let value = match self.index {
            0x00 => second % 60,
            0x02 => second / 60 % 60,
            0x04 => second / 3600,
            // 1 January 1970 was a Thursday; Sunday is 1.
            0x06 => (now / SECONDS_PER_DAY + 4) % 7 + 1,
            0x07 => day,
            0x08 => month,
            0x09 => year % 100,
            _ => year / 100,
        };
        bcd(value)
    }
}

fn bcd(value: u64) -> u8 {
    (((value / 10 % 10) << 4) | (value % 10)) as u8
}

/// Year, month and day of the Gregorian calendar, from days since 1970-01-01. Counts years from
/// March, so that the leap day is the last of its year.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> Cmos {
        Cmos::new(
            Box::new(move || UNIX_EPOCH + Duration::from_secs(seconds)),
            256 << 20,
        )
    }

    fn date(cmos: &mut Cmos) -> [u8; 8] {
        [0x32, 0x09, 0x08, 0x07, 0x06, 0x04, 0x02, 0x00].map(|register| {
            cmos.write(0, register);
            cmos.read(1)
        })
    }

    #[test]
    fn shows_the_date_in_bcd() {
        assert_eq!(date(&mut at(0)), [0x19, 0x70, 1, 1, 5, 0, 0, 0]);
        // 2024-02-29 23:59:58, a Thursday.
        assert_eq!(
            date(&mut at(1_709_251_198)),
            [0x20, 0x24, 2, 0x29, 5, 0x23, 0x59, 0x58]
        );
        // 2100-03-01 00:00:00, a Monday, after a century without a leap day.
        assert_eq!(date(&mut at(4_107_542_400)), [0x21, 0, 3, 1, 2, 0, 0, 0]);
    }

    #[test]
    fn states_memory_and_survives_unknown_registers() {
        let mut cmos = at(0);
        cmos.write(0, 0x34 | 0x80);
        assert_eq!(cmos.read(1), 0);
        cmos.write(0, 0x35);
        assert_eq!(cmos.read(1), 0x0f);
        cmos.write(0, 0x7f);
        assert_eq!(cmos.read(1), 0);
        assert_eq!(cmos.read(0), 0xff);
    }
}
