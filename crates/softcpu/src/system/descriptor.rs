//! Selectors and descriptors: finding them in the GDT or LDT and taking them apart.
//!
//! Source: SDM vol. 3, 3.4.2 (selectors), 3.4.5 and 3.5 (descriptors), 5.8.3 (gates).

use crate::addr::GuestVirtAddr;
use crate::exception::Exception;
use crate::mmu::{Access as MemAccess, View};
use crate::state::segment::{Access, Segment};
use crate::vcpu::{Abort, Vcpu};

/// A segment selector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Selector(pub(crate) u16);

impl Selector {
    /// Requested privilege level.
    pub(crate) const fn rpl(self) -> u8 {
        (self.0 & 3) as u8
    }

    /// The same selector with another RPL.
    pub(crate) const fn with_rpl(self, rpl: u8) -> Self {
        Self(self.0 & !3 | (rpl & 3) as u16)
    }

    /// GDT entry 0, whatever the RPL.
    pub(crate) const fn is_null(self) -> bool {
        self.0 & !3 == 0
    }

    /// Whether it names an entry of the LDT.
    pub(crate) const fn is_local(self) -> bool {
        self.0 & 4 != 0
    }

    /// Byte offset into its table.
    pub(crate) const fn offset(self) -> u64 {
        (self.0 & !7) as u64
    }

    /// As it appears in an error code: without RPL.
    pub(crate) const fn code(self) -> u32 {
        (self.0 & !3) as u32
    }
}

/// System descriptor types (SDM vol. 3, table 3-2). In long mode only `LDT`, the
/// "32-bit" TSS and gates exist, and those are 64 bits wide.
pub(crate) mod system_type {
    #![allow(missing_docs, reason = "the manual's own names")]
    pub(crate) const TSS16_AVAILABLE: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL_GATE16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INTERRUPT_GATE16: u8 = 6;
    pub(crate) const TRAP_GATE16: u8 = 7;
    pub(crate) const TSS_AVAILABLE: u8 = 9;
    pub(crate) const TSS_BUSY: u8 = 11;
    pub(crate) const CALL_GATE: u8 = 12;
    pub(crate) const INTERRUPT_GATE: u8 = 14;
    pub(crate) const TRAP_GATE: u8 = 15;
}

/// An entry of a descriptor table, or of the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// The eight bytes that every descriptor has.
    pub(crate) raw: u64,
    /// The second half of a 16-byte descriptor.
    pub(crate) high: u64,
    /// Its linear address, for setting accessed and busy bits.
    pub(crate) at: u64,
}

impl Descriptor {
    /// Access rights.
    pub(crate) const fn access(&self) -> Access {
        Access::from_bits_retain(((self.raw >> 40) & 0xf0ff) as u32)
    }

    pub(crate) const fn dpl(&self) -> u8 {
        ((self.raw >> 45) & 3) as u8
    }

    pub(crate) const fn is_present(&self) -> bool {
        self.access().contains(Access::PRESENT)
    }

    /// Code or data, not a system segment or gate.
    pub(crate) const fn is_segment(&self) -> bool {
        self.access().contains(Access::CODE_OR_DATA)
    }

    pub(crate) const fn is_code(&self) -> bool {
        self.is_segment() && self.access().contains(Access::CODE)
    }

    pub(crate) const fn is_conforming(&self) -> bool {
        self.is_code() && self.access().contains(Access::DOWN_OR_CONFORMING)
    }

    /// Writable data: what a stack must be.
    pub(crate) const fn is_writable_data(&self) -> bool {
        self.is_segment()
            && !self.access().contains(Access::CODE)
            && self.access().contains(Access::WRITE_OR_READ)
    }

    /// Data, or code that may be read.
    pub(crate) const fn is_readable(&self) -> bool {
        self.is_segment()
            && (!self.access().contains(Access::CODE)
                || self.access().contains(Access::WRITE_OR_READ))
    }

    /// The type of a system descriptor; `None` for code and data.
    pub(crate) const fn system_type(&self) -> Option<u8> {
        if self.is_segment() { None } else { Some(((self.raw >> 40) & 15) as u8) }
    }

    /// Whether a code segment is a valid 64-bit one (L set and D clear).
    pub(crate) const fn is_long_code(&self) -> bool {
        self.access().contains(Access::LONG) && !self.access().contains(Access::BIG)
    }

    /// L and D both set: reserved in long mode.
    pub(crate) const fn is_long_and_big(&self) -> bool {
        self.access().contains(Access::LONG) && self.access().contains(Access::BIG)
    }

    /// The segment register contents it stands for; the accessed bit reads as set.
    pub(crate) const fn segment(&self, selector: Selector) -> Segment {
        let mut segment = Segment::from_descriptor(selector.0, self.raw);
        if self.is_segment() {
            segment.access = segment.access.union(Access::ACCESSED);
        }
        segment
    }

    /// The same for an LDT or TSS descriptor: in long mode the base is 64 bits wide.
    pub(crate) const fn system_segment(&self, selector: Selector) -> Segment {
        let mut segment = Segment::from_descriptor(selector.0, self.raw);
        segment.base |= (self.high & 0xffff_ffff) << 32;
        segment
    }

    /// The code segment a gate leads to.
    pub(crate) const fn gate_selector(&self) -> Selector {
        Selector((self.raw >> 16) as u16)
    }

