//! The IO-APIC: 24 interrupt lines, each with its route to local APICs.
//!
//! Source: Intel 82093AA data sheet (290566), with the EOI register of version 0x20.
//! Lines are handed in as asserted or not, whatever the polarity bit says: devices here
//! have no voltages.

use super::message::{Address, DeliveryMode, Destination, InterruptMessage, Trigger};
use crate::layout::{IO_APIC_ID, IO_APIC_PINS};

const PINS: usize = IO_APIC_PINS as usize;

/// Offsets in the register page.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

/// Registers behind the window.
const REG_ID: u8 = 0;
const REG_VERSION: u8 = 1;
const REG_ARBITRATION: u8 = 2;
const REG_REDIRECTION: u8 = 0x10;

/// Version 0x20 (with EOI register), and the number of the last pin.
const VERSION: u32 = 0x20 | (IO_APIC_PINS as u32 - 1) << 16;

const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// What software may change: all but delivery status, remote IRR and reserved bits.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// One redirection-table entry and its line.
#[derive(Clone, Copy, Debug)]
struct Pin {
    entry: u64,
    asserted: bool,
}

impl Pin {
    const fn is_level(self) -> bool {
        self.entry & LEVEL != 0
    }

    const fn is_masked(self) -> bool {
        self.entry & MASKED != 0
    }

    const fn message(self) -> InterruptMessage {
        let address = Address::Narrow((self.entry >> 56) as u8);
        InterruptMessage {
            destination: if self.entry & LOGICAL != 0 {
                Destination::Logical(address)
            } else {
                Destination::Physical(address)
            },
            mode: DeliveryMode::from_bits((self.entry >> 8) as u32),
            vector: self.entry as u8,
            trigger: Trigger::from_bit(self.is_level()),
        }
    }

    /// Delivers a level-triggered interrupt that is asserted, unmasked and not yet in
    /// service anywhere.
    fn service(&mut self, deliver: &mut impl FnMut(&InterruptMessage) -> bool) {
        if self.is_level()
            && self.asserted
            && self.entry & (MASKED | REMOTE_IRR) == 0
            && deliver(&self.message())
        {
            self.entry |= REMOTE_IRR;
        }
    }
}

/// The IO-APIC. `deliver` in its methods carries a message to the local APICs and says
/// whether one took it.
#[derive(Debug)]
pub struct IoApic {
    id: u32,
    select: u8,
    pins: [Pin; PINS],
}

impl Default for IoApic {
    fn default() -> Self {
        Self {
            id: (IO_APIC_ID as u32) << 24,
            select: 0,
            pins: [Pin { entry: MASKED, asserted: false }; PINS],
        }
    }
}

impl IoApic {
    /// Line `pin` is now `asserted`. An edge at a masked pin is lost, as on the chip.
    pub fn set_line(
        &mut self,
        pin: u8,
        asserted: bool,
        mut deliver: impl FnMut(&InterruptMessage) -> bool,
    ) {
        let Some(pin) = self.pins.get_mut(usize::from(pin)) else { return };
        let rising = asserted && !pin.asserted;
        pin.asserted = asserted;
        if pin.is_level() {
            pin.service(&mut deliver);
        } else if rising && !pin.is_masked() {
            deliver(&pin.message());
        }
    }

    /// A local APIC (or the EOI register) ended the level-triggered `vector`: lines that
    /// are still asserted interrupt again.
    pub fn end_of_interrupt(
        &mut self,
        vector: u8,
        mut deliver: impl FnMut(&InterruptMessage) -> bool,
    ) {
        for pin in &mut self.pins {
            if pin.is_level() && pin.entry & REMOTE_IRR != 0 && pin.entry as u8 == vector {
                pin.entry &= !REMOTE_IRR;
                pin.service(&mut deliver);
            }
        }
    }

