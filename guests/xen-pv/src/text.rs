//! Text that is never writable where it executes: patches go through a second mapping.

use core::arch::x86_64::__cpuid;
use core::cell::UnsafeCell;
use core::sync::atomic::Ordering;

use crate::frames::{PAGE, Page, Tables};
use crate::hypercall;
use pvops::backend::xen::VCPU_INFO;
use pvops::{Spans, Text, TextError};

unsafe extern "C" {
    static text_start: u8;
    static text_end: u8;
}

fn bounds() -> (u64, u64) {
    ((&raw const text_start).addr() as u64, (&raw const text_end).addr() as u64)
}

/// Present, accessible to guests' kernels, accessed: readable and executable.
const CODE: u64 = 0x25;
/// Also writable, and not executable.
const DATA: u64 = 0x67 | 1 << 63;

/// Takes the right to write away from the kernel's text.
pub(crate) fn protect(tables: Tables) {
    let (start, end) = bounds();
    for page in (start..end).step_by(PAGE) {
        // SAFETY: the same frame as before; nobody writes to text.
        unsafe { hypercall::update_va_mapping(page as usize, tables.frames.make(page | CODE)) };
    }
}

/// A page's worth of text at a time, mapped to be written.
pub(crate) struct Alias {
    tables: Tables,
    masked: u8,
}

static WINDOW: Page = Page(UnsafeCell::new([0; PAGE]));

impl Alias {
    pub(crate) fn new(tables: Tables) -> Self {
        Self { tables, masked: 1 }
    }
}

// SAFETY: there is one CPU, and events, which are all that could interrupt it, are masked
// from `stop` to `resume`; that ends with a serializing instruction.
unsafe impl Text for Alias {
    fn covers(&self, address: u64, len: usize) -> Result<(), TextError> {
        let (start, end) = bounds();
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
        for (at, byte) in (address..).zip(bytes) {
            let (page, offset) = (at & !(PAGE as u64 - 1), at as usize % PAGE);
            if at == address || offset == 0 {
                // SAFETY: the window is there to be mapped elsewhere.
                unsafe {
                    hypercall::update_va_mapping(
                        WINDOW.address(),
                        self.tables.frames.make(page | DATA),
                    );
                }
            }
            // SAFETY: within the window, which now is that page of the text.
            unsafe { WINDOW.0.get().cast::<u8>().add(offset).write_volatile(*byte) };
        }
        Ok(())
    }

    fn stop(&mut self, _: Spans<'_>) -> Result<(), TextError> {
        self.masked = VCPU_INFO.upcall_mask.swap(1, Ordering::SeqCst);
        Ok(())
    }

    fn resume(&mut self) {
        __cpuid(0);
        VCPU_INFO.upcall_mask.store(self.masked, Ordering::SeqCst);
    }
}