    /// The entry point a gate leads to: 16, 32 or 64 bits wide.
    pub(crate) const fn gate_offset(&self, wide: bool) -> u64 {
        let low = self.raw & 0xffff;
        if wide { low | (self.raw >> 48) << 16 | (self.high & 0xffff_ffff) << 32 } else { low }
    }

    /// How many parameters a 16- or 32-bit call gate copies.
    pub(crate) const fn gate_parameters(&self) -> u64 {
        (self.raw >> 32) & 31
    }

    /// The interrupt stack table entry of a 64-bit interrupt gate; 0 for none.
    pub(crate) const fn gate_ist(&self) -> u8 {
        ((self.raw >> 32) & 7) as u8
    }
}

impl Vcpu {
    /// Where `selector`'s descriptor of `bytes` bytes is, if its table is that long.
    pub(crate) fn descriptor_address(&self, selector: Selector, bytes: u64) -> Option<u64> {
        let last = selector.offset().wrapping_add(bytes.wrapping_sub(1));
        let (base, limit) = if selector.is_local() {
            let ldt = &self.state.ldtr;
            if ldt.is_unusable() || Selector(ldt.selector).is_null() {
                return None;
            }
            (ldt.base, ldt.limit)
        } else {
            (self.state.gdtr.base, u32::from(self.state.gdtr.limit))
        };
        (last <= u64::from(limit)).then(|| self.wrap_linear(base.wrapping_add(selector.offset())))
    }

    /// Whether there is a descriptor for `selector`.
    pub(crate) fn has_descriptor(&self, selector: Selector) -> bool {
        if self.supervised() {
            self.held_descriptor(selector).is_some()
        } else {
            self.descriptor_address(selector, 8).is_some()
        }
    }

    /// `selector`'s descriptor in the supervisor's table. There is no local table there.
    fn held_descriptor(&self, selector: Selector) -> Option<u64> {
        if selector.is_local() {
            return None;
        }
        self.supervision.descriptor(selector.offset() >> 3)
    }

    /// Linear addresses are 32 bits wide outside long mode.
    #[inline]
    pub(crate) fn wrap_linear(&self, addr: u64) -> u64 {
        if self.state.long_mode() { addr } else { addr & 0xffff_ffff }
    }

    /// Reads `selector`'s 8-byte descriptor, or faults with `fault(selector)` when it is
    /// beyond its table.
    pub(crate) fn descriptor(
        &mut self,
        selector: Selector,
        fault: fn(u32) -> Exception,
    ) -> Result<Descriptor, Abort> {
        if self.supervised() {
            let Some(raw) = self.held_descriptor(selector) else {
                return Err(self.raise(fault(selector.code())));
            };
            return Ok(Descriptor { raw, high: 0, at: 0 });
        }
        let Some(at) = self.descriptor_address(selector, 8) else {
            return Err(self.raise(fault(selector.code())));
        };
        let raw = self.read_system::<u64>(at)?;
        Ok(Descriptor { raw, high: 0, at })
    }

    /// Reads the second half of a system descriptor in long mode; checks its type bits,
    /// which must be zero (SDM vol. 3, 5.8.3.1).
    pub(crate) fn widen_descriptor(
        &mut self,
        selector: Selector,
        descriptor: Descriptor,
        fault: fn(u32) -> Exception,
    ) -> Result<Descriptor, Abort> {
        if self.descriptor_address(selector, 16).is_none() {
            return Err(self.raise(fault(selector.code())));
        }
        let high = self.read_system::<u64>(descriptor.at.wrapping_add(8))?;
        if (high >> 40) & 0x1f != 0 {
            return Err(self.raise(fault(selector.code())));
        }
        Ok(Descriptor { high, ..descriptor })
    }

    /// Sets the accessed bit of a code or data descriptor in memory, if it is clear.
    pub(crate) fn mark_accessed(&mut self, descriptor: &Descriptor) -> Result<(), Abort> {
        if descriptor.access().contains(Access::ACCESSED) || self.supervised() {
            return Ok(());
        }
        self.change_type_bits(descriptor.at, 1, 0)
    }

    /// Sets the busy bit of a TSS descriptor in memory.
    pub(crate) fn mark_busy(&mut self, descriptor: &Descriptor) -> Result<(), Abort> {
        self.change_type_bits(descriptor.at, 2, 0)
    }

    /// Changes bits of a descriptor's type byte as one locked operation, as other vCPUs
    /// share the table.
    fn change_type_bits(&mut self, at: u64, set: u32, clear: u32) -> Result<(), Abort> {
        let addr = GuestVirtAddr(self.wrap_linear(at.wrapping_add(5)));
        let found = match self.mmu.walk(&self.memory, addr, View::Kernel, MemAccess::Write) {
            Ok(found) => found.addr,
            Err(code) => return Err(self.page_fault(addr, code)),
        };
        let shift = (found.0 & 3).wrapping_mul(8) as u32;
        let word = crate::addr::GuestPhysAddr(found.0 & !3);
        if let Some((_, frame, _)) = self.memory.page_for(word, true) {
            self.watch_page(MemAccess::Write, frame);
        }
        loop {
            // A descriptor table outside RAM keeps no bits; nothing to change then.
            let Some(old) = self.memory.load::<u32>(word) else { return Ok(()) };
            let new = (old | set.wrapping_shl(shift)) & !clear.wrapping_shl(shift);
            if old == new || self.memory.compare_exchange::<u32>(word, old, new) {
                return Ok(());
            }
        }
    }
}