    /// A load from the register page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            IOREGSEL => u32::from(self.select),
            IOWIN => self.read_register(),
            _ => 0,
        };
        data.fill(0);
        let within = (offset & 3) as usize;
        for (to, from) in data.iter_mut().zip(value.to_le_bytes().iter().skip(within)) {
            *to = *from;
        }
    }

    /// A store to the register page; the window takes whole 32-bit words only.
    pub fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        deliver: impl FnMut(&InterruptMessage) -> bool,
    ) {
        match (offset, data.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)), data.first()) {
            (IOREGSEL, _, Some(low)) => self.select = *low,
            (IOWIN, Some(value), _) => self.write_register(value, deliver),
            (EOI, _, Some(low)) => self.end_of_interrupt(*low, deliver),
            _ => {}
        }
    }

    fn read_register(&self) -> u32 {
        match self.select {
            REG_ID | REG_ARBITRATION => self.id,
            REG_VERSION => VERSION,
            select => self.selected_pin(select).map_or(0, |(pin, high)| {
                let entry = self.pins.get(pin).map_or(0, |pin| pin.entry);
                if high { (entry >> 32) as u32 } else { entry as u32 }
            }),
        }
    }

    /// Which entry, and whether its high half, `select` stands for.
    fn selected_pin(&self, select: u8) -> Option<(usize, bool)> {
        let index = select.checked_sub(REG_REDIRECTION)?;
        Some((usize::from(index >> 1), index & 1 != 0))
    }

    fn write_register(&mut self, value: u32, mut deliver: impl FnMut(&InterruptMessage) -> bool) {
        if self.select == REG_ID {
            self.id = value & 0x0f00_0000;
            return;
        }
        let Some((index, high)) = self.selected_pin(self.select) else { return };
        let Some(pin) = self.pins.get_mut(index) else { return };
        let (shift, half) = if high { (32, 0xffff_ffff_0000_0000) } else { (0, 0xffff_ffff) };
        let writable = WRITABLE & half;
        pin.entry = pin.entry & !writable | u64::from(value) << shift & writable;
        if !pin.is_level() {
            // Edge-triggered interrupts have no remote IRR; kernels clear it this way.
            pin.entry &= !REMOTE_IRR;
        }
        pin.service(&mut deliver);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(io: &mut IoApic, pin: u8, entry: u64) -> Vec<InterruptMessage> {
        let mut sent = Vec::new();
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            io.write(IOREGSEL, &[REG_REDIRECTION + 2 * pin + half], |_| true);
            io.write(IOWIN, &value.to_le_bytes(), |message| {
                sent.push(*message);
                true
            });
        }
        sent
    }

    fn read(io: &mut IoApic, register: u8) -> u32 {
        io.write(IOREGSEL, &[register], |_| true);
        let mut data = [0; 4];
        io.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(io: &mut IoApic, pin: u8, asserted: bool) -> Vec<u8> {
        let mut sent = Vec::new();
        io.set_line(pin, asserted, |message| {
            sent.push(message.vector);
            true
        });
        sent
    }

    #[test]
    fn edges_are_sent_once_and_lost_while_masked() {
        let mut io = IoApic::default();
        assert_eq!(set(&mut io, 4, true), []);
        set(&mut io, 4, false);
        assert_eq!(program(&mut io, 4, 0x30), []);
        assert_eq!(set(&mut io, 4, true), [0x30]);
        assert_eq!(set(&mut io, 4, true), []);
        set(&mut io, 4, false);
        assert_eq!(set(&mut io, 4, true), [0x30]);
    }

    #[test]
    fn levels_wait_for_the_end_of_interrupt() {
        let mut io = IoApic::default();
        program(&mut io, 9, 0x41 | LEVEL);
        assert_eq!(set(&mut io, 9, true), [0x41]);
        assert_eq!(read(&mut io, 0x10 + 18) & REMOTE_IRR as u32, REMOTE_IRR as u32);
        assert_eq!(set(&mut io, 9, true), []);
        let mut again = 0;
        io.end_of_interrupt(0x41, |_| {
            again += 1;
            true
        });
        assert_eq!(again, 1, "still asserted");
        set(&mut io, 9, false);
        io.end_of_interrupt(0x41, |_| panic!("deasserted"));
        assert_eq!(read(&mut io, 0x10 + 18) & REMOTE_IRR as u32, 0);
    }

    #[test]
    fn unmasking_an_asserted_level_delivers() {
        let mut io = IoApic::default();
        program(&mut io, 3, 0x55 | LEVEL | MASKED);
        assert_eq!(set(&mut io, 3, true), []);
        let sent = program(&mut io, 3, 0x55 | LEVEL | LOGICAL | 2 << 56);
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].destination, Destination::Logical(Address::Narrow(2)));
        assert_eq!(sent[0].trigger, Trigger::Level);
    }

    #[test]
    fn a_message_nobody_takes_is_not_in_service() {
        let mut io = IoApic::default();
        program(&mut io, 3, 0x55 | LEVEL);
        io.set_line(3, true, |_| false);
        assert_eq!(read(&mut io, 0x10 + 6) & REMOTE_IRR as u32, 0);
    }

    #[test]
    fn identification() {
        let mut io = IoApic::default();
        assert_eq!(read(&mut io, REG_VERSION), 0x0017_0020);
        assert_eq!(read(&mut io, 0x10), MASKED as u32);
        assert_eq!(read(&mut io, 0x40), 0, "beyond the last pin");
    }
}
