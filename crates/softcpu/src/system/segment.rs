//! Loading segment registers, and the instructions that inspect descriptors.
//!
//! Sources: SDM vol. 3, 5.4 to 5.7 (privilege and type checks); vol. 2, MOV, VERR,
//! LAR, LSL, ARPL.

use super::descriptor::{Descriptor, Selector, system_type};
use crate::decode::op::{Op, OpFlags, read_reg, write_reg};
use crate::exception::Exception;
use crate::mmu::Access as MemAccess;
use crate::state::CodeSize;
use crate::state::rflags::RFlags;
use crate::state::segment::{Access, SegReg, Segment};
use crate::vcpu::{Abort, Step, Vcpu};

impl Vcpu {
    /// Whether the CPU is in virtual-8086 mode.
    #[inline]
    pub(crate) fn virtual_8086(&self) -> bool {
        self.state.rflags.contains(RFlags::VM)
    }

    /// Protected mode proper: neither real nor virtual-8086 mode.
    #[inline]
    pub(crate) fn has_descriptors(&self) -> bool {
        self.state.protected_mode() && !self.virtual_8086()
    }

    /// Loads a data or stack segment register, as `mov`, `pop`, `lss` and their kin do.
    ///
    /// A load of CS ends in `#UD`. The caller casts the shadow after `mov ss` and
    /// `pop ss`, and ends the block after any load of SS.
    ///
    /// # Errors
    /// [`Abort::Fault`] with the register unchanged.
    pub(crate) fn load_segment(&mut self, reg: SegReg, value: u16) -> Result<(), Abort> {
        if reg == SegReg::Cs {
            return Err(self.ud());
        }
        let segment = if self.has_descriptors() {
            self.find_segment(reg, Selector(value))?
        } else {
            self.plain_segment(reg, value)
        };
        *self.state.segment_mut(reg) = segment;
        Ok(())
    }

    /// What `value` loads in real and virtual-8086 mode.
    pub(crate) fn plain_segment(&self, reg: SegReg, value: u16) -> Segment {
        let code = if reg == SegReg::Cs { Access::CODE } else { Access::empty() };
        if self.virtual_8086() {
            let segment = Segment::virtual_8086(value);
            return Segment { access: segment.access | code, ..segment };
        }
        let fresh = Segment::real_mode(value);
        let fresh = Segment { access: fresh.access | code, ..fresh };
        let old = self.state.segment(reg);
        if old.is_unusable() {
            return fresh;
        }
        // Real mode replaces base and selector only. The limit stays what protected mode
        // left there ("unreal mode"), and boot code relies on it.
        let kept = old.access & (Access::BIG | Access::GRANULAR);
        Segment { limit: old.limit, access: fresh.access | kept, ..fresh }
    }

    fn find_segment(&mut self, reg: SegReg, selector: Selector) -> Result<Segment, Abort> {
        let cpl = self.state.cpl();
        if reg == SegReg::Ss {
            return self.find_stack_segment(selector);
        }
        if selector.is_null() {
            return Ok(Segment::null(selector.0));
        }
        let descriptor = self.descriptor(selector, Exception::general_protection)?;
        if !descriptor.is_readable() {
            return Err(self.gp(selector.code()));
        }
        if !descriptor.is_conforming()
            && (selector.rpl() > descriptor.dpl() || cpl > descriptor.dpl())
        {
            return Err(self.gp(selector.code()));
        }
        if !descriptor.is_present() {
            return Err(self.raise(Exception::segment_not_present(selector.code())));
        }
        self.mark_accessed(&descriptor)?;
        Ok(descriptor.segment(selector))
    }

