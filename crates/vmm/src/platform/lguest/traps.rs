//! Traps: which the guest sees, and the frames its handlers find.
//!
//! A handler runs in ring 1, on the stack of SET_STACK if it interrupts ring 3 and on the
//! current one otherwise. Each word is pushed by its own virtual address: the old host
//! translated the top of the stack and went on physically, which is wrong on a stack whose
//! pages are not neighbours.

use lguest_abi::band::Trap as CallTrap;
use lguest_abi::segments::{Gate, GateKind};
use lguest_abi::shared_data::NoIrqWindow;
use lguest_abi::traps::{HYPERCALL_VECTOR, handler_flags, saved_flags};
use softcpu::exception::{Exception, PageFaultCode, Vector};
use softcpu::state::regs::Gpr;
use softcpu::state::rflags::RFlags;
use softcpu::state::segment::{SegReg, Segment};
use softcpu::{Vcpu, Verdict};

use super::{Death, Lguest};

/// Error code bit 1: the index is one of the IDT.
const IDT: u32 = 2;
/// The first vector that is no exception's.
const FIRST_EXTERNAL: u8 = 32;
/// Where the flags are in the frame that an `iret` is about to take: behind EIP and CS.
const FRAME_FLAGS: u64 = 8;

/// A stack that words are pushed to.
struct Stack {
    segment: Segment,
    esp: u64,
}

impl Stack {
    fn push(&mut self, cpu: &mut Vcpu, word: u32) -> Result<(), Death> {
        self.esp = wrap(&self.segment, self.esp.wrapping_sub(4));
        let at = linear(&self.segment, self.esp);
        cpu.write_virtual(at, &word.to_le_bytes()).map_err(|_| Death::StackNotMapped(at))
    }
}

/// A stack pointer in a stack segment, which may be one of 16 bits.
fn wrap(segment: &Segment, esp: u64) -> u64 {
    esp & if segment.is_big() { 0xffff_ffff } else { 0xffff }
}

fn linear(segment: &Segment, offset: u64) -> u64 {
    segment.base.wrapping_add(offset) & 0xffff_ffff
}

impl Lguest {
    /// An exception: seen to here, or handed to the guest.
    pub(super) fn exception(
        &mut self,
        cpu: &mut Vcpu,
        exception: Exception,
    ) -> Result<Verdict, Death> {
        let code = exception.error_code;
        match exception.vector {
            Vector::PageFault => {
                if cpu.top_level_is_stale() {
                    // The guest has added to it since, and may say so later.
                    self.flush_tlb(cpu)?;
                    return Ok(Verdict::Resume);
                }
                if code.is_some_and(|code| code & PageFaultCode::RESERVED.bits() != 0) {
                    let at = exception.payload;
                    let bad = self.bad_entry(cpu, at as u32).map(Death::Entry);
                    return Err(bad.unwrap_or(Death::ReservedBits(at)));
                }
                if let Some(session) = &self.session {
                    session.data.set_cr2(exception.payload as u32)?;
                }
            }
            Vector::GeneralProtection if code == Some(0) && self.emulate(cpu) => {
                return Ok(Verdict::Resume);
            }
            Vector::Debug => cpu.state.dr6 |= exception.payload,
            _ => {}
        }
        let detail = match exception.vector {
            Vector::PageFault => exception.payload,
            _ => code.unwrap_or(0).into(),
        };
        self.reflect(cpu, exception.vector as u8, code, detail)
    }

    /// `int n` and its kin: a hypercall, or what the guest's gate for the vector allows.
    pub(super) fn software_interrupt(
        &mut self,
        cpu: &mut Vcpu,
        vector: u8,
        at: u64,
        checked: bool,
    ) -> Result<Verdict, Death> {
        let cpl = cpu.state.cpl();
        if vector == HYPERCALL_VECTOR && cpl == 1 {
            return self.hypercall(cpu, CallTrap::Int1f);
        }
        let syscall = self.session.as_ref().map_or(0x80, |session| session.fields.syscall_vec);
        let guests = vector < FIRST_EXTERNAL || u32::from(vector) == syscall || vector == 0x80;
        let gate = self.gate(vector).filter(|gate| guests && (!checked || gate.dpl >= cpl));
        match gate {
            Some(gate) => self.enter_handler(cpu, gate, None).map(|()| Verdict::Resume),
            None => {
                cpu.state.rip = at;
                let code = u32::from(vector) << 3 | IDT;
                self.exception(cpu, Exception::general_protection(code))
            }
        }
    }

