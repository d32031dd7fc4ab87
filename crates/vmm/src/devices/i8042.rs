//! The keyboard controller, with nothing plugged in.
//!
//! It is here for two reasons: kernels reset the machine by its command 0xFE, and they
//! probe it at boot and should find at once that there is neither keyboard nor mouse.
//! It behaves as the chip does with empty sockets: commands to the controller are
//! answered, bytes sent to a device come back as a timeout.
//!
//! Source: IBM PS/2 Hardware Interface Technical Reference, keyboard and auxiliary
//! device controller.

use super::Request;

bitflags::bitflags! {
    /// The status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Status: u8 {
        /// A byte waits in the output buffer.
        const OUTPUT_FULL = 1 << 0;
        /// The system flag: the self-test has passed.
        const SYSTEM = 1 << 2;
        /// The last write went to the command port.
        const COMMAND = 1 << 3;
        /// Not inhibited by the key lock.
        const UNLOCKED = 1 << 4;
        /// The byte in the output buffer is the mouse's.
        const AUX_FULL = 1 << 5;
        /// The device did not answer.
        const TIMEOUT = 1 << 6;
    }
}

/// What the next byte on the data port is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    /// The keyboard, which is not there.
    Keyboard,
    /// The controller's configuration byte.
    Configuration,
    /// The controller's output port.
    OutputPort,
    /// The mouse, which is not there.
    Mouse,
    /// The output buffer, as if the keyboard or the mouse had sent it.
    Loopback(Status),
}

/// Keyboard and mouse interfaces disabled, translation on: the state after reset.
const CONFIGURATION_AT_RESET: u8 = 0x74;
/// A line test's answer for a clock line stuck low: nothing is plugged in.
const CLOCK_STUCK_LOW: u8 = 0x01;
const SELF_TEST_PASSED: u8 = 0x55;
/// Output port bit 0: not resetting the CPU. Bit 1: A20 open, for ever.
const OUTPUT_PORT_NO_RESET: u8 = 1 << 0;
const OUTPUT_PORT_A20: u8 = 1 << 1;
/// What the controller returns for a device that does not answer: "resend".
const NO_ANSWER: u8 = 0xfe;

/// The controller.
#[derive(Debug)]
pub struct I8042 {
    status: Status,
    output: u8,
    configuration: u8,
    expects: Expects,
}

impl Default for I8042 {
    fn default() -> Self {
        Self {
            status: Status::SYSTEM | Status::UNLOCKED,
            output: 0,
            configuration: CONFIGURATION_AT_RESET,
            expects: Expects::Keyboard,
        }
    }
}

impl I8042 {
    /// A read of the data port.
    pub fn read_data(&mut self) -> u8 {
        self.status.remove(Status::OUTPUT_FULL | Status::AUX_FULL | Status::TIMEOUT);
        self.output
    }

    /// A read of the status port.
    #[must_use]
    pub const fn read_status(&self) -> u8 {
        self.status.bits()
    }

    fn answer(&mut self, byte: u8, flags: Status) {
        self.output = byte;
        self.status.remove(Status::AUX_FULL | Status::TIMEOUT);
        self.status |= Status::OUTPUT_FULL | flags;
    }

    /// A write to the data port.
    #[must_use]
    pub fn write_data(&mut self, value: u8) -> Option<Request> {
        self.status.remove(Status::COMMAND);
        match std::mem::replace(&mut self.expects, Expects::Keyboard) {
            Expects::Keyboard => self.answer(NO_ANSWER, Status::TIMEOUT),
            Expects::Mouse => self.answer(NO_ANSWER, Status::TIMEOUT | Status::AUX_FULL),
            Expects::Configuration => self.configuration = value,
            Expects::OutputPort if value & OUTPUT_PORT_NO_RESET == 0 => {
                return Some(Request::Reset);
            }
            Expects::OutputPort => {}
            Expects::Loopback(flags) => self.answer(value, flags),
        }
        None
    }

    /// A write to the command port.
    #[must_use]
    pub fn write_command(&mut self, command: u8) -> Option<Request> {
        self.status |= Status::COMMAND;
        self.expects = Expects::Keyboard;
        match command {
            0x20 => self.answer(self.configuration, Status::empty()),
            0x60 => self.expects = Expects::Configuration,
            // Disable and enable the mouse's and the keyboard's interface.
            0xa7 => self.configuration |= 1 << 5,
            0xa8 => self.configuration &= !(1 << 5),
            0xad => self.configuration |= 1 << 4,
            0xae => self.configuration &= !(1 << 4),
            0xa9 | 0xab => self.answer(CLOCK_STUCK_LOW, Status::empty()),
            0xaa => {
                self.configuration = CONFIGURATION_AT_RESET;
                self.answer(SELF_TEST_PASSED, Status::empty());
            }
            0xc0 => self.answer(0, Status::empty()),
            0xd0 => self.answer(OUTPUT_PORT_NO_RESET | OUTPUT_PORT_A20, Status::empty()),
            0xd1 => self.expects = Expects::OutputPort,
            0xd2 => self.expects = Expects::Loopback(Status::empty()),
            0xd3 => self.expects = Expects::Loopback(Status::AUX_FULL),
            0xd4 => self.expects = Expects::Mouse,
            // "Pulse output lines": a clear bit pulses its line, and line 0 resets the CPU.
            0xf0..=0xff if command & OUTPUT_PORT_NO_RESET == 0 => return Some(Request::Reset),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_command_resets() {
        assert_eq!(I8042::default().write_command(0xfe), Some(Request::Reset));
        assert_eq!(I8042::default().write_command(0xff), None);
        let mut chip = I8042::default();
        assert_eq!(chip.write_command(0xd1), None);
        assert_eq!(chip.write_data(0x02), Some(Request::Reset));
    }

    #[test]
    fn a_probe_finds_a_controller_without_devices() {
        let mut chip = I8042::default();
        assert_eq!(chip.write_command(0xaa), None);
        assert_eq!(chip.read_status() & 1, 1);
        assert_eq!(chip.read_data(), SELF_TEST_PASSED);
        assert_eq!(chip.read_status() & 1, 0);
        assert_eq!(chip.write_data(0xf2), None);
        assert_eq!(chip.read_status() & 0x41, 0x41, "a timeout is pending");
        assert_eq!(chip.read_data(), NO_ANSWER);
        assert_eq!(chip.write_command(0xa9), None);
        assert_ne!(chip.read_data(), 0, "the mouse's line test fails");
    }

    #[test]
    fn the_configuration_byte_is_kept() {
        let mut chip = I8042::default();
        let _ = chip.write_command(0x60);
        let _ = chip.write_data(0x45);
        let _ = chip.write_command(0x20);
        assert_eq!(chip.read_data(), 0x45);
    }
}
