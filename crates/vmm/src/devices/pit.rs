//! The 8254 interval timer and the system control port 0x61, counting real time.
//!
//! No interrupt is wired to channel 0 (the platform has better timers); what remains is
//! what people calibrate with: counters that count at 1.193182 MHz, their read-back, and
//! channel 2 behind the gate and output bits of port 0x61.
//! Source: Intel 8254 data sheet (231164-005).

/// The counters' input clock, hertz.
const PIT_HZ: u64 = 1_193_182;
/// Port 0x61 bits: gate of channel 2, speaker data, refresh toggle, output of channel 2.
const GATE2: u8 = 1 << 0;
const SPEAKER: u8 = 1 << 1;
const REFRESH: u8 = 1 << 4;
const OUT2: u8 = 1 << 5;
/// Half the period of the refresh toggle, nanoseconds.
const REFRESH_NANOS: u64 = 15_085;

/// First port of the timer.
pub const PIT: u16 = 0x40;
/// The mode/command port.
pub const PIT_COMMAND: u16 = 0x43;
/// System control port B.
pub const PORT_61: u16 = 0x61;

/// Which bytes of a counter a port access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low,
    High,
    Both,
}

/// How a counter counts (data sheet, "mode definitions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Mode 0, and 1, 4 and 5, which differ in triggers and in the shape of OUT.
    Once,
    /// Mode 2: reloads at one.
    Rate,
    /// Mode 3: counts by two, OUT is a square wave.
    Square,
}

#[derive(Clone, Copy, Debug)]
struct Channel {
    access: Access,
    /// The mode bits as written, for read-back.
    mode_bits: u8,
    /// 1 to 65536.
    reload: u64,
    /// No count was loaded since the mode was set: it does not count yet.
    null_count: bool,
    /// When counting began, nanoseconds.
    start: u64,
    /// Ticks counted so far, if the gate holds it.
    held: Option<u64>,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// The low byte of a two-byte write, waiting for the high one.
    write_low: Option<u8>,
    /// The next byte read of a two-byte count is the high one.
    read_high: bool,
}

impl Default for Channel {
    fn default() -> Self {
        Self {
            access: Access::Both,
            mode_bits: 0,
            reload: 0x1_0000,
            null_count: true,
            start: 0,
            held: None,
            latched_count: None,
            latched_status: None,
            write_low: None,
            read_high: false,
        }
    }
}

impl Channel {
    const fn mode(&self) -> Mode {
        match self.mode_bits & 3 {
            2 => Mode::Rate,
            3 => Mode::Square,
            _ => Mode::Once,
        }
    }

    fn ticks(&self, now: u64) -> u64 {
        if self.null_count {
            return 0;
        }
        self.held.unwrap_or_else(|| ticks(now.saturating_sub(self.start)))
    }

    fn count(&self, now: u64) -> u16 {
        let ticks = self.ticks(now);
        let reload = self.reload.max(1);
        let left = match self.mode() {
            Mode::Once => reload.wrapping_sub(ticks),
            Mode::Rate => reload.wrapping_sub(ticks.checked_rem(reload).unwrap_or(0)),
            Mode::Square => {
                // Counts by two, twice per period, and is always even.
                reload.wrapping_sub(ticks.wrapping_mul(2).checked_rem(reload).unwrap_or(0)) & !1
            }
        };
        left as u16
    }

    fn out(&self, now: u64) -> bool {
        let ticks = self.ticks(now);
        let reload = self.reload.max(1);
        match self.mode() {
            Mode::Once => !self.null_count && ticks >= reload,
            Mode::Rate => ticks.checked_rem(reload).unwrap_or(0).wrapping_add(1) != reload,
            Mode::Square => ticks.checked_rem(reload).unwrap_or(0) < reload.div_ceil(2),
        }
    }

    fn status(&self, now: u64) -> u8 {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        u8::from(self.out(now)) << 7
            | u8::from(self.null_count) << 6
            | access << 4
            | self.mode_bits << 1
    }

    fn latch(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(now));
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.count(now)).to_le_bytes();
        let (byte, done) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::Both if self.read_high => (high, true),
            Access::Both => (low, false),
        };
        self.read_high = !done;
        if done {
            self.latched_count = None;
        }
        byte
    }

    fn write(&mut self, value: u8, now: u64) {
        let count = match self.access {
            Access::Low => u16::from(value),
            Access::High => u16::from(value) << 8,
            Access::Both => match self.write_low.take() {
                None => {
                    self.write_low = Some(value);
                    return;
                }
                Some(low) => u16::from_le_bytes([low, value]),
            },
        };
        self.reload = if count == 0 { 0x1_0000 } else { u64::from(count) };
        self.null_count = false;
        self.start = now;
        self.held = self.held.map(|_| 0);
    }

    fn set_mode(&mut self, access: Access, mode_bits: u8) {
        // Modes 6 and 7 are 2 and 3.
        let mode_bits = if mode_bits > 5 { mode_bits & 3 } else { mode_bits };
        *self = Self { access, mode_bits, held: self.held.map(|_| 0), ..Self::default() };
    }

    fn set_gate(&mut self, open: bool, now: u64) {
        match (open, self.held) {
            (false, None) => self.held = Some(self.ticks(now)),
            (true, Some(counted)) => {
                // A rising gate restarts the periodic modes and lets the others go on.
                let counted = if self.mode() == Mode::Once { counted } else { 0 };
                self.start = now.saturating_sub(nanos(counted));
                self.held = None;
            }
            _ => {}
        }
    }
}

