//! Kernels of a few bytes, for tests of the Launcher that need a guest but no Linux.
//!
//! Each is a multiboot ELF file: a header, and code that starts in 32-bit protected mode.

use std::path::{Path, PathBuf};

/// Where the file is loaded, header and all.
const BASE: u32 = 0x10_0000;
/// Where the code starts within the file: after ELF header, program header and multiboot header.
const CODE: u32 = 52 + 32 + 12;

/// `cli; hlt`, for ever: uses no processor time.
pub(crate) const SLEEP: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];

/// Writes 0x10 to the debug-exit port, then sleeps.
pub(crate) const DEBUG_EXIT: &[u8] = &[
    0xb0, 0x10, // mov al, 0x10
    0xe6, 0xf4, // out 0xf4, al
    0xfa, 0xf4, 0xeb, 0xfd,
];

/// Asks the keyboard controller for a reset, then sleeps.
pub(crate) const RESET: &[u8] = &[
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xfa, 0xf4, 0xeb, 0xfd,
];

/// Loads an empty interrupt table and executes an undefined instruction.
pub(crate) const TRIPLE_FAULT: &[u8] = &[
    0x6a, 0x00, // push 0
    0x6a, 0x00, // push 0
    0x0f, 0x01, 0x1c, 0x24, // lidt [esp]
    0x0f, 0x0b, // ud2
];

/// Sends back every byte that the serial port receives.
pub(crate) const ECHO: &[u8] = &[
    0xba, 0xfd, 0x03, 0x00, 0x00, // again: mov edx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf6, // jz again
    0xb2, 0xf8, // mov dl, 0xf8
    0xec, // in al, dx
    0xee, // out dx, al
    0xeb, 0xf0, // jmp again
];

/// Writes a kernel with this code into `directory` and returns its path.
pub(crate) fn kernel(directory: &Path, code: &[u8]) -> PathBuf {
    // The code may use a stack, which multiboot does not give: mov esp, BASE.
    let code = [&[0xbc][..], &BASE.to_le_bytes(), code].concat();
    let len = CODE + code.len() as u32;
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    let halves = |file: &mut Vec<u8>, values: &[u16]| {
        values.iter().for_each(|value| file.extend(value.to_le_bytes()));
    };
    let words = |file: &mut Vec<u8>, values: &[u32]| {
        values.iter().for_each(|value| file.extend(value.to_le_bytes()));
    };
    halves(&mut file, &[2, 3]); // executable, 80386
    words(&mut file, &[1, BASE + CODE, 52, 0, 0]); // version, entry, program headers, sections, flags
    halves(&mut file, &[52, 32, 1, 0, 0, 0]); // sizes and counts of the headers
    words(&mut file, &[1, 0, BASE, BASE, len, len, 7, 0x1000]); // load all of it
    let (magic, flags) = (0x1bad_b002_u32, 0u32);
    words(&mut file, &[magic, flags, 0u32.wrapping_sub(magic).wrapping_sub(flags)]);
    assert_eq!(file.len(), CODE as usize);
    file.extend(code);
    let path = directory.join("tiny");
    std::fs::write(&path, file).unwrap();
    path
}