    fn find_stack_segment(&mut self, selector: Selector) -> Result<Segment, Abort> {
        let cpl = self.state.cpl();
        if selector.is_null() {
            // 64-bit mode has no stack segment to speak of, but ring 3 must name one.
            let allowed =
                self.state.code_size() == CodeSize::Bits64 && cpl != 3 && selector.rpl() == cpl;
            return if allowed {
                Ok(Segment::null_stack(selector.0, cpl))
            } else {
                Err(self.gp(0))
            };
        }
        let descriptor = self.descriptor(selector, Exception::general_protection)?;
        self.check_stack(&descriptor, selector, cpl, Exception::general_protection)?;
        self.mark_accessed(&descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// The checks every stack segment passes: privilege exactly `cpl`, writable data,
    /// present. All but the last fail with `fault`, the last with `#SS`.
    pub(crate) fn check_stack(
        &mut self,
        descriptor: &Descriptor,
        selector: Selector,
        cpl: u8,
        fault: fn(u32) -> Exception,
    ) -> Result<(), Abort> {
        if selector.rpl() != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data() {
            return Err(self.raise(fault(selector.code())));
        }
        if !descriptor.is_present() {
            return Err(self.raise(Exception::stack_segment(selector.code())));
        }
        Ok(())
    }

    /// The selector in an op's r/m operand, a register in slot `reg` or a memory word.
    pub(crate) fn selector_operand(&mut self, op: &Op, reg: u8) -> Result<Selector, Abort> {
        if !op.flags.contains(OpFlags::MEM) {
            return Ok(Selector(read_reg::<u16>(&self.state, reg)));
        }
        let addr = self.linear(op, 2, MemAccess::Read)?;
        Ok(Selector(self.read::<u16>(addr)?))
    }

    /// The descriptor that VERR, VERW, LAR and LSL ask about, if the selector names one
    /// that is visible at the current privilege. Page faults are the only faults.
    fn visible_descriptor(&mut self, selector: Selector) -> Result<Option<Descriptor>, Abort> {
        if selector.is_null() || !self.has_descriptor(selector) {
            return Ok(None);
        }
        let descriptor = self.descriptor(selector, Exception::general_protection)?;
        let privilege = selector.rpl().max(self.state.cpl());
        let visible = descriptor.is_conforming() || privilege <= descriptor.dpl();
        Ok(visible.then_some(descriptor))
    }

    fn set_zf(&mut self, zf: bool) {
        self.state.rflags.set(RFlags::ZF, zf);
    }

    fn verify(&mut self, op: &Op, suits: fn(&Descriptor) -> bool) -> Step {
        if !self.has_descriptors() {
            return Err(self.ud());
        }
        let selector = self.selector_operand(op, op.dst)?;
        let found = self.visible_descriptor(selector)?;
        self.set_zf(found.is_some_and(|descriptor| suits(&descriptor)));
        Ok(())
    }

    fn store_sized(&mut self, reg: u8, size: u8, value: u64) {
        match size {
            2 => write_reg::<u16>(&mut self.state, reg, value as u16),
            4 => write_reg::<u32>(&mut self.state, reg, value as u32),
            _ => write_reg::<u64>(&mut self.state, reg, value),
        }
    }
}

/// `verr r/m16`: ZF says whether the segment may be read.
pub(crate) fn verr(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.verify(op, Descriptor::is_readable)
}

/// `verw r/m16`: ZF says whether the segment may be written.
pub(crate) fn verw(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.verify(op, Descriptor::is_writable_data)
}

/// `lar r, r/m16`: access rights of a descriptor, in place.
pub(crate) fn lar(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.has_descriptors() {
        return Err(cpu.ud());
    }
    let selector = cpu.selector_operand(op, op.src)?;
    let long = cpu.state.long_mode();
    let rights =
        cpu.visible_descriptor(selector)?.filter(|descriptor| match descriptor.system_type() {
            None => true,
            Some(kind) => match kind {
                system_type::LDT
                | system_type::TSS_AVAILABLE
                | system_type::TSS_BUSY
                | system_type::CALL_GATE => true,
                system_type::TSS16_AVAILABLE
                | system_type::TSS16_BUSY
                | system_type::CALL_GATE16
                | system_type::TASK_GATE => !long,
                _ => false,
            },
        });
    if let Some(descriptor) = rights {
        cpu.store_sized(op.dst, op.size, (descriptor.raw >> 32) & 0x00ff_ff00);
    }
    cpu.set_zf(rights.is_some());
    Ok(())
}

/// `lsl r, r/m16`: a segment's limit in bytes.
pub(crate) fn lsl(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.has_descriptors() {
        return Err(cpu.ud());
    }
    let selector = cpu.selector_operand(op, op.src)?;
    let long = cpu.state.long_mode();
    let found =
        cpu.visible_descriptor(selector)?.filter(|descriptor| match descriptor.system_type() {
            None => true,
            Some(kind) => match kind {
                system_type::LDT | system_type::TSS_AVAILABLE | system_type::TSS_BUSY => true,
                system_type::TSS16_AVAILABLE | system_type::TSS16_BUSY => !long,
                _ => false,
            },
        });
    if let Some(descriptor) = found {
        cpu.store_sized(op.dst, op.size, u64::from(descriptor.segment(selector).limit));
    }
    cpu.set_zf(found.is_some());
    Ok(())
}

/// `arpl r/m16, r16`: raises the RPL of a selector to that of another. Not in 64-bit
/// mode, where the encoding is MOVSXD.
pub(crate) fn arpl(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.has_descriptors() {
        return Err(cpu.ud());
    }
    let source = Selector(read_reg::<u16>(&cpu.state, op.src));
    let memory = op.flags.contains(OpFlags::MEM);
    let target = if memory {
        let addr = cpu.linear(op, 2, MemAccess::Read)?;
        Selector(cpu.read::<u16>(addr)?)
    } else {
        Selector(read_reg::<u16>(&cpu.state, op.dst))
    };
    let raise = target.rpl() < source.rpl();
    if raise {
        let raised = target.with_rpl(source.rpl()).0;
        if memory {
            // Only now must it be writable.
            let addr = cpu.linear(op, 2, MemAccess::Write)?;
            cpu.write::<u16>(addr, raised)?;
        } else {
            write_reg::<u16>(&mut cpu.state, op.dst, raised);
        }
    }
    cpu.set_zf(raise);
    Ok(())
}
