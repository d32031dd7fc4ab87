//! Backends: who carries the operations out.
//!
//! Each adds its ops to a kernel's [`Bindings`]; what it leaves alone
//! stays native. What they promise for interrupts is the same for all: [`save_fl`] tells
//! in bit 9 whether interrupts are on, [`restore_fl`] and [`irq_enable`] deliver what
//! became pending while they were off, [`irq_disable`] delivers nothing.
//!
//! | backend  | overrides                                       | proved                          |
//! |----------|-------------------------------------------------|---------------------------------|
//! | [`native`] | nothing: the defaults                         | in ring 0 of a software CPU (`tests/proof.rs`) |
//! | [`lguest`] | the interrupt flag                            | against a model of the host (`tests/backends.rs`, 32-bit in `tests/proof.rs`) |
//! | [`xen`]  | the interrupt flag, conversions of page-table entries | under Xen itself: `cargo xtask xen-check` (opt-in: it fetches Debian's Xen and boots it in QEMU); against a model (`tests/backends.rs`, `tests/frames.rs`, 32-bit in `tests/proof.rs`) |
//! | [`vmi`]  | the interrupt flag, 32-bit, as its ROM says     | with a ROM that trashes what its contract allows (`tests/proof.rs`) |
//! | [`vsmp`] | the interrupt flag: IF and AC together          | in ring 0 of a software CPU (`tests/proof.rs`) |
//! | [`kvm`]  | clocks, delays, locks, remote TLB flushes, batches of page-table writes | against a model of the host (`tests/kvm.rs`) |
//!
//! [`save_fl`]: crate::families::irq::save_fl
//! [`restore_fl`]: crate::families::irq::restore_fl
//! [`irq_enable`]: crate::families::irq::irq_enable
//! [`irq_disable`]: crate::families::irq::irq_disable

mod installed;
pub mod kvm;
pub mod lguest;
pub mod native;
pub mod vmi;
pub mod vsmp;
pub mod x86_32;
pub mod xen;

/// RFLAGS.IF: interrupts are on.
pub const IF: usize = 0x200;

/// RFLAGS.AC: alignment check; on vSMP the complement of IF.
pub const AC: usize = 0x4_0000;

use crate::error::BindError;
use crate::families::irq;
use crate::{Binding, Bindings, CalleeSave};

/// The four ops of the interrupt flag, as every backend that overrides them gives them.
#[derive(Clone, Copy, Debug)]
pub struct IrqOps {
    /// See [`irq::save_fl`].
    pub save_fl: Binding<CalleeSave<unsafe extern "sysv64" fn() -> usize>>,
    /// See [`irq::restore_fl`].
    pub restore_fl: Binding<CalleeSave<unsafe extern "sysv64" fn(usize)>>,
    /// See [`irq::irq_disable`].
    pub irq_disable: Binding<CalleeSave<unsafe extern "sysv64" fn()>>,
    /// See [`irq::irq_enable`].
    pub irq_enable: Binding<CalleeSave<unsafe extern "sysv64" fn()>>,
}

impl IrqOps {
    /// Bare hardware's.
    pub const NATIVE: Self = Self {
        save_fl: native::SAVE_FL,
        restore_fl: native::RESTORE_FL,
        irq_disable: native::IRQ_DISABLE,
        irq_enable: native::IRQ_ENABLE,
    };

    /// Adds them to what is bound already.
    ///
    /// # Errors
    /// [`BindError::Twice`] when one of them is.
    pub fn bind(&self, bindings: &mut Bindings<irq::Family>) -> Result<(), BindError> {
        bindings
            .bind(irq::op::SaveFl, self.save_fl)?
            .bind(irq::op::RestoreFl, self.restore_fl)?
            .bind(irq::op::IrqDisable, self.irq_disable)?
            .bind(irq::op::IrqEnable, self.irq_enable)?;
        Ok(())
    }
}