/// The timer's three channels and port 0x61. Times are nanoseconds of any monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct Pit {
    channels: [Channel; 3],
    port_61: u8,
}

impl Default for Pit {
    fn default() -> Self {
        let mut pit = Self { channels: [Channel::default(); 3], port_61: 0 };
        // Port 0x61 starts with channel 2's gate closed.
        pit.channels[2].held = Some(0);
        pit
    }
}

impl Pit {
    /// A byte read from port 0x40 to 0x43.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        match self.channels.get_mut(usize::from(port.wrapping_sub(PIT))) {
            Some(channel) => channel.read(now),
            // The command register is write-only.
            None => 0xff,
        }
    }

    /// A byte written to port 0x40 to 0x43.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        match self.channels.get_mut(usize::from(port.wrapping_sub(PIT))) {
            Some(channel) => channel.write(value, now),
            None => self.command(value, now),
        }
    }

    fn command(&mut self, value: u8, now: u64) {
        let select = value >> 6;
        if select == 3 {
            self.read_back(value, now);
            return;
        }
        let Some(channel) = self.channels.get_mut(usize::from(select)) else { return };
        let mode_bits = (value >> 1) & 7;
        match (value >> 4) & 3 {
            1 => channel.set_mode(Access::Low, mode_bits),
            2 => channel.set_mode(Access::High, mode_bits),
            3 => channel.set_mode(Access::Both, mode_bits),
            _ => channel.latch(now),
        }
    }

    /// The read-back command: bits 1 to 3 select channels; clear bits 5 and 4 latch the
    /// count and the status.
    fn read_back(&mut self, value: u8, now: u64) {
        for (channel, select) in self.channels.iter_mut().zip([1_u8 << 1, 1 << 2, 1 << 3]) {
            if value & select == 0 {
                continue;
            }
            if value & (1 << 5) == 0 {
                channel.latch(now);
            }
            if value & (1 << 4) == 0 && channel.latched_status.is_none() {
                channel.latched_status = Some(channel.status(now));
            }
        }
    }

    /// A read of port 0x61.
    #[must_use]
    pub fn read_port_61(&self, now: u64) -> u8 {
        let [_, _, channel2] = &self.channels;
        let refresh = if (now / REFRESH_NANOS).is_multiple_of(2) { 0 } else { REFRESH };
        self.port_61 | refresh | if channel2.out(now) { OUT2 } else { 0 }
    }

    /// A write to port 0x61.
    pub fn write_port_61(&mut self, value: u8, now: u64) {
        self.port_61 = value & (GATE2 | SPEAKER);
        let [_, _, channel2] = &mut self.channels;
        channel2.set_gate(value & GATE2 != 0, now);
    }
}

fn ticks(nanos: u64) -> u64 {
    let ticks = u128::from(nanos).saturating_mul(u128::from(PIT_HZ)) / 1_000_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

fn nanos(ticks: u64) -> u64 {
    let nanos = u128::from(ticks).saturating_mul(1_000_000_000).div_euclid(PIT_HZ.into());
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn channel_2_measures_fifty_milliseconds_the_way_kernels_do() {
        let mut pit = Pit::default();
        pit.write_port_61(GATE2, 0);
        pit.write(PIT_COMMAND, 0xb0, 0);
        let latch = (PIT_HZ / 20) as u16;
        pit.write(PIT + 2, latch.to_le_bytes()[0], 0);
        pit.write(PIT + 2, latch.to_le_bytes()[1], 0);
        assert_eq!(pit.read_port_61(49 * MS) & OUT2, 0);
        assert_eq!(pit.read_port_61(51 * MS) & OUT2, OUT2);
    }

    #[test]
    fn a_closed_gate_stops_the_count() {
        let mut pit = Pit::default();
        pit.write(PIT_COMMAND, 0xb0, 0);
        pit.write(PIT + 2, 0xff, 0);
        pit.write(PIT + 2, 0xff, 0);
        let read = |pit: &mut Pit, now| {
            pit.write(PIT_COMMAND, 0x80, now);
            u16::from_le_bytes([pit.read(PIT + 2, now), pit.read(PIT + 2, now)])
        };
        assert_eq!(read(&mut pit, 10 * MS), 0xffff);
        pit.write_port_61(GATE2, 10 * MS);
        assert_eq!(read(&mut pit, 20 * MS), 0xffff - 11931);
    }

    #[test]
    fn periodic_counts_wrap_and_status_reads_back() {
        let mut pit = Pit::default();
        pit.write(PIT_COMMAND, 0x34, 0);
        pit.write(PIT, 0xe8, 0);
        pit.write(PIT, 0x03, 0);
        // 1000 ticks are 838 us.
        pit.write(PIT_COMMAND, 0xc2, 839_000);
        assert_eq!(pit.read(PIT, 0) & 0x3f, 0x34);
        let count = u16::from_le_bytes([pit.read(PIT, 0), pit.read(PIT, 0)]);
        assert!((990..=1000).contains(&count), "{count}");
    }
}
