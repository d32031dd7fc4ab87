//! Memory for generated code, never writable and executable through one mapping.
//!
//! Anonymous shared memory is mapped twice: once to write, once to execute. Whoever finds
//! a way to write through the first cannot run what lies there without knowing where
//! the second is, and nothing is ever remapped while code runs. It is no file of memfd_create,
//! because perf(1) looks for the names of code only where no file is. The stubs of
//! [`crate::native`] and the blocks of [`crate::translate`] live in such memory.

use std::arch::asm;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

/// A stretch of code memory. Pages are only taken from the host as they fill.
#[derive(Debug)]
pub(crate) struct CodeMemory {
    writable: *mut u8,
    executable: *mut u8,
    capacity: usize,
}

// SAFETY: the mappings belong to this value alone and are not tied to a thread.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Reserves `capacity` bytes of address space, twice.
    ///
    /// # Errors
    /// The host's, when it has no memory or forbids executable mappings.
    pub(crate) fn new(capacity: usize) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nobody's memory.
        let first = unsafe { libc::mmap(ptr::null_mut(), capacity, libc::PROT_READ, flags, -1, 0) };
        let writable = mapped(first)?;
        // SAFETY: the mapping just made. Moving none of its bytes elsewhere leaves it where it
        // is and maps the pages a second time (mremap(2) on shareable mappings).
        let second = unsafe { libc::mremap(first, 0, capacity, libc::MREMAP_MAYMOVE) };
        let executable = match mapped(second) {
            Ok(at) => at,
            Err(error) => {
                // SAFETY: the mapping made above, of which no pointer is left.
                unsafe { libc::munmap(first, capacity) };
                return Err(error);
            }
        };
        // From here on both are given back when this value is dropped.
        let memory = Self { writable, executable, capacity };
        for (at, protection) in [
            (first, libc::PROT_READ | libc::PROT_WRITE),
            (second, libc::PROT_READ | libc::PROT_EXEC),
        ] {
            // SAFETY: our own mapping, into which nobody has a pointer yet.
            if unsafe { libc::mprotect(at, capacity, protection) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(memory)
    }

    /// Bytes reserved.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Where the byte at `offset` is executed.
    pub(crate) fn address(&self, offset: usize) -> *mut u8 {
        self.executable.wrapping_add(offset)
    }

    /// The `len` bytes at `offset`; none if they are not all there.
    pub(crate) fn read(&self, offset: usize, len: usize) -> &[u8] {
        if !self.has(offset, len) {
            return &[];
        }
        // SAFETY: the range was just found to lie within the readable mapping, which lives
        // as long as this value; nobody writes to its pages while the value is borrowed.
        unsafe { std::slice::from_raw_parts(self.executable.add(offset), len) }
    }

    /// Writes `code` at `offset`; says whether there was room.
    #[must_use]
    pub(crate) fn write(&mut self, offset: usize, code: &[u8]) -> bool {
        let fits = self.has(offset, code.len());
        if fits {
            // SAFETY: the range was just found to lie within the writable mapping, which
            // is this value's own; nobody has a reference into it.
            unsafe {
                let to = self.writable.add(offset);
                ptr::copy_nonoverlapping(code.as_ptr(), to, code.len());
            }
        }
        fits
    }

    /// Writes two bytes at `offset`, which is aligned, where others may be executing: they meet
    /// the old ones or the new ones. Says whether there was room.
    #[must_use]
    pub(crate) fn store_u16(&mut self, offset: usize, value: u16) -> bool {
        let Some(place) = self.aligned(offset) else { return false };
        // SAFETY: as `aligned` says; whoever else of this process reads there has this value
        // borrowed, or executes it.
        unsafe { AtomicU16::from_ptr(place) }.store(value, Ordering::Release);
        true
    }

    /// The same for four bytes.
    #[must_use]
    pub(crate) fn store_u32(&mut self, offset: usize, value: u32) -> bool {
        let Some(place) = self.aligned(offset) else { return false };
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(place) }.store(value, Ordering::Release);
        true
    }

    /// Whether the `len` bytes at `offset` are there.
    fn has(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.capacity)
    }

    /// Where a `T` at `offset` is written: all of it inside the mapping, and aligned, as both begin
    /// with a page. `None` if it would not be.
    fn aligned<T>(&self, offset: usize) -> Option<*mut T> {
        let fits = offset.is_multiple_of(align_of::<T>()) && self.has(offset, size_of::<T>());
        fits.then(|| self.writable.wrapping_add(offset).cast())
    }
}

