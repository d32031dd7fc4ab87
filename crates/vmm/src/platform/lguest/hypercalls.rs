//! Hypercalls: one at a time from registers, or many from the ring.
//!
//! The ring is drained in order before every direct call, and only then. Between filling
//! and draining, what the calls would change is stale by the guest's own wish.

use lguest_abi::band::Trap as CallTrap;
use lguest_abi::boot::PAGE;
use lguest_abi::call::{
    Call, CallRegisters, CallWords, SHUTDOWN_TEXT_BYTES, ShutdownReason, number,
};
use lguest_abi::ring;
use lguest_abi::segments::{Descriptor, GDT_ENTRIES, Gate, GateChange, TLS_ENTRIES};
use lguest_abi::traps::STACK_PAGES_MAX;
use lguest_abi::{Band, Phys, Virt};
use softcpu::exception::Exception;
use softcpu::state::control::Cr0;
use softcpu::state::regs::Gpr;
use softcpu::{Vcpu, Verdict};

use super::{Death, Ended, GuestDevices, KernelStack, Lguest};

/// The ring of a guest's kernel.
const KERNEL_RING: u8 = 1;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 8;
/// What Linux says when it powers off; a panic comes with the same reason.
const POWER_DOWN: &str = "Power down";

impl Lguest {
    /// `vmcall`: a hypercall of V2 and V3, which later hosts still took in V4. The old host
    /// rewrote it in the guest's text; nothing needs to be rewritten here.
    pub(super) fn vmcall(&mut self, cpu: &mut Vcpu, at: u64) -> Result<Verdict, Death> {
        let taken = match &self.session {
            None => true,
            Some(session) => matches!(session.band, Band::V2 | Band::V3 | Band::V4),
        };
        if taken && cpu.state.cpl() == KERNEL_RING {
            return self.hypercall(cpu, CallTrap::Vmcall);
        }
        self.no_such_instruction(cpu, at)
    }

    /// An instruction that guests of this platform do not have.
    pub(super) fn no_such_instruction(
        &mut self,
        cpu: &mut Vcpu,
        at: u64,
    ) -> Result<Verdict, Death> {
        cpu.state.rip = at;
        self.exception(cpu, Exception::invalid_opcode())
    }

    /// A direct call; RIP is behind the instruction.
    pub(super) fn hypercall(&mut self, cpu: &mut Vcpu, trap: CallTrap) -> Result<Verdict, Death> {
        let reg = |which| cpu.state.reg(which) as u32;
        let registers = CallRegisters {
            eax: reg(Gpr::Rax),
            ebx: reg(Gpr::Rbx),
            ecx: reg(Gpr::Rcx),
            edx: reg(Gpr::Rdx),
            esi: reg(Gpr::Rsi),
        };
        let Some(session) = &self.session else {
            return match registers.eax {
                number::LGUEST_INIT => self.init(cpu, registers, trap).map(|()| Verdict::Resume),
                other => Err(Death::BeforeInit(other)),
            };
        };
        let words = CallWords::from_registers(session.band.register_order(), registers);
        if self.drain_ring(cpu)? == Verdict::Stop {
            return Ok(Verdict::Stop);
        }
        self.perform(cpu, &words)
    }

    /// Carries out what the ring holds: at most all of its slots once.
    fn drain_ring(&mut self, cpu: &mut Vcpu) -> Result<Verdict, Death> {
        let Some(session) = &self.session else { return Ok(Verdict::Resume) };
        let (data, from) = (session.data.clone(), session.cursor);
        let status = data.status()?;
        for cursor in ring::marked(&status, from) {
            let words = data.slot(cursor)?;
            let verdict = self.perform(cpu, &words)?;
            data.free_slot(cursor)?;
            if let Some(session) = &mut self.session {
                session.cursor = cursor.next();
            }
            if verdict == Verdict::Stop {
                return Ok(verdict);
            }
        }
        Ok(Verdict::Resume)
    }

