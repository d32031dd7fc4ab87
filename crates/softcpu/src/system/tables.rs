//! The registers that say where descriptor tables are: GDTR, IDTR, LDTR, TR; and the
//! machine status word, which the same opcodes reach.
//!
//! Sources: SDM vol. 2, LGDT, LIDT, LLDT, LTR, SGDT, SIDT, SLDT, STR, SMSW, LMSW;
//! vol. 3, 2.5 (CR4.UMIP).

use super::descriptor::{Selector, system_type};
use super::mask_of;
use crate::addr::GuestVirtAddr;
use crate::decode::op::{Op, OpFlags, read_reg, write_reg};
use crate::exception::Exception;
use crate::mmu::Access as MemAccess;
use crate::state::control::{Cr0, Cr4};
use crate::state::segment::{Access, DescriptorTable, Segment};
use crate::vcpu::{Abort, Step, Vcpu};

impl Vcpu {
    /// With UMIP, only ring 0 may learn where the system's tables are.
    fn require_umip(&mut self) -> Step {
        if self.state.cr4.contains(Cr4::UMIP) && self.state.cpl() != 0 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    /// Stores a 16-bit system value: memory always takes 16 bits, a register takes it
    /// zero-extended to the operand size.
    fn store_word(&mut self, op: &Op, value: u64) -> Step {
        if op.flags.contains(OpFlags::MEM) {
            let addr = self.linear(op, 2, MemAccess::Write)?;
            return self.write::<u16>(addr, value as u16);
        }
        match op.size {
            2 => write_reg::<u16>(&mut self.state, op.dst, value as u16),
            4 => write_reg::<u32>(&mut self.state, op.dst, value as u32),
            _ => write_reg::<u64>(&mut self.state, op.dst, value),
        }
        Ok(())
    }

    fn store_table(&mut self, op: &Op, table: DescriptorTable) -> Step {
        self.require_umip()?;
        let base_size = if op.flags.contains(OpFlags::LONG) { 8 } else { 4_usize };
        let len = base_size.saturating_add(2);
        let mut image = [0_u8; 10];
        for (slot, byte) in image
            .iter_mut()
            .zip(table.limit.to_le_bytes().into_iter().chain(table.base.to_le_bytes()))
        {
            *slot = byte;
        }
        let addr = self.linear(op, len as u64, MemAccess::Write)?;
        self.write_bytes(addr, image.get(..len).unwrap_or(&image))
    }

    fn fetch_table(&mut self, op: &Op) -> Result<DescriptorTable, Abort> {
        self.require_cpl0()?;
        let long = op.flags.contains(OpFlags::LONG);
        let len = if long { 10 } else { 6 };
        let addr = self.linear(op, len, MemAccess::Read)?;
        let limit = self.read::<u16>(addr)?;
        let at = addr.wrapping_add(2);
        let base = if long {
            self.read::<u64>(at)?
        } else {
            u64::from(self.read::<u32>(self.wrap_linear(at))?)
        };
        if long && !GuestVirtAddr(base).is_canonical() {
            return Err(self.gp(0));
        }
        // The 16-bit form has room for 24 bits of base only.
        let base = if op.size == 2 && !long { base & 0xff_ffff } else { base };
        Ok(DescriptorTable { base, limit })
    }

    fn local_table(&mut self, selector: Selector) -> Result<Segment, Abort> {
        if selector.is_null() {
            return Ok(Segment::null(selector.0));
        }
        if selector.is_local() {
            return Err(self.gp(selector.code()));
        }
        let mut descriptor = self.descriptor(selector, Exception::general_protection)?;
        if descriptor.system_type() != Some(system_type::LDT) {
            return Err(self.gp(selector.code()));
        }
        if !descriptor.is_present() {
            return Err(self.raise(Exception::segment_not_present(selector.code())));
        }
        if self.state.long_mode() {
            descriptor =
                self.widen_descriptor(selector, descriptor, Exception::general_protection)?;
        }
        let segment = descriptor.system_segment(selector);
        if self.state.long_mode() && !GuestVirtAddr(segment.base).is_canonical() {
            return Err(self.gp(selector.code()));
        }
        Ok(segment)
    }

    fn task_register(&mut self, selector: Selector) -> Result<Segment, Abort> {
        if selector.is_null() {
            return Err(self.gp(0));
        }
        if selector.is_local() {
            return Err(self.gp(selector.code()));
        }
        let mut descriptor = self.descriptor(selector, Exception::general_protection)?;
        let long = self.state.long_mode();
        let available = match descriptor.system_type() {
            Some(system_type::TSS_AVAILABLE) => true,
            Some(system_type::TSS16_AVAILABLE) => !long,
            _ => false,
        };
        if !available {
            return Err(self.gp(selector.code()));
        }
        if !descriptor.is_present() {
            return Err(self.raise(Exception::segment_not_present(selector.code())));
        }
        if long {
            descriptor =
                self.widen_descriptor(selector, descriptor, Exception::general_protection)?;
        }
        let mut segment = descriptor.system_segment(selector);
        if long && !GuestVirtAddr(segment.base).is_canonical() {
            return Err(self.gp(selector.code()));
        }
        self.mark_busy(&descriptor)?;
        segment.access |= Access::WRITE_OR_READ;
        Ok(segment)
    }
}

/// `lgdt m`.
pub(crate) fn lgdt(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.state.gdtr = cpu.fetch_table(op)?;
    Ok(())
}

/// `lidt m`.
pub(crate) fn lidt(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.state.idtr = cpu.fetch_table(op)?;
    Ok(())
}

/// `sgdt m`.
pub(crate) fn sgdt(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.store_table(op, cpu.state.gdtr)
}

/// `sidt m`.
pub(crate) fn sidt(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.store_table(op, cpu.state.idtr)
}

/// `lldt r/m16`.
pub(crate) fn lldt(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.has_descriptors() {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let selector = cpu.selector_operand(op, op.dst)?;
    cpu.state.ldtr = cpu.local_table(selector)?;
    Ok(())
}

/// `ltr r/m16`: marks the TSS busy.
pub(crate) fn ltr(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.has_descriptors() {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let selector = cpu.selector_operand(op, op.dst)?;
    cpu.state.tr = cpu.task_register(selector)?;
    Ok(())
}

/// `sldt r/m`.
pub(crate) fn sldt(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.has_descriptors() {
        return Err(cpu.ud());
    }
    cpu.require_umip()?;
    cpu.store_word(op, u64::from(cpu.state.ldtr.selector))
}

/// `str r/m`.
pub(crate) fn str(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.has_descriptors() {
        return Err(cpu.ud());
    }
    cpu.require_umip()?;
    cpu.store_word(op, u64::from(cpu.state.tr.selector))
}

/// `smsw r/m`: the low word of CR0; a wider register takes more of it.
pub(crate) fn smsw(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.require_umip()?;
    cpu.store_word(op, cpu.state.cr0.bits() & mask_of(op.size))
}

/// `lmsw r/m16`: PE, MP, EM and TS; PE can be set but not cleared.
pub(crate) fn lmsw(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.require_cpl0()?;
    let word = if op.flags.contains(OpFlags::MEM) {
        let addr = cpu.linear(op, 2, MemAccess::Read)?;
        cpu.read::<u16>(addr)?
    } else {
        read_reg::<u16>(&cpu.state, op.dst)
    };
    let sticky = cpu.state.cr0 & Cr0::PE;
    let low = Cr0::PE | Cr0::MP | Cr0::EM | Cr0::TS;
    let image = Cr0::from_bits_retain(u64::from(word)) & low;
    let value = cpu.state.cr0.difference(low) | image | sticky;
    cpu.set_cr0(value.bits())?;
    cpu.end_block(op)
}
