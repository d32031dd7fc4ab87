//! The MC146818 real-time clock and its CMOS memory.
//!
//! It shows the host's UTC, in the format register B selects; when the guest sets it,
//! the difference is remembered and the host's clock stays as it is. Alarm and periodic
//! interrupts are not offered: the FADT tells that there is no CMOS clock to rely on,
//! and Linux takes its time from kvmclock. Source: Motorola MC146818A data sheet.

use std::time::Duration;

use time::{Date, Month, OffsetDateTime};

/// Bytes of CMOS memory, clock included.
const SIZE: usize = 128;
/// The index port's bit 7 masks NMIs on a PC; it is not part of the index.
const INDEX_MASK: u8 = 0x7f;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
/// Where the FADT says the century is.
pub const CENTURY: u8 = 0x32;

/// Register A: an update is in progress.
const UIP: u8 = 1 << 7;
/// Register A at power-on: 32768 Hz time base, 1024 Hz rate.
const REG_A_DEFAULT: u8 = 0x26;
/// Register B: updates stopped while the time is being set.
const SET: u8 = 1 << 7;
/// Register B: binary instead of BCD.
const BINARY: u8 = 1 << 2;
/// Register B: 24-hour format.
const HOURS_24: u8 = 1 << 1;
/// Register D: the battery is good.
const VALID: u8 = 1 << 7;
/// Hours in 12-hour format: afternoon.
const PM: u8 = 1 << 7;

/// UIP goes up this long before the second turns.
const UIP_NANOS: u32 = 244_000;

/// The clock. `now` in its methods is the host's time since the Unix epoch, UTC.
#[derive(Clone, Debug)]
pub struct Rtc {
    index: u8,
    memory: [u8; SIZE],
    /// Guest time minus host time, seconds.
    ahead: i64,
}

impl Default for Rtc {
    fn default() -> Self {
        let mut rtc = Self { index: 0, memory: [0; SIZE], ahead: 0 };
        rtc.store(REG_A, REG_A_DEFAULT);
        rtc.store(REG_B, HOURS_24);
        rtc
    }
}

impl Rtc {
    fn load(&self, index: u8) -> u8 {
        self.memory.get(usize::from(index)).copied().unwrap_or(0xff)
    }

    fn store(&mut self, index: u8, value: u8) {
        if let Some(byte) = self.memory.get_mut(usize::from(index)) {
            *byte = value;
        }
    }

    /// A write to the index port.
    pub fn write_index(&mut self, value: u8) {
        self.index = value & INDEX_MASK;
    }

    /// A read of the index port, which on a PC gives back nothing useful.
    #[must_use]
    pub const fn read_index(&self) -> u8 {
        0xff
    }

