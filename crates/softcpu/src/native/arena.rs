//! Append-only memory for stubs. [`super::stubs::Maker`] is the only user.

use std::io;

use crate::code_memory::CodeMemory;

/// Stubs start on a boundary the host's fetch unit likes.
const ALIGN: usize = 32;
/// What lies between stubs: `int3`.
const FILLER: u8 = 0xcc;

/// Where a stub begins: takes the register state and the memory operand.
pub(super) type Entry = unsafe extern "sysv64" fn(*mut crate::state::VcpuState, *mut u8);

/// The arena has no room left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

/// Append-only code memory.
#[derive(Debug)]
pub(super) struct Arena {
    memory: CodeMemory,
    used: usize,
    /// Addresses are being used again: the host may have fetched what was there.
    reused: bool,
}

impl Arena {
    /// Reserves `capacity` bytes of address space.
    ///
    /// # Errors
    /// The host's, when it has no memory or forbids executable mappings.
    pub(super) fn new(capacity: usize) -> io::Result<Self> {
        Ok(Self { memory: CodeMemory::new(capacity)?, used: 0, reused: false })
    }

    /// Copies `code` in and returns where to call it.
    ///
    /// # Safety
    /// `code` is a whole function with the calling convention of [`Entry`] that reads
    /// and writes nothing but the state and the memory operand it is given.
    pub(super) unsafe fn push(&mut self, code: &[u8]) -> Result<Entry, Full> {
        let start = self.used;
        let len = code.len().checked_next_multiple_of(ALIGN).ok_or(Full)?;
        let mut padded = code.to_vec();
        padded.resize(len, FILLER);
        if !self.memory.write(start, &padded) {
            return Err(Full);
        }
        // SAFETY: no stub reaches into what was just written: they are all below `used`.
        // The executable address holds what the caller vouches for.
        let entry = unsafe { std::mem::transmute::<*mut u8, Entry>(self.memory.address(start)) };
        self.used = start.saturating_add(len);
        if self.reused {
            // Code was written through another address than it is fetched from: the
            // manual wants a serialising instruction in between (SDM vol. 3, 8.1.3).
            std::arch::x86_64::__cpuid(0);
        }
        Ok(entry)
    }

    /// Forgets all code. The caller forgets every [`Entry`] too.
    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.reused = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr;

    #[test]
    fn code_can_be_called_and_space_runs_out() {
        const CAPACITY: usize = 1 << 16;
        let mut arena = Arena::new(CAPACITY).unwrap();
        // mov qword [rsi], 42; ret
        let code = [0x48, 0xc7, 0x06, 42, 0, 0, 0, 0xc3];
        // SAFETY: stores to its second argument only.
        let entry = unsafe { arena.push(&code) }.unwrap();
        let mut value = 0_u64;
        // SAFETY: the stub ignores the state and stores eight bytes.
        unsafe { entry(ptr::null_mut(), (&raw mut value).cast()) };
        assert_eq!(value, 42);
        // SAFETY: never called.
        assert!(unsafe { arena.push(&[0xc3; CAPACITY]) }.is_err());
        arena.clear();
        // SAFETY: never called.
        assert!(unsafe { arena.push(&[0xc3; CAPACITY]) }.is_ok());
    }
}
