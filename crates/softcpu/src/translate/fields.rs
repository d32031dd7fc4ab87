//! What translated code knows of its vCPU: fields at fixed distances from the base it is
//! entered with (GS on the host, which nothing else in the process uses).

#![allow(
    clippy::arithmetic_side_effects,
    reason = "distances within one structure, whose size is known"
)]

use std::mem::offset_of;

use iced_x86::{MemoryOperand, Register as R};

use super::context::Context;
use super::jumps::{self, Jump, JumpCache};
use super::streams::{STREAMS, Stream};
use crate::mmu::Mmu;
use crate::mmu::gs_pages::{GsPage, GsPages, PAGES};
use crate::mmu::tlb::{DataEntry, DataTables, DataTlb};
use crate::state::fpu::image;
use crate::state::segment::Segment;
use crate::state::{Msrs, VcpuState};
use crate::vcpu::Vcpu;

/// A field's distance from the base.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field(pub(super) u32);

impl Field {
    /// The memory operand that it is.
    pub(super) fn operand(self) -> MemoryOperand {
        MemoryOperand::new(R::None, R::None, 1, i64::from(self.0), 8, false, R::GS)
    }
}

macro_rules! context {
    ($field:ident) => {
        Field((offset_of!(Vcpu, context) + offset_of!(Context, $field)) as u32)
    };
}

macro_rules! state {
    ($field:ident) => {
        Field((offset_of!(Vcpu, state) + offset_of!(VcpuState, $field)) as u32)
    };
}

macro_rules! msr {
    ($field:ident) => {
        Field(
            (offset_of!(Vcpu, state) + offset_of!(VcpuState, msr) + offset_of!(Msrs, $field))
                as u32,
        )
    };
}

pub(super) const HOST_STACK: Field = context!(host_stack);
pub(super) const STACK_LIMIT: Field = context!(stack_limit);
pub(super) const VCPU: Field = context!(vcpu);
pub(super) const FLAGS: Field = context!(flags);
pub(super) const TLB: Field = context!(tlb);
pub(super) const SPACE: Field = context!(space);
pub(super) const EVENTS: Field = context!(events);
pub(super) const SPARE: Field = context!(spare);
pub(super) const SPLIT_AT: Field = context!(split_at);
pub(super) const LINK: Field = context!(link);
pub(super) const VECTORS: Field = context!(vectors);
pub(super) const ALLOWED: Field = context!(allowed);
pub(super) const X87_OP: Field = context!(x87_op);
pub(super) const SHARED: Field = context!(shared);
pub(super) const MIRROR: Field = context!(mirror);
pub(super) const MIRROR_DISTANCE: Field = context!(mirror_distance);
pub(super) const MIRROR_MISSES: Field = context!(mirror_misses);
pub(super) const HEAT: Field = context!(heat);
pub(super) const ROOMS: Field = context!(rooms);
pub(super) const EVENT_MASK: Field = Field(offset_of!(Vcpu, event_mask) as u32);
pub(super) const TLB_PLAIN: Field = context!(tlb_plain);
pub(super) const TLB_OVER: Field = context!(tlb_over);
pub(super) const SPACE_PLAIN: Field = context!(space_plain);
pub(super) const SPACE_OVER: Field = context!(space_over);
pub(super) const TAPED: Field = context!(taped);
pub(super) const RFLAGS: Field = state!(rflags);
pub(super) const CR4: Field = state!(cr4);
pub(super) const KERNEL_GS_BASE: Field = msr!(kernel_gs_base);
pub(super) const TSC_OFFSET: Field = msr!(tsc_offset);
pub(super) const TSC_AUX: Field = msr!(tsc_aux);
pub(super) const RIP: Field = state!(rip);
pub(super) const MXCSR: Field = state!(mxcsr);
/// The MXCSR that Rust code runs with.
pub(super) const HOST_MXCSR: Field = in_image(image::MXCSR);
/// The x87 unit's image, and what in it is put right when it was stored.
pub(super) const X87_IMAGE: Field = in_image(0);
pub(super) const X87_FOP: Field = in_image(image::FOP);
pub(super) const X87_FIP: Field = in_image(image::FIP);
pub(super) const X87_FDP: Field = in_image(image::FDP);
/// Which components the image has.
pub(super) const X87_HEADER: Field = in_image(image::HEADER);
const JUMPS: usize = offset_of!(Vcpu, mmu) + offset_of!(Mmu, jumps);
const JUMP_TABLE: usize = JUMPS + offset_of!(JumpCache, jumps);
pub(super) const JUMP_KEYS: Field = Field((JUMP_TABLE + offset_of!(Jump, key)) as u32);
pub(super) const JUMP_HOSTS: Field = Field((JUMP_TABLE + offset_of!(Jump, host)) as u32);
pub(super) const JUMP_CONTEXT: Field = Field((JUMPS + offset_of!(JumpCache, context)) as u32);

