//! Reads and writes of what a CPU keeps besides its general registers, in line: the bases of
//! FS and GS, selectors, the time-stamp counter.
//!
//! Any ring may use them, most on a condition that a control register makes; where it is
//! not as usual, the interpreter runs the instruction.

use iced_x86::{Code, Instruction};

use super::assembler::{Assembler, Condition, NotCopied};
use super::block::Block;
use super::fields;
use super::privileged::touches;
use super::registers::{ADDRESS, GprSet, VALUE};
use crate::decode::op::Op;
use crate::mmu::gs_pages::NO_BASE;
use crate::state::control::Cr4;
use crate::state::segment::SegReg;

impl Block<'_> {
    /// One of those that [`touches`] knows.
    ///
    /// # Errors
    /// It must be interpreted.
    pub(super) fn machine_state(&mut self, it: &Instruction, op: &Op) -> Result<(), NotCopied> {
        let register = it.op0_register().full_register().number() as u8 & 15;
        let wide = it.op0_register().size() == 8;
        let base = |slot: SegReg| fields::segment_base(slot as u8);
        match it.code() {
            Code::Rdfsbase_r32 | Code::Rdfsbase_r64 => {
                self.read_base(op, base(SegReg::Fs), register, wide)
            }
            Code::Rdgsbase_r32 | Code::Rdgsbase_r64 => {
                self.read_base(op, base(SegReg::Gs), register, wide)
            }
            Code::Wrfsbase_r32 | Code::Wrfsbase_r64 => {
                self.write_base(op, base(SegReg::Fs), register, wide)
            }
            Code::Wrgsbase_r32 | Code::Wrgsbase_r64 => {
                self.write_base(op, base(SegReg::Gs), register, wide)?;
                // Found again when translated code is entered next.
                self.code.store_constant(fields::GS_BASE_KNOWN, NO_BASE as i32);
                Ok(())
            }
            Code::Rdtsc | Code::Rdtscp => {
                let detour = self.detour(op)?;
                self.code.test_field(fields::TAPED, 1);
                self.code.jump_if(Condition::NOT_EQUAL, detour.unusual);
                self.code.test_field(fields::CR4, Cr4::TSD.bits() as u32);
                self.code.jump_if(Condition::NOT_EQUAL, detour.unusual);
                self.overwrite(touches(it).map_or(GprSet::ALL, |touches| touches.registers))?;
                self.code.time(it.code() == Code::Rdtscp);
                self.rejoin(detour);
                Ok(())
            }
            Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
                let segment = it.op1_register().number() as u8;
                self.overwrite(GprSet::of(register))?;
                self.code.selector(segment);
                if it.code() == Code::Mov_rm16_Sreg {
                    // The rest of the register stays.
                    self.in_address = None;
                    self.code.fetch(ADDRESS, register);
                    // mov r13w, ax
                    self.code.bytes(&[0x66, 0x41, 0x89, 0xc5]);
                    self.code.put(register, ADDRESS);
                } else {
                    self.code.put(register, VALUE);
                }
                Ok(())
            }
            _ => Err(NotCopied),
        }
    }

    /// `rdfsbase` and `rdgsbase`.
    fn read_base(
        &mut self,
        op: &Op,
        base: fields::Field,
        register: u8,
        wide: bool,
    ) -> Result<(), NotCopied> {
        let detour = self.detour(op)?;
        self.code.with_fsgsbase_only(detour.unusual);
        self.overwrite(GprSet::of(register))?;
        self.code.load(VALUE, base);
        if !wide {
            self.code.narrow_value();
        }
        self.code.put(register, VALUE);
        self.rejoin(detour);
        Ok(())
    }

    /// `wrfsbase` and `wrgsbase`.
    fn write_base(
        &mut self,
        op: &Op,
        base: fields::Field,
        register: u8,
        wide: bool,
    ) -> Result<(), NotCopied> {
        let detour = self.detour(op)?;
        self.code.with_fsgsbase_only(detour.unusual);
        self.code.fetch(VALUE, register);
        if wide {
            self.code.canonical_only(detour.unusual);
        } else {
            self.code.narrow_value();
        }
        self.code.store(base, VALUE);
        self.rejoin(detour);
        Ok(())
    }
}

impl Assembler {
    fn with_fsgsbase_only(&mut self, unusual: super::assembler::Label) {
        self.test_field(fields::CR4, Cr4::FSGSBASE.bits() as u32);
        self.jump_if(Condition::EQUAL, unusual);
    }

    /// `mov eax, eax`
    fn narrow_value(&mut self) {
        self.bytes(&[0x89, 0xc0]);
    }

    /// The selector of segment register `number` in [`VALUE`].
    fn selector(&mut self, number: u8) {
        // movzx eax, word [selector]
        self.bytes(&[0x65, 0x0f, 0xb7, 0x04, 0x25]);
        self.bytes(&fields::segment_selector(number).0.to_le_bytes());
    }

    /// The guest's time in its EDX:EAX, and, if `aux`, IA32_TSC_AUX in its ECX.
    fn time(&mut self, aux: bool) {
        if aux {
            // lfence: `rdtscp` waits for all that comes before it, loads too.
            self.bytes(&[0x0f, 0xae, 0xe8]);
        }
        // rdtsc; shl rdx, 32; or rax, rdx
        self.bytes(&[0x0f, 0x31, 0x48, 0xc1, 0xe2, 32, 0x48, 0x09, 0xd0]);
        self.add(VALUE, fields::TSC_OFFSET);
        // mov r11d, eax; shr rax, 32; mov edx, eax
        self.bytes(&[0x41, 0x89, 0xc3, 0x48, 0xc1, 0xe8, 32, 0x89, 0xc2]);
        if aux {
            // mov ecx, [tsc_aux]
            self.bytes(&[0x65, 0x8b, 0x0c, 0x25]);
            self.bytes(&fields::TSC_AUX.0.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rdtscp_waits_for_what_comes_before_it() {
        let bytes = |aux| {
            let mut code = Assembler::new(0);
            code.time(aux);
            code.finish().unwrap().0
        };
        // rdtsc alone does not; lfence does.
        assert!(bytes(false).starts_with(&[0x0f, 0x31]));
        assert!(bytes(true).starts_with(&[0x0f, 0xae, 0xe8, 0x0f, 0x31]));
    }
}
