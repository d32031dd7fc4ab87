//! Delivering interrupts by a flag that the guest changes without a word.
//!
//! A guest that lets interrupts in looks at `irq_pending` and calls, so mostly nobody needs to
//! watch. Where it does not (the `iretq` of a handler) the CPU tells; and for whatever else
//! it may do with plain stores, the clock makes the vCPU look every millisecond, which is
//! what the ABI promises.

use std::mem::offset_of;
use std::time::Duration;

use lguest_abi::long::shared_data::{IRQ_FLAG, SharedData, interrupts_enabled};
use lguest_abi::long::traps::{IRQ_LATENCY_MAX, irq_vector, next_irq};
use softcpu::{Vcpu, Verdict};

use super::calls::field;
use super::{LongDeath, LongGuest};

/// How long it takes the clock to make the vCPU look again.
const LOOK_AGAIN: Duration = Duration::from_nanos(IRQ_LATENCY_MAX);
/// The ring of the guest's kernel.
const KERNEL_RING: u8 = 1;

impl LongGuest {
    /// Delivers the lowest interrupt that may be, and says whether the guest runs or waits.
    pub(super) fn deliver_interrupts(&mut self, cpu: &mut Vcpu) -> Result<Verdict, LongDeath> {
        self.bus.refresh();
        let Some(session) = self.session else { return Ok(Verdict::Resume) };
        let waits = |halted| if halted { Verdict::Halt } else { Verdict::Resume };
        let raised = self.lines.pending();
        if raised == 0 {
            return Ok(waits(self.halted));
        }
        let words = session.greeting.irq_words.0;
        let blocked = self.ram.word64(field(session.data, offset_of!(SharedData, blocked)));
        if raised & (blocked | !self.gated) != 0 {
            // The guest unblocks by a plain store.
            self.clock.look_again_in(LOOK_AGAIN);
        }
        let Some(irq) = next_irq(raised & self.gated, blocked) else {
            self.nothing_waits(cpu, words);
            return Ok(waits(self.halted));
        };
        // HALT has set the flag, so a guest that sleeps comes past here.
        if !interrupts_enabled(self.irq_enabled()) {
            self.something_waits(cpu, words);
            return Ok(Verdict::Resume);
        }
        let Some((vector, gate)) = irq_vector(irq).and_then(|n| Some((n, self.gate(n)?))) else {
            return Ok(waits(self.halted));
        };
        self.halted = false;
        self.lines.acknowledge(irq);
        let returning =
            cpu.state.cpl() == KERNEL_RING && cpu.state.rip == session.greeting.noirq_iret.0;
        if !returning {
            self.push_frame(cpu, vector, None)?;
        }
        self.run_handler(cpu, gate);
        if next_irq(self.lines.pending() & self.gated, blocked).is_none() {
            self.nothing_waits(cpu, words);
        } else if interrupts_enabled(self.irq_enabled()) {
            // By a trap gate: the next one comes upon it at once.
            self.lines.look_again();
        } else {
            self.something_waits(cpu, words);
        }
        Ok(Verdict::Resume)
    }

    fn something_waits(&self, cpu: &mut Vcpu, words: u64) {
        self.ram.set_word32(words.wrapping_add(4), IRQ_FLAG);
        cpu.watch_iret(true);
        self.clock.look_again_in(LOOK_AGAIN);
    }

    fn nothing_waits(&self, cpu: &mut Vcpu, words: u64) {
        self.ram.set_word32(words.wrapping_add(4), 0);
        cpu.watch_iret(false);
    }
}
