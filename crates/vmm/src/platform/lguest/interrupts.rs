//! Delivering interrupts by a flag that the guest changes without a word.
//!
//! Bit 9 of `irq_enabled` decides; masks are words in memory as well. Guests of V1 and V2
//! never look whether an interrupt waits, and in V3 to V5 only one of two ways of enabling
//! them does. So nothing relies on the guest: an interrupt that cannot be delivered for the
//! moment makes the vCPU look again after every block of code, and after many of those,
//! or if the guest has masked it, by the clock.

use std::time::Duration;

use lguest_abi::shared_data::NoIrqWindow;
use lguest_abi::traps::{irq_vector, next_irq};
use softcpu::{Vcpu, Verdict};

use super::init::now;
use super::{Death, Lguest};

/// How often in a row the vCPU looks after each block: kernels keep interrupts off for
/// less than that.
const RETRIES: u32 = 10_000;
/// How long it takes the clock to make it look.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

impl Lguest {
    /// Delivers the lowest interrupt that may be, and says whether the guest runs or waits.
    pub(super) fn deliver_interrupts(&mut self, cpu: &mut Vcpu) -> Result<Verdict, Death> {
        if self.stopped {
            return Ok(Verdict::Halt);
        }
        let pending = self.lines.pending() as u32;
        if pending == 0 && !self.halted {
            self.retries = 0;
            return Ok(Verdict::Resume);
        }
        let Some(session) = &self.session else { return Ok(Verdict::Resume) };
        let data = session.data.clone();
        let blocked = data.blocked()?;
        let Some(irq) = next_irq(pending, blocked) else {
            if pending != 0 {
                self.clock.look_again_in(LOOK_AGAIN);
            }
            return Ok(if self.halted { Verdict::Halt } else { Verdict::Resume });
        };
        if self.halted {
            // `sti; hlt`, in this guest's words.
            data.enable_interrupts(true)?;
            self.halted = false;
        }
        let window = self.window_at(cpu);
        if matches!(window, Some(NoIrqWindow::Range { .. })) {
            self.look_again();
            return Ok(Verdict::Resume);
        }
        if !data.interrupts_enabled()? {
            data.set_pending(true)?;
            self.look_again();
            return Ok(Verdict::Resume);
        }
        // Without a gate it stays pending; the call that sets one comes by here.
        let Some(gate) = irq_vector(irq).and_then(|vector| self.gate(vector)) else {
            return Ok(Verdict::Resume);
        };
        self.lines.acknowledge(irq);
        match window {
            Some(NoIrqWindow::Iret(_)) => self.enter_in_place_of_iret(cpu, gate)?,
            _ => self.enter_handler(cpu, gate, None)?,
        }
        data.set_time(now())?;
        self.retries = 0;
        match next_irq(self.lines.pending() as u32, blocked) {
            None => data.set_pending(false)?,
            Some(_) => self.look_again(),
        }
        Ok(Verdict::Resume)
    }

    /// There is an interrupt for which the guest is not ready.
    fn look_again(&mut self) {
        if self.retries < RETRIES {
            self.retries = self.retries.saturating_add(1);
            self.lines.look_again();
        } else {
            self.clock.look_again_in(LOOK_AGAIN);
        }
    }
}