/// Has this processor forget what it has fetched of code until now: another thread may have changed
/// that (SDM vol. 3, 9.1.3). IRET does, and unlike CPUID costs no exit where the host is a guest.
pub(crate) fn serialize() {
    // SAFETY: returns to the next instruction with the stack pointer, the flags and the segments
    // that there are; what it pushes is taken off again by that. There is no shadow stack, which
    // would want to know of it: only programs have one that are built for that.
    unsafe {
        asm!(
            "mov {old}, rsp",
            "mov {segment:e}, ss",
            "push {segment}",
            "push {old}",
            "pushfq",
            "mov {segment:e}, cs",
            "push {segment}",
            "lea {segment}, [rip + 2f]",
            "push {segment}",
            "iretq",
            "2:",
            old = out(reg) _,
            segment = out(reg) _,
        );
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings are this value's own; what was made of them dies with
        // the cache that owns both.
        unsafe {
            libc::munmap(self.writable.cast(), self.capacity);
            libc::munmap(self.executable.cast(), self.capacity);
        }
    }
}

/// What mmap and mremap have returned.
fn mapped(at: *mut libc::c_void) -> io::Result<*mut u8> {
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at.cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_at_one_address_is_executed_at_another() {
        let mut memory = CodeMemory::new(1 << 16).unwrap();
        // mov eax, edi; inc eax; ret
        let code = [0x89, 0xf8, 0xff, 0xc0, 0xc3];
        assert!(memory.write(8, &code) && !memory.write((1 << 16) - 4, &code));
        assert_eq!(memory.read(8, 5), code);
        assert!(memory.read(usize::MAX, 5).is_empty() && memory.read(1 << 16, 1).is_empty());
        // SAFETY: a function of this convention, just written.
        let next: extern "sysv64" fn(u32) -> u32 =
            unsafe { std::mem::transmute(memory.address(8)) };
        assert_eq!(next(41), 42);
    }

    #[test]
    fn code_that_runs_is_changed_as_a_whole_where_it_is_aligned() {
        let mut memory = CodeMemory::new(1 << 16).unwrap();
        assert!(memory.store_u16(2, 0x1234) && memory.store_u32(4, 0x9abc_5678));
        assert_eq!(memory.read(2, 6), [0x34, 0x12, 0x78, 0x56, 0xbc, 0x9a]);
        assert!(!memory.store_u16(3, 0) && !memory.store_u32(6, 0));
        assert!(!memory.store_u16(1 << 16, 0) && !memory.store_u32(usize::MAX - 3, 0));
        // Whatever it does, everything else is as it was.
        let flags = || {
            let flags: u64;
            // SAFETY: reads the flags.
            unsafe { asm!("pushfq", "pop {}", out(reg) flags) };
            flags
        };
        let before = flags();
        serialize();
        assert_eq!((before ^ flags()) & 0x400, 0);
    }

    #[test]
    fn nothing_is_both_writable_and_executable() {
        let memory = CodeMemory::new(1 << 16).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let permissions = |at: *mut u8| {
            let start = format!("{:x}-", at as usize);
            let line = maps.lines().find(|line| line.starts_with(&start)).unwrap().to_owned();
            line.split(' ').nth(1).unwrap().to_owned()
        };
        assert_eq!(permissions(memory.writable), "rw-s");
        assert_eq!(permissions(memory.executable), "r-xs");
    }
}
