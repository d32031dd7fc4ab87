//! Hypercalls: one at a time from registers, or many from the ring.
//!
//! The ring is carried out before every direct call and at no other time, so what waits in
//! it has not happened, by the guest's own wish. No call reports anything: it is carried
//! out, or the guest ends.

use std::mem::offset_of;

use lguest_abi::long::call::{BadCall, Base, Call, CallWords, ShutdownReason, number};
use lguest_abi::long::shared_data::{Greeting, IRQ_FLAG, SharedData, ring_waiting, slot_at};
use lguest_abi::long::traps::{FIRST_IRQ_VECTOR, IRQS, NO_GATE};
use lguest_abi::long::{Phys, Virt, Wire, call, feature};
use softcpu::state::control::Cr0;
use softcpu::state::regs::Gpr;
use softcpu::state::segment::SegReg;
use softcpu::{Vcpu, Verdict};

use super::{Ended, Gate, LongDeath, LongGuest, Session};

/// What the host offers.
pub const FEATURES: u64 = feature::BUS | feature::CLOCK;

/// The physical address of a field of the page at `data`, which LGUEST_INIT has checked.
pub(super) const fn field(data: Phys, offset: usize) -> u64 {
    data.0.wrapping_add(offset as u64)
}

impl LongGuest {
    /// A direct call; RIP is behind the instruction.
    pub(super) fn hypercall(&mut self, cpu: &mut Vcpu) -> Result<Verdict, LongDeath> {
        let reg = |which| cpu.state.reg(which);
        let args = [Gpr::Rdi, Gpr::Rsi, Gpr::Rdx, Gpr::Rcx].map(reg);
        let words = CallWords { number: reg(Gpr::Rax), args };
        self.carry_out_ring(cpu)?;
        let call = Call::decode(&words);
        if self.session.is_none() && !call.is_ok_and(|call| call.may_come_first()) {
            // A call that does not exist is the greater mistake.
            return match call {
                Err(unknown @ BadCall::Unknown(_)) => Err(unknown.into()),
                _ => Err(LongDeath::BeforeInit(words.number)),
            };
        }
        self.perform(cpu, call?)
    }

    /// Carries out what waits in the ring: at most all of its slots once.
    fn carry_out_ring(&mut self, cpu: &mut Vcpu) -> Result<(), LongDeath> {
        let Some(Session { data, head, .. }) = self.session else { return Ok(()) };
        let tail = self.ram.word32(field(data, offset_of!(SharedData, ring_tail)));
        let waiting = ring_waiting(head, tail)
            .ok_or_else(|| LongDeath::Ring { waiting: tail.wrapping_sub(head) })?;
        if waiting == 0 {
            return Ok(());
        }
        for n in 0..waiting {
            let at = Phys(field(data, slot_at(head.wrapping_add(n))));
            let mut bytes = [0; size_of::<[u64; 5]>()];
            self.ram.read("the ring", at, &mut bytes)?;
            let [number, args @ ..] = <[u64; 5]>::read(&bytes).unwrap_or_default();
            self.perform(cpu, Call::decode_queued(&CallWords { number, args })?)?;
        }
        if let Some(session) = &mut self.session {
            session.head = tail;
        }
        self.ram.set_word32(field(data, offset_of!(SharedData, ring_head)), tail);
        Ok(())
    }

    fn perform(&mut self, cpu: &mut Vcpu, call: Call) -> Result<Verdict, LongDeath> {
        tracing::trace!(?call, "hypercall");
        match call {
            // They bring the guest here, and that is all they are for.
            Call::FlushAsync | Call::SendInterrupts => {}
            Call::Init { data } => self.init(data)?,
            Call::Shutdown { text, len, reason } => {
                let ended = self.shutdown(text, len, reason)?;
                (self.ended)(ended);
                return Ok(Verdict::Stop);
            }
            Call::NewPgtable { top } => self.new_pgtable(cpu, top)?,
            Call::FlushTlb(_) => cpu.flush_tlb(),
            Call::LoadIdtEntry { vector, handler, kind } => {
                self.load_gate(vector, handler.map(|handler| Gate { handler, kind }));
            }
            Call::SetStack { rsp } => self.stack = rsp,
            Call::Ts(on) => cpu.state.cr0.set(Cr0::TS, on),
            Call::SetClockevent { nanoseconds } => self.clock.set(nanoseconds),
            Call::Halt => self.halt()?,
            Call::SetPte { top, at, entry: _ } => {
                if self.concerns(cpu, top, at) {
                    cpu.flush_page(at.0);
                }
            }
            Call::SetDirectory { top, at, level: _ } => {
                if self.concerns(cpu, top, at) {
                    cpu.flush_tlb();
                }
            }
            Call::SetBase { base, value } => {
                let segment = match base {
                    Base::Fs => SegReg::Fs,
                    Base::Gs => SegReg::Gs,
                };
                cpu.state.segment_mut(segment).base = value.0;
            }
            Call::Notify { device, queue } => self.bus.notify(device, queue)?,
            Call::FlushPage { at } => cpu.flush_page(at.0),
            Call::SetStatus { device, status } => self.bus.set_status(device, status)?,
            Call::Console { text, len } => {
                let text = self.text("CONSOLE", text, len)?;
                self.print(&text);
            }
            Call::SetSyscall { entry } => self.syscall = entry,
        }
        Ok(Verdict::Resume)
    }

