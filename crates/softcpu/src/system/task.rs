//! What is left of hardware tasks: the TSS as a place for stack pointers and the I/O
//! permission bitmap.
//!
//! Task *switching* is refused (see [`Refused`](super::Refused)): it ends in `#GP` with
//! the selector of the gate or TSS. Source: SDM vol. 3, chapter 8.

use super::descriptor::Selector;
use crate::exception::Exception;
use crate::state::segment::Access;
use crate::vcpu::{Abort, Vcpu};

/// Offset of the first stack pointer (ESP0 or RSP0) in a 32- or 64-bit TSS.
const STACKS: u64 = 4;
/// Offset of SP0 in a 16-bit TSS.
const STACKS16: u64 = 2;
/// Offset of IST1 in a 64-bit TSS.
const IST: u64 = 0x24;
/// Offset of the I/O map base in a 32- or 64-bit TSS.
const IO_MAP_BASE: u64 = 0x66;

impl Vcpu {
    /// A 32-bit (or, in long mode, 64-bit) TSS and not a 16-bit one.
    fn wide_tss(&self) -> bool {
        // Type bit 3 tells them apart; it is where code and data have CODE.
        self.state.tr.access.contains(Access::CODE)
    }

    fn tss_address(&mut self, offset: u64, bytes: u64) -> Result<u64, Abort> {
        let tr = self.state.tr;
        if offset.wrapping_add(bytes.wrapping_sub(1)) > u64::from(tr.limit) {
            return Err(self.raise(Exception::invalid_tss(Selector(tr.selector).code())));
        }
        Ok(self.wrap_linear(tr.base.wrapping_add(offset)))
    }

    /// The stack (selector and pointer) for privilege level `cpl` outside long mode.
    pub(crate) fn task_stack(&mut self, cpl: u8) -> Result<(Selector, u64), Abort> {
        let level = u64::from(cpl & 3);
        if self.wide_tss() {
            let at = self.tss_address(STACKS.wrapping_add(level << 3), 6)?;
            let pointer = self.read_system::<u32>(at)?;
            let selector = self.read_system::<u16>(self.wrap_linear(at.wrapping_add(4)))?;
            Ok((Selector(selector), u64::from(pointer)))
        } else {
            let at = self.tss_address(STACKS16.wrapping_add(level << 2), 4)?;
            let pointer = self.read_system::<u16>(at)?;
            let selector = self.read_system::<u16>(self.wrap_linear(at.wrapping_add(2)))?;
            Ok((Selector(selector), u64::from(pointer)))
        }
    }

    /// The 64-bit stack pointer for privilege level `cpl`.
    pub(crate) fn task_stack64(&mut self, cpl: u8) -> Result<u64, Abort> {
        let level = u64::from(cpl & 3);
        let at = self.tss_address(STACKS.wrapping_add(level << 3), 8)?;
        self.read_system::<u64>(at)
    }

    /// Entry `ist` (1 to 7) of the interrupt stack table.
    pub(crate) fn interrupt_stack(&mut self, ist: u8) -> Result<u64, Abort> {
        let entry = u64::from(ist.wrapping_sub(1) & 7);
        let at = self.tss_address(IST.wrapping_add(entry << 3), 8)?;
        self.read_system::<u64>(at)
    }

    /// Whether the I/O permission bitmap lets ports `port` to `port + size - 1` through.
    /// Two bytes of it are always read, which is why it ends in a byte of ones.
    pub(crate) fn io_bitmap_allows(&mut self, port: u16, size: u8) -> Result<bool, Abort> {
        let tr = self.state.tr;
        let limit = u64::from(tr.limit);
        if tr.is_unusable() || !self.wide_tss() || limit < IO_MAP_BASE.wrapping_add(1) {
            return Ok(false);
        }
        let base = self.read_system::<u16>(self.wrap_linear(tr.base.wrapping_add(IO_MAP_BASE)))?;
        let at = u64::from(base).wrapping_add(u64::from(port >> 3));
        if at.wrapping_add(1) > limit {
            return Ok(false);
        }
        let bits = self.read_system::<u16>(self.wrap_linear(tr.base.wrapping_add(at)))?;
        let wanted = (1_u16.wrapping_shl(u32::from(size))).wrapping_sub(1);
        Ok(bits.wrapping_shr(u32::from(port & 7)) & wanted == 0)
    }
}