const GS_PAGES: usize = offset_of!(Vcpu, mmu) + offset_of!(Mmu, gs_pages);
/// The base of GS, where that says which pages are kept, and how many more may be looked for
/// in vain.
pub(super) const GS_BASE_KNOWN: Field = Field((GS_PAGES + offset_of!(GsPages, base)) as u32);
pub(super) const GS_MISSES: Field = Field((GS_PAGES + offset_of!(GsPages, misses)) as u32);

/// Where in a TLB's tables what is, from the entry for loads on.
pub(super) const TLB_TAG: u32 = offset_of!(DataEntry, tag) as u32;
pub(super) const TLB_ADDEND: u32 = offset_of!(DataEntry, addend) as u32;
/// How far the entry for stores lies behind the one for loads.
pub(super) const TLB_STORES: u32 = offset_of!(DataTables, write) as u32;
/// The translated check shifts and masks addresses for this table.
const _: () = assert!(size_of::<DataEntry>() == 16 && DataTlb::ENTRIES == 8192);

const fn in_image(at: usize) -> Field {
    Field((offset_of!(Vcpu, state) + offset_of!(VcpuState, fpu) + at) as u32)
}

/// General-purpose register `number`.
pub(super) const fn gpr(number: u8) -> Field {
    let gprs = offset_of!(Vcpu, state) + offset_of!(VcpuState, gpr);
    Field(gprs as u32 + (number as u32 & 15) * 8)
}

/// Where a host address is kept for accesses that share a check.
pub(super) const fn shared(place: u8) -> Field {
    Field(SHARED.0 + (place as u32 & 15) * 8)
}

/// The address of the page that is kept for a stream.
pub(super) const fn stream_page(stream: u8) -> Field {
    in_stream(stream, offset_of!(Stream, page))
}

/// How far in it accesses of the stream may begin.
pub(super) const fn stream_limit(stream: u8) -> Field {
    in_stream(stream, offset_of!(Stream, limit))
}

/// Where it is in host memory.
pub(super) const fn stream_host(stream: u8) -> Field {
    in_stream(stream, offset_of!(Stream, host))
}

const fn in_stream(stream: u8, at: usize) -> Field {
    let streams = offset_of!(Vcpu, context) + offset_of!(Context, streams);
    Field((streams + at + (stream as usize % STREAMS as usize) * size_of::<Stream>()) as u32)
}

/// The base of GS that page `number` behind it was found for.
pub(super) const fn gs_page_base(number: usize) -> Field {
    gs_page(number, offset_of!(GsPage, base))
}

/// What makes host addresses of distances in that page.
pub(super) const fn gs_page_addend(number: usize) -> Field {
    gs_page(number, offset_of!(GsPage, addend))
}

const fn gs_page(number: usize, at: usize) -> Field {
    let pages = GS_PAGES + offset_of!(GsPages, pages);
    Field((pages + at + number % PAGES * size_of::<GsPage>()) as u32)
}

/// Vector register `number`.
pub(super) const fn vector(number: u8) -> Field {
    let vectors = offset_of!(Vcpu, state) + offset_of!(VcpuState, vec);
    Field(vectors as u32 + (number as u32 & 15) * 32)
}

/// The base of segment `slot`.
pub(super) const fn segment_base(slot: u8) -> Field {
    segment(slot, offset_of!(Segment, base))
}

/// The access rights of segment `slot`.
pub(super) const fn segment_access(slot: u8) -> Field {
    segment(slot, offset_of!(Segment, access))
}

/// The selector of segment `slot`.
pub(super) const fn segment_selector(slot: u8) -> Field {
    segment(slot, offset_of!(Segment, selector))
}

/// What lies `at` bytes into segment `slot`.
const fn segment(slot: u8, at: usize) -> Field {
    let segments = offset_of!(Vcpu, state) + offset_of!(VcpuState, seg);
    Field((segments + at) as u32 + (slot as u32 & 7) * size_of::<Segment>() as u32)
}

/// The key and the code of the jump cache's entry for `rip`.
pub(super) fn jump_entry(rip: u64) -> (Field, Field) {
    let at = jump_distance(rip);
    (Field(JUMP_KEYS.0 + at), Field(JUMP_HOSTS.0 + at))
}

/// How far behind the first that entry is.
pub(super) fn jump_distance(rip: u64) -> u32 {
    jumps::slot(rip) as u32 * size_of::<Jump>() as u32
}
