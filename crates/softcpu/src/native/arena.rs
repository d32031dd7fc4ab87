//! Memory for generated code, never writable and executable through one mapping.
//!
//! One anonymous file is mapped twice: once to write, once to execute. Whoever finds
//! a way to write through the first cannot run what lies there without knowing where
//! the second is, and nothing is ever remapped while code runs. [`super::NativeCache`]
//! is the only user.

use std::io;
use std::ptr;

/// Bytes reserved per vCPU. Pages are only taken from the host as they fill; a
/// distribution's boot and user space need a few thousand stubs of about 100 bytes.
const CAPACITY: usize = 1 << 20;
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
    writable: *mut u8,
    executable: *mut u8,
    used: usize,
    /// Addresses are being used again: the host may have fetched what was there.
    reused: bool,
}

// SAFETY: the mappings belong to this value alone and are not tied to a thread.
unsafe impl Send for Arena {}

impl Arena {
    /// Reserves the address space.
    ///
    /// # Errors
    /// The host's, when it has no memory or forbids executable mappings.
    pub(super) fn new() -> io::Result<Self> {
        let file = anonymous_file()?;
        let map = |protection| {
            // SAFETY: a fresh shared mapping of our own file at an address of the
            // kernel's choice touches nobody's memory.
            let at = unsafe {
                libc::mmap(ptr::null_mut(), CAPACITY, protection, libc::MAP_SHARED, file.0, 0)
            };
            if at == libc::MAP_FAILED {
                Err(io::Error::last_os_error())
            } else {
                Ok(at.cast::<u8>())
            }
        };
        let writable = map(libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = match map(libc::PROT_READ | libc::PROT_EXEC) {
            Ok(at) => at,
            Err(error) => {
                // SAFETY: the mapping made two lines up, of which no pointer is left.
                unsafe { libc::munmap(writable.cast(), CAPACITY) };
                return Err(error);
            }
        };
        Ok(Self { writable, executable, used: 0, reused: false })
    }

    /// Copies `code` in and returns where to call it.
    ///
    /// # Safety
    /// `code` is a whole function with the calling convention of [`Entry`] that reads
    /// and writes nothing but the state and the memory operand it is given.
    pub(super) unsafe fn push(&mut self, code: &[u8]) -> Result<Entry, Full> {
        let start = self.used;
        let len = code.len().checked_next_multiple_of(ALIGN).ok_or(Full)?;
        let end = start.checked_add(len).filter(|end| *end <= CAPACITY).ok_or(Full)?;
        // SAFETY: `start..end` lies within both mappings and no stub reaches into it:
        // they are all below `used`. The executable address holds what the caller
        // vouches for once the copy is done.
        let entry = unsafe {
            let to = self.writable.add(start);
            ptr::write_bytes(to, FILLER, len);
            ptr::copy_nonoverlapping(code.as_ptr(), to, code.len());
            std::mem::transmute::<*mut u8, Entry>(self.executable.add(start))
        };
        self.used = end;
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

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both mappings are this value's own; entries die with the cache that
        // owns both.
        unsafe {
            libc::munmap(self.writable.cast(), CAPACITY);
            libc::munmap(self.executable.cast(), CAPACITY);
        }
    }
}

/// A file descriptor that is closed when done with: mappings keep the file alive.
struct Descriptor(libc::c_int);

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: our own descriptor, closed once.
        unsafe { libc::close(self.0) };
    }
}

fn anonymous_file() -> io::Result<Descriptor> {
    let name = c"lguest-stubs";
    // Newer kernels want to be told that the file is for code; older ones do not know
    // the flag and answer EINVAL.
    for flags in [libc::MFD_CLOEXEC | libc::MFD_EXEC, libc::MFD_CLOEXEC] {
        // SAFETY: a valid C string and flags; makes a new descriptor.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd < 0 {
            continue;
        }
        let file = Descriptor(fd);
        // SAFETY: our own descriptor.
        if unsafe { libc::ftruncate(file.0, CAPACITY as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        return Ok(file);
    }
    Err(io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_can_be_called_and_space_runs_out() {
        let mut arena = Arena::new().unwrap();
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