    fn perform(&mut self, cpu: &mut Vcpu, words: &CallWords) -> Result<Verdict, Death> {
        let Some(session) = &self.session else { return Err(Death::BeforeInit(words.number)) };
        let call = Call::decode(session.band, session.paging, words)
            .map_err(|unknown| Death::UnknownCall(unknown.number))?;
        tracing::trace!(?call, "hypercall");
        match call {
            // They bring the guest here, and that is all they are for.
            Call::FlushAsync | Call::SendInterrupts => {}
            Call::Init { .. } => return Err(Death::SecondInit),
            Call::Shutdown { text, reason } => {
                (self.ended)(self.shutdown(text, reason)?);
                return Ok(Verdict::Stop);
            }
            Call::LoadGdt { table, count } => {
                if count > GDT_ENTRIES as u32 {
                    return Err(Death::DescriptorCount(count));
                }
                let mut bytes = [0; GDT_ENTRIES * DESCRIPTOR];
                let len = (count as usize).saturating_mul(DESCRIPTOR);
                let bytes = bytes.get_mut(..len).unwrap_or_default();
                self.memory.read(table, bytes)?;
                self.gdt.set_all(0, bytes)?;
                self.gdt.install(cpu)?;
            }
            Call::LoadGdtEntry { index, low, high } => {
                self.gdt.set(index, Descriptor::from_words(low, high))?;
                self.gdt.install(cpu)?;
            }
            Call::LoadTls { table, cpu: _ } => {
                let mut bytes = [0; TLS_ENTRIES * DESCRIPTOR];
                self.memory.read(table, &mut bytes)?;
                self.gdt.set_tls(&bytes)?;
                self.gdt.install(cpu)?;
            }
            Call::LoadIdtEntry { vector, low, high } => {
                let gate = match Gate::accept(vector, low, high)? {
                    GateChange::Set(gate) => Some(gate),
                    GateChange::Clear => None,
                    GateChange::Ignored => return Ok(Verdict::Resume),
                };
                if let Some(slot) = self.idt.get_mut(vector as usize) {
                    *slot = gate;
                }
            }
            Call::SetStack { ss, esp, pages } => {
                let selector = u16::try_from(ss).ok().filter(|ss| ss & 3 == u16::from(KERNEL_RING));
                let ss = selector.ok_or(Death::StackSegment(ss))?;
                if pages > STACK_PAGES_MAX {
                    return Err(Death::StackPages(pages));
                }
                self.check_stack(cpu, esp, pages)?;
                self.stack = KernelStack { ss, esp };
            }
            Call::Ts(on) => cpu.state.cr0.set(Cr0::TS, on),
            Call::SetClockevent { nanoseconds } => self.clock.set(nanoseconds.into()),
            Call::Halt => self.halted = true,
            Call::NewPgtable { top } => self.new_pgtable(cpu, top)?,
            Call::SetPte { at, entry, .. } => self.set_pte(cpu, at, entry)?,
            Call::SetPgd { index, .. } => self.set_pgd(cpu, index)?,
            Call::FlushTlb(_) | Call::SetPmd { .. } => self.flush_tlb(cpu)?,
            Call::Notify { address } => {
                let known = match &self.devices {
                    GuestDevices::Bus(bus) => bus.notify(address.0),
                    GuestDevices::Pci(_) => false,
                };
                if !known {
                    self.console.print(&self.memory, address)?;
                }
            }
            Call::BindDma { .. } | Call::SendDma { .. } => {
                return Err(Death::UnknownCall(words.number));
            }
        }
        Ok(Verdict::Resume)
    }

    /// The old host mapped all of the stack at once: it had to, for the CPU pushed to it.
    fn check_stack(&self, cpu: &mut Vcpu, esp: Virt, pages: u32) -> Result<(), Death> {
        for page in 0..pages {
            let at = esp.0.wrapping_sub(1).wrapping_sub(page.wrapping_mul(PAGE)).into();
            let mut place = cpu.translate_store(at);
            if place.is_err() && cpu.top_level_is_stale() {
                self.flush_tlb(cpu)?;
                place = cpu.translate_store(at);
            }
            if place.is_ok_and(|place| place.0 < self.memory.limit()) {
                continue;
            }
            return Err(Death::StackNotMapped(at));
        }
        Ok(())
    }

    /// What SHUTDOWN means: its text tells a panic from the end of a day.
    fn shutdown(&self, text: Phys, reason: ShutdownReason) -> Result<Ended, Death> {
        let mut bytes = [0; SHUTDOWN_TEXT_BYTES];
        match (reason, self.memory.read(text, &mut bytes)) {
            // Linux restarts without a word as well, and then names where no text is.
            (ShutdownReason::Restart, _) | (_, Ok(())) => {}
            (_, Err(death)) => return Err(death),
        }
        let [bytes @ .., _] = &bytes;
        let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        let text: String = String::from_utf8_lossy(bytes).chars().map(printable).collect();
        let text = text.trim().to_owned();
        tracing::info!(?reason, text, "the guest shuts down");
        Ok(match reason {
            ShutdownReason::Restart => Ended::Restart(text),
            _ if text == POWER_DOWN => Ended::PoweredOff,
            _ => Ended::Panicked(text),
        })
    }
}
