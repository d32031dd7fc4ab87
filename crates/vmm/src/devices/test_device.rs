//! The test device: what test kernels poke at to see interrupts and device memory work.
//!
//! Ports that assert interrupt lines, a port that remembers what was written to it, and
//! memory that is not RAM, so that every access to it is a device's business. It exists only
//! beside the debug-exit port and lies where kvm-unit-tests looks for QEMU's `pc-testdev`.

use std::ops::Range;

use super::InterruptLine;

/// The ports that remember: a 32-bit register.
pub const SCRATCH: Range<u16> = 0xe0..0xe4;
/// The ports that drive lines: port n drives line n; anything but zero asserts it.
pub const LINES: Range<u16> = 0x2000..0x2018;
/// The memory that is not RAM.
pub const MEMORY: Range<u64> = 0xff00_0000..0xff01_0000;

/// The device.
#[derive(Debug)]
pub struct TestDevice {
    scratch: [u8; 4],
    lines: Vec<InterruptLine>,
    memory: Vec<u8>,
}

impl TestDevice {
    /// With the interrupt `lines` it may assert, line 0 first.
    #[must_use]
    pub fn new(lines: Vec<InterruptLine>) -> Self {
        let len = MEMORY.end.saturating_sub(MEMORY.start);
        Self { scratch: [0; 4], lines, memory: vec![0; usize::try_from(len).unwrap_or(0)] }
    }

    /// Whether `port` is one of its.
    #[must_use]
    pub fn owns(port: u16) -> bool {
        SCRATCH.contains(&port) || LINES.contains(&port)
    }

    /// `in` of a byte.
    #[must_use]
    pub fn read(&self, port: u16) -> u8 {
        let offset = usize::from(port.wrapping_sub(SCRATCH.start));
        self.scratch.get(offset).copied().unwrap_or(0)
    }

    /// `out` of a byte.
    pub fn write(&mut self, port: u16, value: u8) {
        let offset = usize::from(port.wrapping_sub(SCRATCH.start));
        let line = usize::from(port.wrapping_sub(LINES.start));
        if let Some(byte) = self.scratch.get_mut(offset) {
            *byte = value;
        } else if let Some(line) = self.lines.get(line) {
            if value == 0 { line.lower() } else { line.raise() }
        }
    }

    /// Reads its memory at guest-physical `addr`; says whether that is its memory.
    pub fn memory_read(&self, addr: u64, data: &mut [u8]) -> bool {
        let Some(bytes) = range(addr, data.len()).and_then(|range| self.memory.get(range)) else {
            return false;
        };
        data.copy_from_slice(bytes);
        true
    }

    /// Writes its memory, likewise.
    pub fn memory_write(&mut self, addr: u64, data: &[u8]) -> bool {
        let range = range(addr, data.len());
        let Some(bytes) = range.and_then(|range| self.memory.get_mut(range)) else { return false };
        bytes.copy_from_slice(data);
        true
    }
}

fn range(addr: u64, len: usize) -> Option<Range<usize>> {
    let start = usize::try_from(addr.checked_sub(MEMORY.start)?).ok()?;
    Some(start..start.checked_add(len)?)
}

#[cfg(test)]
mod tests {
    use super::super::Recorder;
    use super::*;
    use std::sync::Arc;

    #[test]
    fn ports_remember_and_drive_lines() {
        let recorder = Arc::new(Recorder::default());
        let line = |pin| InterruptLine::new(recorder.clone(), pin);
        let mut device = TestDevice::new((0..24).map(line).collect());
        for (port, value) in (0xe0..).zip([1, 2, 3, 4]) {
            device.write(port, value);
        }
        let read: Vec<u8> = SCRATCH.map(|port| device.read(port)).collect();
        assert_eq!(read, [1, 2, 3, 4]);
        device.write(0x200e, 1);
        device.write(0x200e, 0);
        device.write(0x2017, 0xff);
        assert_eq!(*recorder.0.lock().unwrap(), [(14, true), (14, false), (23, true)]);
        assert!(TestDevice::owns(0x2017) && !TestDevice::owns(0x2018) && !TestDevice::owns(0xe4));
    }

    #[test]
    fn memory_ends_where_it_ends() {
        let mut device = TestDevice::new(Vec::new());
        assert!(device.memory_write(0xff00_fffc, &[1, 2, 3, 4]));
        let mut data = [0; 4];
        assert!(device.memory_read(0xff00_fffc, &mut data));
        assert_eq!(data, [1, 2, 3, 4]);
        assert!(!device.memory_read(0xff00_fffd, &mut data));
        assert!(!device.memory_write(0xfeff_ffff, &[0]));
        assert!(!device.memory_read(u64::MAX, &mut data));
        device.write(0x2000, 1);
    }
}