    /// A read of the data port.
    pub fn read_data(&mut self, now: Duration) -> u8 {
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY => {
                self.refresh(now);
                self.load(self.index)
            }
            REG_A => {
                let updating = now.subsec_nanos() >= 1_000_000_000_u32.saturating_sub(UIP_NANOS);
                let stopped = self.load(REG_B) & SET != 0;
                self.load(REG_A) & !UIP | if updating && !stopped { UIP } else { 0 }
            }
            REG_C => 0,
            REG_D => VALID,
            index => self.load(index),
        }
    }

    /// A write to the data port.
    pub fn write_data(&mut self, value: u8, now: Duration) {
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY => {
                self.refresh(now);
                self.store(self.index, value);
                if self.load(REG_B) & SET == 0 {
                    self.adopt(now);
                }
            }
            REG_A => self.store(REG_A, value & !UIP),
            REG_B => {
                self.refresh(now);
                let was_set = self.load(REG_B) & SET != 0;
                self.store(REG_B, value);
                if was_set && value & SET == 0 {
                    self.adopt(now);
                }
            }
            REG_C | REG_D => {}
            index => self.store(index, value),
        }
    }

    /// Puts the time into the registers, unless the guest is setting it.
    fn refresh(&mut self, now: Duration) {
        if self.load(REG_B) & SET != 0 {
            return;
        }
        let seconds = i64::try_from(now.as_secs()).unwrap_or(0).saturating_add(self.ahead);
        let Ok(time) = OffsetDateTime::from_unix_timestamp(seconds) else { return };
        let year = u32::try_from(time.year()).unwrap_or(0);
        let hour = time.hour();
        let hours = if self.load(REG_B) & HOURS_24 != 0 {
            self.encode(hour)
        } else {
            let of_twelve = match hour % 12 {
                0 => 12,
                hour => hour,
            };
            self.encode(of_twelve) | if hour >= 12 { PM } else { 0 }
        };
        for (register, value) in [
            (SECONDS, self.encode(time.second())),
            (MINUTES, self.encode(time.minute())),
            (HOURS, hours),
            (WEEKDAY, self.encode(time.weekday().number_from_sunday())),
            (DAY, self.encode(time.day())),
            (MONTH, self.encode(u8::from(time.month()))),
            (YEAR, self.encode((year % 100) as u8)),
            (CENTURY, self.encode((year / 100 % 100) as u8)),
        ] {
            self.store(register, value);
        }
    }

    /// Takes the registers as the time from now on. A date that does not exist is not taken.
    fn adopt(&mut self, now: Duration) {
        if let Some(seconds) = self.set_time() {
            self.ahead = seconds.saturating_sub(i64::try_from(now.as_secs()).unwrap_or(0));
        }
    }

    fn set_time(&self) -> Option<i64> {
        let field = |register| self.decode(self.load(register));
        let raw_hours = self.load(HOURS);
        let hour = if self.load(REG_B) & HOURS_24 != 0 {
            self.decode(raw_hours)
        } else {
            let of_twelve = self.decode(raw_hours & !PM).checked_rem(12)?;
            if raw_hours & PM != 0 { of_twelve.checked_add(12)? } else { of_twelve }
        };
        let year =
            i32::from(field(CENTURY)).checked_mul(100)?.checked_add(i32::from(field(YEAR)))?;
        let month = Month::try_from(field(MONTH)).ok()?;
        let date = Date::from_calendar_date(year, month, field(DAY)).ok()?;
        let time = date.with_hms(hour, field(MINUTES), field(SECONDS)).ok()?;
        Some(time.assume_utc().unix_timestamp())
    }

    fn encode(&self, value: u8) -> u8 {
        if self.load(REG_B) & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.load(REG_B) & BINARY != 0 {
            value
        } else {
            (value >> 4).wrapping_mul(10).wrapping_add(value & 0xf)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // 2026-11-24 15:04:05 UTC, a Tuesday.
    const NOW: Duration = Duration::from_secs(1_795_532_645);

    fn read(rtc: &mut Rtc, index: u8, now: Duration) -> u8 {
        rtc.write_index(index);
        rtc.read_data(now)
    }

    fn write(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.write_index(index);
        rtc.write_data(value, NOW);
    }

    #[test]
    fn it_shows_utc_in_bcd_and_in_binary() {
        let mut rtc = Rtc::default();
        let registers = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS];
        let bcd = registers.map(|register| read(&mut rtc, register, NOW));
        assert_eq!(bcd, [0x20, 0x26, 0x11, 0x24, 3, 0x15, 0x04, 0x05]);
        write(&mut rtc, REG_B, BINARY | HOURS_24);
        let binary = registers.map(|register| read(&mut rtc, register, NOW));
        assert_eq!(binary, [20, 26, 11, 24, 3, 15, 4, 5]);
        write(&mut rtc, REG_B, BINARY);
        assert_eq!(read(&mut rtc, HOURS, NOW), 3 | PM);
    }

    #[test]
    fn the_update_flag_goes_up_before_the_second_turns() {
        let mut rtc = Rtc::default();
        assert_eq!(read(&mut rtc, REG_A, NOW) & UIP, 0);
        assert_eq!(read(&mut rtc, REG_A, NOW + Duration::from_micros(999_900)) & UIP, UIP);
        assert_eq!(read(&mut rtc, REG_D, NOW), VALID);
    }

    #[test]
    fn a_time_set_by_the_guest_runs_on_from_there() {
        let mut rtc = Rtc::default();
        write(&mut rtc, REG_B, SET | HOURS_24);
        for (register, value) in
            [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31), (HOURS, 0x23)]
        {
            write(&mut rtc, register, value);
        }
        write(&mut rtc, MINUTES, 0x59);
        write(&mut rtc, SECONDS, 0x59);
        write(&mut rtc, REG_B, HOURS_24);
        let later = NOW + Duration::from_secs(2);
        let shown = [CENTURY, YEAR, MONTH, DAY, HOURS, SECONDS]
            .map(|register| read(&mut rtc, register, later));
        assert_eq!(shown, [0x20, 0x00, 0x01, 0x01, 0x00, 0x01]);
    }

    #[test]
    fn the_rest_is_memory() {
        let mut rtc = Rtc::default();
        write(&mut rtc, 0x7f, 0xa5);
        write(&mut rtc, 0x0f, 0x5a);
        assert_eq!((read(&mut rtc, 0x7f, NOW), read(&mut rtc, 0x0f, NOW)), (0xa5, 0x5a));
    }
}
