//! What translated code knows of its vCPU: fields at fixed distances from the base it is
//! entered with (GS on the host, which nothing else in the process uses).

use std::mem::offset_of;

use crate::mmu::Mmu;
use crate::mmu::tlb::{DataEntry, DataTlb};
use crate::state::VcpuState;
use crate::state::control::{Cr0, Cr4};
use crate::state::fpu::{MXCSR_MASKS, XCR0_AVX, XCR0_SSE, image};
use crate::state::rflags::RFlags;
use crate::vcpu::Vcpu;

use super::jumps::JumpCache;

/// The vector unit may be used through legacy encodings.
pub(super) const SSE: u8 = 1;
/// It may be used through VEX encodings too.
pub(super) const AVX: u8 = 2;

/// Fields only translated code and its callers use.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Context {
    /// The host's stack pointer while translated code runs.
    pub(super) host_stack: u64,
    /// The vCPU itself, for calls back.
    pub(super) vcpu: u64,
    /// The status flags as `lahf` and `seto al` leave them in AX.
    pub(super) flags: u64,
    /// The table of the data TLB for the current view.
    pub(super) tlb: u64,
    /// The current address space, as the data TLB's tags have it.
    pub(super) space: u64,
    /// Where [`crate::handle::Event`]s are raised.
    pub(super) events: u64,
    /// A value between two steps of one instruction.
    pub(super) spare: u64,
    /// The link that translated code was left by.
    pub(super) link: u64,
    /// What of the vector unit is loaded into host registers: [`SSE`], [`AVX`].
    pub(super) vectors: u64,
    /// What may be loaded, given control registers and MXCSR.
    pub(super) allowed: u64,
}

impl Context {
    pub(crate) fn new() -> Self {
        Self {
            host_stack: 0,
            vcpu: 0,
            flags: 0,
            tlb: 0,
            space: 0,
            events: 0,
            spare: 0,
            link: 0,
            vectors: 0,
            allowed: 0,
        }
    }
}

/// A field's distance from the base.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field(pub(super) u32);

macro_rules! context {
    ($field:ident) => {
        Field((offset_of!(Vcpu, context) + offset_of!(Context, $field)) as u32)
    };
}

pub(super) const HOST_STACK: Field = context!(host_stack);
pub(super) const VCPU: Field = context!(vcpu);
pub(super) const FLAGS: Field = context!(flags);
pub(super) const TLB: Field = context!(tlb);
pub(super) const SPACE: Field = context!(space);
pub(super) const EVENTS: Field = context!(events);
pub(super) const SPARE: Field = context!(spare);
pub(super) const LINK: Field = context!(link);
pub(super) const VECTORS: Field = context!(vectors);
pub(super) const ALLOWED: Field = context!(allowed);
pub(super) const EVENT_MASK: Field = Field(offset_of!(Vcpu, event_mask) as u32);
pub(super) const RIP: Field = Field((offset_of!(Vcpu, state) + offset_of!(VcpuState, rip)) as u32);
pub(super) const MXCSR: Field =
    Field((offset_of!(Vcpu, state) + offset_of!(VcpuState, mxcsr)) as u32);
/// The MXCSR that Rust code runs with.
pub(super) const HOST_MXCSR: Field =
    Field((offset_of!(Vcpu, state) + offset_of!(VcpuState, fpu) + image::MXCSR) as u32);
const JUMPS: usize = offset_of!(Vcpu, mmu) + offset_of!(Mmu, jumps);
pub(super) const JUMP_KEYS: Field = Field((JUMPS + offset_of!(JumpCache, keys)) as u32);
pub(super) const JUMP_HOSTS: Field = Field((JUMPS + offset_of!(JumpCache, hosts)) as u32);
pub(super) const JUMP_CONTEXT: Field = Field((JUMPS + offset_of!(JumpCache, context)) as u32);

/// Where in a TLB entry what is.
pub(super) const TLB_READ: u8 = offset_of!(DataEntry, read) as u8;
pub(super) const TLB_WRITE: u8 = offset_of!(DataEntry, write) as u8;
pub(super) const TLB_ADDEND: u8 = offset_of!(DataEntry, addend) as u8;
/// The translated check shifts and masks addresses for this table.
const _: () = assert!(size_of::<DataEntry>() == 32 && DataTlb::ENTRIES == 1024);

/// General-purpose register `number`.
pub(super) const fn gpr(number: u8) -> Field {
    let gprs = offset_of!(Vcpu, state) + offset_of!(VcpuState, gpr);
    Field(gprs as u32 + (number as u32 & 15) * 8)
}

/// Vector register `number`.
pub(super) const fn vector(number: u8) -> Field {
    let vectors = offset_of!(Vcpu, state) + offset_of!(VcpuState, vec);
    Field(vectors as u32 + (number as u32 & 15) * 32)
}

/// The base of segment `slot`.
pub(super) fn segment_base(slot: u8) -> Field {
    use crate::state::segment::Segment;
    let segments = offset_of!(Vcpu, state) + offset_of!(VcpuState, seg);
    let base = offset_of!(Segment, base);
    Field((segments + base) as u32 + u32::from(slot & 7) * size_of::<Segment>() as u32)
}

impl Vcpu {
    /// Brings what translated code reads up to date with the architectural state.
    pub(super) fn sync_context(&mut self) {
        let state = &self.state;
        let sse = !state.cr0.intersects(Cr0::EM | Cr0::TS)
            && state.cr4.contains(Cr4::OSFXSR)
            && state.mxcsr & MXCSR_MASKS == MXCSR_MASKS;
        let avx = sse
            && state.cr0.contains(Cr0::PE)
            && state.cr4.contains(Cr4::OSXSAVE)
            && state.xcr0 & (XCR0_SSE | XCR0_AVX) == XCR0_SSE | XCR0_AVX;
        let (sse, avx) = (if sse { SSE } else { 0 }, if avx { AVX } else { 0 });
        self.context.allowed = u64::from(sse | avx);
        self.context.tlb = self.mmu.data.table(self.mmu.view) as u64;
        self.context.space = self.mmu.data.space();
    }

    /// The status flags, from where translated code keeps them to RFLAGS.
    pub(super) fn flags_from_context(&mut self) {
        let image = self.context.flags;
        let overflow = if image & 1 != 0 { RFlags::OF.bits() } else { 0 };
        let others = RFlags::STATUS.difference(RFlags::OF).bits();
        self.state.rflags = self.state.rflags.with_status(image >> 8 & others | overflow);
    }

    /// The other way round.
    pub(super) fn flags_to_context(&mut self) {
        let flags = self.state.rflags;
        let overflow = u64::from(flags.contains(RFlags::OF));
        let others = RFlags::STATUS.difference(RFlags::OF) | RFlags::FIXED;
        self.context.flags = (flags & others).bits() << 8 | overflow;
    }
}
