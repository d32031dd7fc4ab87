//! `in` and `out`, and who may use which port.
//!
//! Sources: SDM vol. 1, 18.5 (protected-mode I/O); vol. 2, IN and OUT. The string forms
//! are in [`string_io`](super::string_io).

use crate::decode::op::{Op, write_reg};
use crate::state::regs::Gpr;
use crate::vcpu::{Step, Vcpu};

impl Vcpu {
    /// `#GP(0)` unless ports `port` to `port + size - 1` may be used: by IOPL, or by the
    /// TSS's permission bitmap, which alone decides in virtual-8086 mode.
    pub(crate) fn require_ports(&mut self, port: u16, size: u8) -> Step {
        let by_level = !self.virtual_8086() && self.io_privileged();
        if by_level || self.io_bitmap_allows(port, size)? {
            return Ok(());
        }
        Err(self.gp(0))
    }

    /// Reads `size` (1, 2 or 4) bytes from `port`; the caller has checked permission.
    pub(crate) fn port_in(&mut self, port: u16, size: u8) -> u32 {
        self.note_port_access(port, u64::from(size));
        let mut bytes = [0_u8; 4];
        if let Some(data) = bytes.get_mut(..usize::from(size)) {
            self.env.port_read(port, data);
        }
        u32::from_le_bytes(bytes)
    }

    /// Writes the low `size` (1, 2 or 4) bytes of `value` to `port`, likewise.
    pub(crate) fn port_out(&mut self, port: u16, size: u8, value: u32) {
        self.note_port_access(port, u64::from(size));
        let bytes = value.to_le_bytes();
        if let Some(data) = bytes.get(..usize::from(size)) {
            self.env.port_write(port, data);
        }
    }

    fn input(&mut self, op: &Op, port: u16) -> Step {
        self.require_ports(port, op.size)?;
        let value = self.port_in(port, op.size);
        let rax = Gpr::Rax as u8;
        match op.size {
            1 => write_reg::<u8>(&mut self.state, rax, value as u8),
            2 => write_reg::<u16>(&mut self.state, rax, value as u16),
            _ => write_reg::<u32>(&mut self.state, rax, value),
        }
        self.end_block(op)
    }

    fn output(&mut self, op: &Op, port: u16) -> Step {
        self.require_ports(port, op.size)?;
        let value = self.state.reg(Gpr::Rax) as u32;
        self.port_out(port, op.size, value);
        // A device may have raised an interrupt or asked for the CPU: look up.
        self.end_block(op)
    }

    pub(crate) fn port_in_dx(&self) -> u16 {
        self.state.reg(Gpr::Rdx) as u16
    }
}

/// `in al/ax/eax, imm8`; `size` is the data's.
pub(crate) fn in_imm(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.input(op, op.imm as u16 & 0xff)
}

/// `in al/ax/eax, dx`.
pub(crate) fn in_dx(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.input(op, cpu.port_in_dx())
}

/// `out imm8, al/ax/eax`.
pub(crate) fn out_imm(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.output(op, op.imm as u16 & 0xff)
}

/// `out dx, al/ax/eax`.
pub(crate) fn out_dx(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.output(op, cpu.port_in_dx())
}
