//! The kernel's text, for patching: never writable where it executes, so written through the
//! direct map.

use core::arch::x86_64::__cpuid;

use pvops::{Spans, Text, TextError};

use crate::boot::{direct, phys_of};
use crate::irq::{self, Flags};

unsafe extern "C" {
    static text_start: u8;
    static text_end: u8;
}

/// The whole text.
#[derive(Debug, Default)]
pub(crate) struct KernelText(Option<Flags>);

// SAFETY: there is one CPU, and interrupts, which are all that could come in between, are off
// from `stop` to `resume`, which ends with a serializing instruction.
unsafe impl Text for KernelText {
    fn covers(&self, address: u64, len: usize) -> Result<(), TextError> {
        let start = (&raw const text_start).addr() as u64;
        let end = (&raw const text_end).addr() as u64;
        let inside = address >= start && address.checked_add(len as u64).is_some_and(|e| e <= end);
        if inside { Ok(()) } else { Err(TextError::OutsideWindow) }
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), TextError> {
        let from = core::ptr::with_exposed_provenance::<u8>(address as usize);
        // SAFETY: `covers` accepted it, and text can be read.
        unsafe { from.copy_to(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), TextError> {
        let at = core::ptr::with_exposed_provenance::<u8>(address as usize);
        // SAFETY: `covers` accepted it: text, whose memory the direct map has as well.
        unsafe { direct(phys_of(at)).copy_from(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn stop(&mut self, _: Spans<'_>) -> Result<(), TextError> {
        self.0 = Some(irq::save());
        irq::disable();
        Ok(())
    }

    fn resume(&mut self) {
        __cpuid(0);
        if let Some(flags) = self.0.take() {
            irq::restore(flags);
        }
    }
}
