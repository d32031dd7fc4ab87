//! Where what is typed goes: the serial port of a PC, or the console of an lguest guest.

use crate::devices::serial::SerialInput;
use crate::devices::virtio::ConsoleInput;

/// The way in.
#[derive(Clone, Debug)]
pub(super) enum Input {
    /// A PC's first serial port.
    Serial(SerialInput),
    /// A virtio console.
    Console(ConsoleInput),
    /// Nobody reads: the console is somebody else's.
    None,
}

impl Input {
    /// Hands over `bytes`, waiting while the guest does not read. Returns how many were
    /// taken, which is all unless the machine has ended or nobody reads.
    pub(super) fn send(&self, bytes: &[u8]) -> usize {
        match self {
            Self::Serial(serial) => serial.send(bytes),
            Self::Console(console) => console.send(bytes),
            Self::None => 0,
        }
    }

    /// The machine has ended: nobody waits any more. (A console closes with its device.)
    pub(super) fn close(&self) {
        if let Self::Serial(serial) = self {
            serial.close();
        }
    }
}
