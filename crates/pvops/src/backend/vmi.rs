//! VMI: the hypervisor's ROM gives the operations, in 32-bit mode.
//!
//! The change that brought register-saving thunks left open whether VMI's entry points
//! could be called from callee-save sites without one. They can: by VMI's contract
//! (specification 2.0, appendix A) the interrupt calls take their argument in EAX, return
//! in EAX and otherwise change nothing but flags, which is more than a callee-save site
//! asks for. So the ROM's addresses go straight into the slots, and its own word on each
//! call decides what becomes of the sites.

use crate::binding::{Erased, Template};

/// Numbers of VMI calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum Call {
    EnableInterrupts = 29,
    DisableInterrupts = 30,
    GetInterruptMask = 31,
    SetInterruptMask = 32,
    Iret = 33,
    Sysexit = 34,
}

/// What the ROM says of a call: how a site becomes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relocation {
    /// Leave it native.
    None,
    /// A relative call to this address.
    Call(u32),
    /// A relative jump to this address.
    Jump(u32),
    /// Nothing need be done: fill with nops.
    Nop,
}

impl Relocation {
    /// From the ROM's answer: an address, and a type in which 0 to 3 have a meaning.
    #[must_use]
    pub const fn decode(address: u32, kind: u8) -> Option<Self> {
        match kind {
            0 => Some(Self::None),
            1 => Some(Self::Call(address)),
            2 => Some(Self::Jump(address)),
            3 => Some(Self::Nop),
            _ => None,
        }
    }
}

/// The ROM, as the kernel reaches it.
pub trait Rom {
    /// Its answer to `GetRelocationInfo` for a call.
    fn relocation(&self, call: Call) -> Relocation;
}

/// What to bind for a call. `native` serves where the ROM has nothing; `nothing` is the
/// address of a function that does nothing, for sites that are not patched.
#[must_use]
pub fn binding(rom: &impl Rom, call: Call, native: Erased, nothing: u32) -> Erased {
    let called = |address: u32, template| Erased {
        target: core::ptr::without_provenance(address as usize),
        template,
    };
    match rom.relocation(call) {
        Relocation::None => native,
        Relocation::Call(address) | Relocation::Jump(address) => called(address, Template::Call),
        Relocation::Nop => called(nothing, Template::Nop),
    }
}

/// Where ROMs are looked for: physical addresses 0xc0000 to 0xdffff,
pub const SCAN: core::ops::Range<usize> = 0xc_0000..0xe_0000;
/// at multiples of this.
pub const SCAN_STEP: usize = 2048;

/// What the head of a VMI ROM says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Offset of the ROM in what was scanned.
    pub offset: usize,
    /// The ROM's length in bytes.
    pub len: usize,
    /// The API's version: 3 is the one there is.
    pub major: u8,
    /// Its minor version.
    pub minor: u8,
}

/// Looks for a VMI ROM in the bytes at [`SCAN`].
#[must_use]
pub fn find(memory: &[u8]) -> Option<Header> {
    const ROM: [u8; 2] = 0xaa55_u16.to_le_bytes();
    const VMI: [u8; 4] = *b"cVmi";
    (0..memory.len()).step_by(SCAN_STEP).find_map(|offset| {
        let rom = memory.get(offset..)?;
        // Signature, length in units of 512 bytes, entry code; VMI's own from byte 8.
        let &[s0, s1, blocks, _, _, _, _, _, v0, v1, v2, v3, minor, major, ..] = rom else {
            return None;
        };
        let found = [s0, s1] == ROM && [v0, v1, v2, v3] == VMI && major == 3;
        let len = usize::from(blocks) * 512;
        (found && len <= rom.len()).then_some(Header { offset, len, major, minor })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_rom_only_where_one_may_be() {
        let mut memory = [0u8; 8192];
        assert_eq!(find(&memory), None);
        let rom = [0x55, 0xaa, 4, 0, 0, 0, 0, 0, b'c', b'V', b'm', b'i', 0, 3];
        memory[4096 + 512..][..rom.len()].copy_from_slice(&rom);
        assert_eq!(find(&memory), None, "not at a multiple of 2 KiB");
        memory[6144..][..rom.len()].copy_from_slice(&rom);
        let header = Header { offset: 6144, len: 2048, major: 3, minor: 0 };
        assert_eq!(find(&memory), Some(header));
        memory[6144 + 2] = 5;
        assert_eq!(find(&memory), None, "longer than memory");
    }
}