    fn init(&mut self, data: Phys) -> Result<(), LongDeath> {
        if self.session.is_some() {
            return Err(LongDeath::SecondInit);
        }
        let greeting = Greeting::read(data, &self.ram.page(data), self.ram.end(), FEATURES)?;
        let put = |offset, value| self.ram.set_word64(field(data, offset), value);
        put(offset_of!(SharedData, start_seconds), self.epoch.wall.as_secs());
        put(offset_of!(SharedData, start_nanoseconds), self.epoch.wall.subsec_nanos().into());
        // Its version is even, and it is never written again.
        let clock = self.epoch.time_info(self.epoch.tsc.wrapping_neg());
        let at = Phys(field(data, offset_of!(SharedData, clock)));
        self.ram.write(call::name(number::LGUEST_INIT).unwrap_or_default(), at, &clock)?;
        let tail = field(data, offset_of!(SharedData, ring_tail));
        let head = self.ram.word32(tail);
        self.ram.set_word32(field(data, offset_of!(SharedData, ring_head)), head);
        tracing::info!(?greeting, "a guest of the 64-bit lguest ABI introduces itself");
        self.session = Some(Session { data, greeting, head });
        Ok(())
    }

    fn load_gate(&mut self, vector: u8, gate: Option<Gate>) {
        if NO_GATE.contains(&vector) {
            return;
        }
        if let Some(slot) = self.gates.get_mut(usize::from(vector)) {
            *slot = gate;
        }
        if let Some(irq) = vector.checked_sub(FIRST_IRQ_VECTOR).filter(|irq| *irq < IRQS) {
            let bit = 1_u64.wrapping_shl(irq.into());
            self.gated = if gate.is_some() { self.gated | bit } else { self.gated & !bit };
        }
    }

    fn halt(&mut self) -> Result<(), LongDeath> {
        let Some(Session { data, greeting, .. }) = self.session else { return Ok(()) };
        if self.ram.word64(field(data, offset_of!(SharedData, blocked))) == u64::MAX {
            return Err(LongDeath::HaltForEver);
        }
        self.ram.set_word32(greeting.irq_words.0, IRQ_FLAG);
        self.halted = true;
        Ok(())
    }

    /// Whether a change of `at`'s mapping under `top` may be cached.
    fn concerns(&self, cpu: &Vcpu, top: Phys, at: Virt) -> bool {
        let shared = self.session.is_none_or(|session| at >= session.greeting.kernel_address);
        shared || cpu.state.cr3 == top.0
    }

    /// A text of at most 4096 bytes: the decoder has seen to that.
    fn text(&self, call: &'static str, at: Phys, len: u64) -> Result<Vec<u8>, LongDeath> {
        let mut text = vec![0; usize::try_from(len).unwrap_or(0)];
        self.ram.read(call, at, &mut text)?;
        Ok(text)
    }

    fn print(&mut self, text: &[u8]) {
        // A console that cannot be written to is not the guest's fault.
        if let Err(error) = self.console.write_all(text).and_then(|()| self.console.flush()) {
            tracing::debug!(%error, "console output is lost");
        }
    }

    fn shutdown(
        &mut self,
        text: Phys,
        len: u64,
        reason: ShutdownReason,
    ) -> Result<Ended, LongDeath> {
        let bytes = self.text("SHUTDOWN", text, len)?;
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        let words: String = String::from_utf8_lossy(&bytes).chars().map(printable).collect();
        let words = words.trim().to_owned();
        tracing::info!(?reason, words, "the guest shuts down");
        if !words.is_empty() && reason != ShutdownReason::Panic {
            self.print(format!("{words}\n").as_bytes());
        }
        Ok(match reason {
            ShutdownReason::PowerOff => Ended::PoweredOff,
            ShutdownReason::Restart => Ended::Restart(words),
            ShutdownReason::Panic => Ended::Panicked(words),
            ShutdownReason::Exit(status) => Ended::Exited(status),
        })
    }
}
