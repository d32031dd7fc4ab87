//! Memory for generated code, never writable and executable through one mapping.
//!
//! One anonymous file is mapped twice: once to write, once to execute. Whoever finds
//! a way to write through the first cannot run what lies there without knowing where
//! the second is, and nothing is ever remapped while code runs. The stubs of
//! [`crate::native`] and the blocks of [`crate::translate`] live in such memory.

use std::io;
use std::ptr;

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
        let file = anonymous_file(capacity)?;
        let map = |protection| {
            // SAFETY: a fresh shared mapping of our own file at an address of the
            // kernel's choice touches nobody's memory.
            let at = unsafe {
                libc::mmap(ptr::null_mut(), capacity, protection, libc::MAP_SHARED, file.0, 0)
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
                unsafe { libc::munmap(writable.cast(), capacity) };
                return Err(error);
            }
        };
        Ok(Self { writable, executable, capacity })
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
        if offset.checked_add(len).is_none_or(|end| end > self.capacity) {
            return &[];
        }
        // SAFETY: the range was just found to lie within the readable mapping, which lives
        // as long as this value; nobody writes to its pages while the value is borrowed.
        unsafe { std::slice::from_raw_parts(self.executable.add(offset), len) }
    }

    /// Writes `code` at `offset`; says whether there was room.
    #[must_use]
    pub(crate) fn write(&mut self, offset: usize, code: &[u8]) -> bool {
        let fits = offset.checked_add(code.len()).is_some_and(|end| end <= self.capacity);
        if fits {
            // SAFETY: the range was just found to lie within the writable mapping, which
            // is this value's own; nobody has a reference into it.
            unsafe {
                ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(offset), code.len());
            }
        }
        fits
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

/// A file descriptor that is closed when done with: mappings keep the file alive.
struct Descriptor(libc::c_int);

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: our own descriptor, closed once.
        unsafe { libc::close(self.0) };
    }
}

fn anonymous_file(len: usize) -> io::Result<Descriptor> {
    let name = c"lguest-code";
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
        if unsafe { libc::ftruncate(file.0, len as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        return Ok(file);
    }
    Err(io::Error::last_os_error())
}
