//! The legacy pair of 8259A interrupt controllers, as registers only.
//!
//! The platform is ACPI hardware-reduced: no interrupt line ends here and none leaves,
//! so these never interrupt anybody. Kernels and test programs mask and initialise them
//! all the same, or look for them by writing the mask and reading it back; they find
//! what they expect. Source: Intel 8259A data sheet (231468-003).

/// First port of the master.
pub const MASTER: u16 = 0x20;
/// First port of the slave.
pub const SLAVE: u16 = 0xa0;
/// Edge/level control registers, one per chip.
pub const ELCR: u16 = 0x4d0;

/// ICW1: starts initialisation.
const ICW1: u8 = 1 << 4;
/// ICW1: a fourth initialisation word will follow.
const ICW1_IC4: u8 = 1 << 0;
/// ICW1: there is no slave, and no third word.
const ICW1_SINGLE: u8 = 1 << 1;
/// OCW3, told from OCW2 by this bit.
const OCW3: u8 = 1 << 3;
/// OCW3: the read command is valid.
const OCW3_READ: u8 = 1 << 1;
/// OCW3: read in-service instead of requested.
const OCW3_ISR: u8 = 1 << 0;

/// Which initialisation word comes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Init {
    #[default]
    Done,
    Icw2,
    Icw3,
    Icw4,
}

#[derive(Clone, Copy, Debug, Default)]
struct Chip {
    mask: u8,
    vector: u8,
    edge_level: u8,
    init: Init,
    wants_icw3: bool,
    wants_icw4: bool,
    reads_isr: bool,
}

impl Chip {
    fn write_command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            *self = Self {
                edge_level: self.edge_level,
                init: Init::Icw2,
                wants_icw3: value & ICW1_SINGLE == 0,
                wants_icw4: value & ICW1_IC4 != 0,
                ..Self::default()
            };
        } else if value & OCW3 != 0 && value & OCW3_READ != 0 {
            self.reads_isr = value & OCW3_ISR != 0;
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.init {
            Init::Done => self.mask = value,
            Init::Icw2 => {
                self.vector = value & 0xf8;
                self.init = match (self.wants_icw3, self.wants_icw4) {
                    (true, _) => Init::Icw3,
                    (false, true) => Init::Icw4,
                    (false, false) => Init::Done,
                };
            }
            Init::Icw3 => self.init = if self.wants_icw4 { Init::Icw4 } else { Init::Done },
            Init::Icw4 => self.init = Init::Done,
        }
    }
}

/// Both chips.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

impl Pic {
    /// Whether `port` is one of theirs.
    #[must_use]
    pub const fn owns(port: u16) -> bool {
        matches!(port, 0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1)
    }

    /// A byte read from `port`. No line is ever requested or in service.
    #[must_use]
    pub const fn read(&self, port: u16) -> u8 {
        match port {
            0x21 => self.master.mask,
            0xa1 => self.slave.mask,
            0x4d0 => self.master.edge_level,
            0x4d1 => self.slave.edge_level,
            _ => 0,
        }
    }

    /// A byte written to `port`.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            0xa0 => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            // Timer, keyboard and cascade, RTC and FPU are edge-triggered by wiring.
            0x4d0 => self.master.edge_level = value & 0xf8,
            0x4d1 => self.slave.edge_level = value & 0xde,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initialisation_words_do_not_land_in_the_mask() {
        let mut pic = Pic::default();
        pic.write(MASTER + 1, 0xfb);
        assert_eq!(pic.read(MASTER + 1), 0xfb, "the probe reads its mask back");
        for (port, value) in
            [(MASTER, 0x11), (MASTER + 1, 0x30), (MASTER + 1, 0x04), (MASTER + 1, 0x01)]
        {
            pic.write(port, value);
        }
        assert_eq!(pic.read(MASTER + 1), 0);
        pic.write(MASTER + 1, 0xff);
        pic.write(SLAVE + 1, 0xee);
        assert_eq!((pic.read(MASTER + 1), pic.read(SLAVE + 1)), (0xff, 0xee));
        pic.write(ELCR, 0xff);
        assert_eq!(pic.read(ELCR), 0xf8);
    }
}
