//! `iret` in all its forms.
//!
//! Source: SDM vol. 2, IRET pseudo-code; vol. 3, 6.14.3 (64-bit) and 20.2 (virtual-8086).

use super::descriptor::Selector;
use super::stack::Cursor;
use crate::decode::op::{Op, OpFlags};
use crate::state::regs::Gpr;
use crate::state::rflags::RFlags;
use crate::state::segment::{Access, SegReg, Segment};
use crate::vcpu::{Abort, Step, Vcpu};

impl Vcpu {
    /// The flags `iret` may change at the current privilege, from an image of `size` bytes.
    fn iret_mask(&self, size: u8) -> RFlags {
        let cpl = self.state.cpl();
        let mut mask = RFlags::STATUS | RFlags::TF | RFlags::DF | RFlags::NT;
        if size != 2 {
            mask |= RFlags::RF | RFlags::AC | RFlags::ID;
        }
        if !self.state.protected_mode() {
            return mask | RFlags::IF | RFlags::IOPL;
        }
        if cpl <= self.state.rflags.iopl() {
            mask |= RFlags::IF;
        }
        if cpl == 0 {
            mask |= RFlags::IOPL;
            if size != 2 {
                mask |= RFlags::VIF | RFlags::VIP;
            }
        }
        mask
    }

    /// Takes flags back from a frame. RF only matters to instruction breakpoints, so it
    /// is dropped when there are none to hold off.
    fn restore_flags(&mut self, image: u64, mask: RFlags) {
        let mut flags = self.state.rflags.with_image(image, mask);
        if !self.debug_active() {
            flags.remove(RFlags::RF);
        }
        self.set_rflags(flags);
    }

    /// Real mode, and virtual-8086 mode with IOPL 3.
    fn iret_plain(&mut self, op: &Op) -> Step {
        let mut mask = self.iret_mask(op.size);
        if self.virtual_8086() {
            if self.state.rflags.iopl() < 3 {
                return Err(self.gp(0));
            }
            mask.remove(RFlags::IOPL | RFlags::VIF | RFlags::VIP);
        }
        let mut stack = self.current_stack();
        let offset = self.pop_from(&mut stack, op.size)?;
        let selector = self.pop_from(&mut stack, op.size)? as u16;
        let image = self.pop_from(&mut stack, op.size)?;
        let segment = self.plain_segment(SegReg::Cs, selector);
        let rip = self.check_entry(&segment, offset)?;
        self.commit_stack(&stack);
        self.restore_flags(image, mask);
        self.enter(segment, rip);
        Err(Abort::EndBlock)
    }

    /// From ring 0 into virtual-8086 mode.
    fn iret_to_8086(&mut self, mut stack: Cursor, selector: u16, offset: u64, image: u64) -> Step {
        let pointer = self.pop_from(&mut stack, 4)?;
        let mut selectors = [0_u16; 5];
        for slot in &mut selectors {
            *slot = self.pop_from(&mut stack, 4)? as u16;
        }
        let [ss, es, ds, fs, gs] = selectors;
        let mask = self.iret_mask(4) | RFlags::VM;
        self.restore_flags(image, mask);
        for (reg, value) in [
            (SegReg::Ss, ss),
            (SegReg::Es, es),
            (SegReg::Ds, ds),
            (SegReg::Fs, fs),
            (SegReg::Gs, gs),
        ] {
            *self.state.segment_mut(reg) = Segment::virtual_8086(value);
        }
        self.state.set_reg(Gpr::Rsp, pointer & 0xffff_ffff);
        let code = Segment::virtual_8086(selector);
        let code = Segment { access: code.access | Access::CODE, ..code };
        self.enter(code, offset & 0xffff);
        Err(Abort::EndBlock)
    }

    fn iret_protected(&mut self, op: &Op) -> Step {
        let long = self.state.long_mode();
        if self.state.rflags.contains(RFlags::NT) {
            // A nested task would be returned to by a task switch.
            if !long {
                self.note_task_switch();
            }
            return Err(self.gp(0));
        }
        let mut stack = self.current_stack();
        let offset = self.pop_from(&mut stack, op.size)?;
        let selector = self.pop_from(&mut stack, op.size)? as u16;
        let image = self.pop_from(&mut stack, op.size)?;
        let cpl = self.state.cpl();
        let to_8086 = !long && op.size == 4 && cpl == 0 && image & RFlags::VM.bits() != 0;
        if to_8086 {
            return self.iret_to_8086(stack, selector, offset, image);
        }
        let landing = self.return_code(Selector(selector), offset)?;
        let mask = self.iret_mask(op.size);
        if landing.cpl == cpl && !op.flags.contains(OpFlags::LONG) {
            self.commit_stack(&stack);
            self.restore_flags(image, mask);
            self.enter(landing.segment, landing.rip);
            return Err(Abort::EndBlock);
        }
        let pointer = self.pop_from(&mut stack, op.size)?;
        let selector = self.pop_from(&mut stack, op.size)? as u16;
        let segment = self.return_stack(Selector(selector), &landing)?;
        self.restore_flags(image, mask);
        self.land_outside(&landing, segment, pointer, 0);
        Err(Abort::EndBlock)
    }
}

/// `iret`, `iretd`, `iretq` by operand size.
pub(crate) fn iret(cpu: &mut Vcpu, op: &Op) -> Step {
    // Even an `iret` that faults lets NMIs through again (SDM vol. 3, 6.7.1).
    cpu.nmi_blocked = false;
    cpu.note_iret();
    cpu.update_event_mask();
    if cpu.has_descriptors() { cpu.iret_protected(op) } else { cpu.iret_plain(op) }
}
