//! Mappings, protections and code that rewrites itself: the MMU seen from user space.

use crate::{Outcome, ensure};
use std::io;
use std::ptr;

/// The size of a page.
pub const PAGE: usize = 4096;

/// Anonymous memory that is unmapped again when dropped.
pub struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    /// Maps `pages` private anonymous pages with `protection`.
    pub fn new(pages: usize, protection: i32) -> Result<Self, String> {
        let len = pages * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(format!("mmap of {pages} pages: {}", io::Error::last_os_error()));
        }
        Ok(Self { start: start.cast(), len })
    }

    /// The address of the first byte.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Changes the protection of all pages.
    pub fn protect(&self, protection: i32) -> Outcome {
        // SAFETY: the range is exactly this mapping, to which no references are held.
        let result = unsafe { libc::mprotect(self.start.cast(), self.len, protection) };
        ensure!(result == 0, "mprotect: {}", io::Error::last_os_error());
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is exactly this mapping, and nobody can use it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// Maps, touches, remaps and unmaps 8 MiB, so that page tables come and go.
pub fn mapping() -> Outcome {
    const PAGES: usize = 2048;
    for round in 0..3u8 {
        let memory = Mapping::new(PAGES, libc::PROT_READ | libc::PROT_WRITE)?;
        for page in 0..PAGES {
            // SAFETY: within the mapping.
            unsafe {
                let byte = memory.start().add(page * PAGE);
                ensure!(byte.read_volatile() == 0, "page {page} was not zero in round {round}");
                byte.write_volatile(page as u8 ^ round);
            }
        }
        for page in (0..PAGES).rev() {
            // SAFETY: within the mapping.
            let got = unsafe { memory.start().add(page * PAGE).read_volatile() };
            ensure!(got == page as u8 ^ round, "page {page} lost its byte in round {round}");
        }
    }

    // A hole in the middle of a mapping leaves the two sides alone.
    let memory = Mapping::new(3, libc::PROT_READ | libc::PROT_WRITE)?;
    // SAFETY: the middle page belongs to the mapping; only the outer two are used afterwards.
    unsafe {
        memory.start().write_volatile(1);
        memory.start().add(2 * PAGE).write_volatile(3);
        ensure!(
            libc::munmap(memory.start().add(PAGE).cast(), PAGE) == 0,
            "munmap of a hole failed"
        );
        ensure!(memory.start().read_volatile() == 1, "the page before the hole changed");
        ensure!(
            memory.start().add(2 * PAGE).read_volatile() == 3,
            "the page after the hole changed"
        );
        let mut residency = 0u8;
        let in_hole = libc::mincore(memory.start().add(PAGE).cast(), PAGE, &mut residency);
        ensure!(in_hole == -1, "the hole is still mapped");
    }
    Ok(())
}

/// Read-only memory refuses writes (asked through the kernel, which answers `EFAULT`), and
/// takes them again once allowed: stale translations would show here.
pub fn protection() -> Outcome {
    let memory = Mapping::new(1, libc::PROT_READ | libc::PROT_WRITE)?;
    for round in 0..100u8 {
        // SAFETY: within the mapping, which is writable now.
        unsafe { memory.start().write_volatile(round) };
        memory.protect(libc::PROT_READ)?;
        // Reading the time into a read-only page must fail with EFAULT, as a syscall (the
        // vDSO would fault for real).
        // SAFETY: the kernel checks the destination; that is the point.
        let result = unsafe {
            libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, memory.start())
        };
        let error = io::Error::last_os_error().raw_os_error();
        ensure!(
            result == -1 && error == Some(libc::EFAULT),
            "the kernel wrote to a read-only page in round {round}"
        );
        // SAFETY: readable.
        let got = unsafe { memory.start().read_volatile() };
        ensure!(got == round, "the byte changed while the page was read-only");
        memory.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    }
    Ok(())
}

/// Writes a function, calls it, rewrites it in place, calls it again: on one page that stays
/// writable and executable, then with the protection going back and forth.
pub fn self_modifying_code() -> Outcome {
    /// `mov eax, value; ret`.
    fn code(value: u32) -> [u8; 6] {
        let [a, b, c, d] = value.to_le_bytes();
        [0xb8, a, b, c, d, 0xc3]
    }
    let memory = Mapping::new(2, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)?;
    // The second copy of the code crosses the boundary between the two pages.
    for at in [64, PAGE - 3] {
        // SAFETY: within the mapping; the bytes there are a complete function whenever it is called.
        unsafe {
            let place = memory.start().add(at);
            let function: extern "C" fn() -> u32 = std::mem::transmute(place);
            for value in 0..2000u32 {
                ptr::copy_nonoverlapping(code(value).as_ptr(), place, 6);
                let got = function();
                ensure!(got == value, "rewritten code at {at} returned {got}, not {value}");
            }
            // Now only one byte of the immediate is changed, by a narrow store.
            for value in 0..200u8 {
                place.add(1).write_volatile(value);
                ensure!(function() as u8 == value, "a one-byte patch at {at} was not seen");
            }
        }
    }
    for value in 0..50u32 {
        memory.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: within the mapping, writable now, executable when called.
        let got = unsafe {
            ptr::copy_nonoverlapping(code(!value).as_ptr(), memory.start(), 6);
            memory.protect(libc::PROT_READ | libc::PROT_EXEC)?;
            let function: extern "C" fn() -> u32 = std::mem::transmute(memory.start());
            function()
        };
        ensure!(got == !value, "code written before mprotect returned {got:#x}");
    }
    // A loop whose own body is patched while it runs: it adds 1 four times, then 16 twice.
    // The store and the patched `add` are in the same stretch of straight code.
    let patching_loop: [u8; 30] = [
        0x31, 0xc0, // xor eax, eax
        0xb9, 0x06, 0x00, 0x00, 0x00, // mov ecx, 6
        0x83, 0xf9, 0x02, // again: cmp ecx, 2
        0x75, 0x07, // jne over
        0xc6, 0x05, 0x02, 0x00, 0x00, 0x00,
        0x10, // mov byte ptr [rip + 2], 16: the immediate below
        0x83, 0xc0, 0x01, // over: add eax, 1
        0xff, 0xc9, // dec ecx
        0x75, 0xed, // jnz again
        0xc3, 0x90, 0x90, 0x90, // ret
    ];
    memory.protect(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)?;
    // SAFETY: within the mapping; the bytes are the function in the comments above.
    let got = unsafe {
        ptr::copy_nonoverlapping(patching_loop.as_ptr(), memory.start().add(512), 30);
        let function: extern "C" fn() -> u32 = std::mem::transmute(memory.start().add(512));
        function()
    };
    ensure!(got == 4 + 2 * 16, "the loop that patches itself returned {got}, not 36");
    Ok(())
}
