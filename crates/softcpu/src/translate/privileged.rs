//! Privileged instructions that kernels run all the time, done in line: interrupts off and
//! on, access to the user's pages, the exchange of GS.
//!
//! Each looks for privilege level 0 itself, because one translation serves whoever maps its
//! code. What is unusual goes to the interpreter, which runs the instruction as ever: another
//! level (IOPL decides then), an interrupt that waits when `sti` lets it in. Single steps,
//! breakpoints and shadows need no look, for translated code does not run with any of them in
//! force. What follows from a flag is changed along with it, the event mask and the view of
//! memory; the MMU's own idea of AC is caught up when translated code is left or calls back.

#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction};

use super::assembler::{Assembler, Condition, Label, NotCopied};
use super::block::Block;
use super::cold::Cold;
use super::fields;
use super::registers::{ADDRESS, GprSet, VALUE};
use super::stack::RSP;
use crate::decode::op::Op;
use crate::handle::Event;
use crate::state::rflags::RFlags;
use crate::state::segment::{Access, SegReg};

/// What the flags and registers of such a step have to do with those around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Touches {
    /// It must find the flags, because it may be interpreted or reads them.
    pub(super) flags: bool,
    /// Guest registers it changes.
    pub(super) registers: GprSet,
}

/// What `it` touches, if it is done here or beside ([`super::machine_state`],
/// [`super::flags_word`]).
pub(super) fn touches(it: &Instruction) -> Option<Touches> {
    const NONE: GprSet = GprSet::NONE;
    const RAX_RDX: GprSet = GprSet::of(0).or(GprSet::of(2));
    let named = GprSet::of(it.op0_register().full_register().number() as u8);
    let (flags, registers) = match it.code() {
        Code::Pause => (false, NONE),
        Code::Cli | Code::Sti | Code::Swapgs => (true, NONE),
        // As if it changed all: what was checked in one view does not hold in another.
        Code::Stac | Code::Clac => (true, GprSet::ALL),
        Code::Pushfq | Code::Popfq => (true, GprSet::of(RSP)),
        Code::Rdfsbase_r32 | Code::Rdfsbase_r64 | Code::Rdgsbase_r32 | Code::Rdgsbase_r64 => {
            (true, named)
        }
        Code::Wrfsbase_r32 | Code::Wrfsbase_r64 | Code::Wrgsbase_r32 | Code::Wrgsbase_r64 => {
            (true, NONE)
        }
        Code::Rdtsc => (true, RAX_RDX),
        Code::Rdtscp => (true, RAX_RDX.or(GprSet::of(1))),
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg
            if it.op0_kind() == iced_x86::OpKind::Register =>
        {
            (false, named)
        }
        _ => return None,
    };
    Some(Touches { flags, registers })
}

/// The way round an instruction: where it is interpreted, and where that comes back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Detour {
    pub(super) unusual: Label,
    back: Label,
}

impl Block<'_> {
    /// One of those that [`touches`] knows.
    ///
    /// # Errors
    /// It must be interpreted.
    pub(super) fn privileged(&mut self, it: &Instruction, op: &Op) -> Result<(), NotCopied> {
        match it.code() {
            Code::Pause => self.code.emit(it),
            Code::Cli => {
                let detour = self.detour(op)?;
                self.code.kernel_only(detour.unusual);
                self.code.and_field(fields::RFLAGS, !RFlags::IF.bits());
                self.code.mask_interrupts();
                self.rejoin(detour);
                Ok(())
            }
            Code::Sti => {
                let detour = self.detour(op)?;
                self.code.kernel_only(detour.unusual);
                // If none waits, nobody looks before the next instruction has run: the
                // shadow is over by then.
                self.code.load(VALUE, fields::EVENTS);
                self.code.test_events(Event::INTERRUPT);
                self.code.jump_if(Condition::NOT_EQUAL, detour.unusual);
                self.code.or_field(fields::RFLAGS, RFlags::IF.bits() as u32);
                self.code.unmask_interrupts();
                self.rejoin(detour);
                Ok(())
            }
            Code::Stac | Code::Clac => {
                let detour = self.detour(op)?;
                self.code.kernel_only(detour.unusual);
                let (tables, space) = if it.code() == Code::Stac {
                    self.code.or_field(fields::RFLAGS, RFlags::AC.bits() as u32);
                    (fields::TLB_OVER, fields::SPACE_OVER)
                } else {
                    self.code.and_field(fields::RFLAGS, !RFlags::AC.bits());
                    (fields::TLB_PLAIN, fields::SPACE_PLAIN)
                };
                self.code.load(VALUE, tables);
                self.code.store(fields::TLB, VALUE);
                self.code.load(VALUE, space);
                self.code.store(fields::SPACE, VALUE);
                self.rejoin(detour);
                Ok(())
            }
            Code::Swapgs => {
                let detour = self.detour(op)?;
                self.code.kernel_only(detour.unusual);
                let base = fields::segment_base(SegReg::Gs as u8);
                self.code.load(VALUE, base);
                self.code.load(ADDRESS, fields::KERNEL_GS_BASE);
                self.code.store(base, ADDRESS);
                self.code.store(fields::GS_BASE_KNOWN, ADDRESS);
                self.code.store(fields::KERNEL_GS_BASE, VALUE);
                self.rejoin(detour);
                Ok(())
            }
            Code::Pushfq => self.push_flags(op),
            Code::Popfq => self.pop_flags(op),
            _ => self.machine_state(it, op),
        }
    }

    /// Begins an instruction that is interpreted where something is unusual. It may use both
    /// scratch registers, and host flags are lost.
    pub(super) fn detour(&mut self, op: &Op) -> Result<Detour, NotCopied> {
        self.lose_flags()?;
        self.in_address = None;
        let back = self.code.label();
        let op = self.keep(op);
        let unusual = self.apart(Cold::Interpret { op, resume: back, to_host: false, again: None });
        Ok(Detour { unusual, back })
    }

    /// The instruction is done; what interpreted it goes on here.
    pub(super) fn rejoin(&mut self, detour: Detour) {
        self.in_address = None;
        self.code.bind(detour.back);
    }
}

impl Assembler {
    /// Goes to `unusual` unless the CPL is 0.
    fn kernel_only(&mut self, unusual: Label) {
        let ss = fields::segment_access(SegReg::Ss as u8);
        self.test_field(ss, Access::DPL.bits());
        self.jump_if(Condition::NOT_EQUAL, unusual);
    }

    /// Looks for `event` where [`VALUE`] points to.
    fn test_events(&mut self, event: Event) {
        // test dword [rax], event
        self.bytes(&[0xf7, 0x00]);
        self.bytes(&event.bits().to_le_bytes());
    }

    fn mask_interrupts(&mut self) {
        // and dword [event_mask], ~interrupt
        self.bytes(&[0x65, 0x81, 0x24, 0x25]);
        self.bytes(&fields::EVENT_MASK.0.to_le_bytes());
        self.bytes(&(!Event::INTERRUPT.bits()).to_le_bytes());
    }

    fn unmask_interrupts(&mut self) {
        // or dword [event_mask], interrupt
        self.bytes(&[0x65, 0x81, 0x0c, 0x25]);
        self.bytes(&fields::EVENT_MASK.0.to_le_bytes());
        self.bytes(&Event::INTERRUPT.bits().to_le_bytes());
    }
}