    /// The guest's gate for `vector`.
    pub(super) fn gate(&self, vector: u8) -> Option<Gate> {
        self.idt.get(usize::from(vector)).copied().flatten()
    }

    fn reflect(
        &mut self,
        cpu: &mut Vcpu,
        vector: u8,
        code: Option<u32>,
        detail: u64,
    ) -> Result<Verdict, Death> {
        let gate = self.gate(vector).ok_or(Death::UnhandledTrap { vector, detail })?;
        self.enter_handler(cpu, gate, code)?;
        Ok(Verdict::Resume)
    }

    /// Builds the frame and enters the handler.
    pub(super) fn enter_handler(
        &mut self,
        cpu: &mut Vcpu,
        gate: Gate,
        code: Option<u32>,
    ) -> Result<(), Death> {
        let held = *cpu.state.segment(SegReg::Ss);
        let esp = cpu.state.reg(Gpr::Rsp) as u32;
        let outer = held.dpl() != 1;
        let mut stack = if outer {
            let segment = self.gdt.kernel_stack(self.stack.ss)?;
            Stack { segment, esp: self.stack.esp.0.into() }
        } else {
            Stack { segment: held, esp: esp.into() }
        };
        let handler = self.gdt.kernel_code()?;
        let flags = cpu.state.rflags.bits() as u32;
        if outer {
            stack.push(cpu, held.selector.into())?;
            stack.push(cpu, esp)?;
        }
        stack.push(cpu, saved_flags(flags, self.irq_enabled()?))?;
        stack.push(cpu, cpu.state.segment(SegReg::Cs).selector.into())?;
        stack.push(cpu, cpu.state.rip as u32)?;
        if let Some(code) = code {
            stack.push(cpu, code)?;
        }
        let esp = if stack.segment.is_big() {
            stack.esp as u32
        } else {
            esp & 0xffff_0000 | stack.esp as u32 & 0xffff
        };
        cpu.state.set_reg32(Gpr::Rsp, esp);
        *cpu.state.segment_mut(SegReg::Ss) = stack.segment;
        self.run_handler(cpu, gate, handler, flags)
    }

    /// Enters the handler on the frame that the guest's `iret` was about to take: V6's rule.
    /// The handler's own `iret` then goes where that one would have gone.
    pub(super) fn enter_in_place_of_iret(
        &mut self,
        cpu: &mut Vcpu,
        gate: Gate,
    ) -> Result<(), Death> {
        let handler = self.gdt.kernel_code()?;
        let stack = *cpu.state.segment(SegReg::Ss);
        let esp = cpu.state.reg(Gpr::Rsp);
        let at = linear(&stack, wrap(&stack, esp.wrapping_add(FRAME_FLAGS)));
        let mut flags = [0; 4];
        cpu.read_virtual(at, &mut flags).map_err(|_| Death::StackNotMapped(at))?;
        // What the CPU cares for stays as it is: the privileged bits are not the guest's.
        let taken = u32::from_le_bytes(flags) & RFlags::STATUS.bits() as u32;
        let kept = cpu.state.rflags.difference(RFlags::STATUS).bits() as u32;
        self.run_handler(cpu, gate, handler, kept | taken)
    }

    fn run_handler(
        &mut self,
        cpu: &mut Vcpu,
        gate: Gate,
        handler: Segment,
        flags: u32,
    ) -> Result<(), Death> {
        *cpu.state.segment_mut(SegReg::Cs) = handler;
        cpu.state.rip = gate.offset.into();
        cpu.segments_changed();
        cpu.load_flags(RFlags::from_bits_retain(handler_flags(flags).into()));
        match (gate.kind, &self.session) {
            (GateKind::Interrupt, Some(session)) => session.data.enable_interrupts(false),
            _ => Ok(()),
        }
    }

    fn irq_enabled(&self) -> Result<u32, Death> {
        self.session.as_ref().map_or(Ok(0), |session| session.data.irq_enabled())
    }

    /// Whether the guest's kernel is where no interrupt may be pushed onto its stack.
    pub(super) fn window_at(&self, cpu: &Vcpu) -> Option<NoIrqWindow> {
        let window = self.session.as_ref()?.fields.window;
        let inside = cpu.state.cpl() == 1 && window.contains(cpu.state.rip as u32);
        inside.then_some(window)
    }
}
