//! What translated code shares with the run loop: where the TLB is, what of the vector unit
//! is loaded, the status flags between blocks.

use super::sharing::PLACES;
use super::streams::{STREAMS, Stream};
use crate::state::control::{Cr0, Cr4};
use crate::state::fpu::{MXCSR_MASKS, X87_EXCEPTIONS, XCR0_AVX, XCR0_SSE};
use crate::state::rflags::RFlags;
use crate::state::segment::SegReg;
use crate::state::{CodeSize, SEG_SLOTS};
use crate::vcpu::Vcpu;

/// The vector unit may be used through legacy encodings.
pub(super) const SSE: u8 = 1;
/// It may be used through VEX encodings too.
pub(super) const AVX: u8 = 2;
/// The x87 unit may be used, and MMX.
pub(super) const X87: u8 = 4;

/// Fields only translated code and its callers use.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Context {
    /// The host's stack pointer while translated code runs, and no call is noted.
    pub(super) host_stack: u64,
    /// Where it is when no more calls can be noted.
    pub(super) stack_limit: u64,
    /// The vCPU itself, for calls back.
    pub(super) vcpu: u64,
    /// The status flags as `lahf` and `seto al` leave them in AX.
    pub(super) flags: u64,
    /// The tables of the data TLB for the current view.
    pub(super) tlb: u64,
    /// The current address space, as the data TLB's tags have it for that view.
    pub(super) space: u64,
    /// The same of the views that ring 0 has with RFLAGS.AC clear, and with it set.
    pub(super) tlb_plain: u64,
    pub(super) tlb_over: u64,
    pub(super) space_plain: u64,
    pub(super) space_over: u64,
    /// Where [`crate::handle::Event`]s are raised.
    pub(super) events: u64,
    /// A value between two steps of one instruction.
    pub(super) spare: u64,
    /// The link that translated code was left by.
    pub(super) link: u64,
    /// What of the vector and x87 units is loaded into host registers: [`SSE`], [`AVX`],
    /// [`X87`].
    pub(super) vectors: u64,
    /// What may be loaded, given control registers and which exceptions are masked.
    pub(super) allowed: u64,
    /// The op of the last x87 instruction that has set FIP and FOP since the unit was loaded, or
    /// zero.
    pub(super) x87_op: u64,
    /// The host can load and store the x87 unit alone.
    lends_x87: bool,
    /// Not zero if what the time is was recorded, or is being recorded.
    pub(super) taped: u64,
    /// Host addresses that accesses which share a check are made from, within a trace.
    pub(super) shared: [u64; PLACES as usize],
    /// The pages of a trace's streams.
    pub(super) streams: [Stream; STREAMS as usize],
    /// The table that says of each span of addresses whether it is mirrored
    /// ([`crate::mmu::mirror`]), and what makes addresses there of the guest's.
    pub(super) mirror: u64,
    pub(super) mirror_distance: u64,
    /// How many accesses may yet look there in vain until somebody is told.
    pub(super) mirror_misses: u64,
    /// What they start with.
    pub(super) mirror_patience: u64,
    /// How many hot loops in a row were left as they are, to be found again.
    pub(super) mirror_waits: u32,
    /// The instruction that a page was shown to last, and where it accesses that.
    pub(super) mirror_fault: (u64, u64),
    /// How many turns loops that are not known to be hot may still take until the one that does
    /// then is taken to be.
    pub(super) heat: u64,
    /// Where what a trace was left for, because it cannot be checked at once, begins; the last
    /// address if it is as long as pages, or longer.
    pub(super) split_at: u64,
    /// Bytes that segments have, from offset zero on, outside 64-bit code (see [`super::mode`]).
    pub(super) rooms: [u64; SEG_SLOTS],
}

impl Context {
    pub(crate) fn new() -> Self {
        Self {
            host_stack: 0,
            stack_limit: 0,
            vcpu: 0,
            flags: 0,
            tlb: 0,
            tlb_plain: 0,
            tlb_over: 0,
            space_plain: 0,
            space_over: 0,
            space: 0,
            events: 0,
            spare: 0,
            link: 0,
            vectors: 0,
            allowed: 0,
            x87_op: 0,
            lends_x87: std::arch::is_x86_feature_detected!("xsave"),
            taped: 0,
            shared: [0; PLACES as usize],
            streams: [Stream::default(); STREAMS as usize],
            mirror: 0,
            mirror_distance: 0,
            mirror_misses: 0,
            mirror_patience: 0,
            mirror_waits: 0,
            mirror_fault: (0, 0),
            heat: 1,
            split_at: 0,
            rooms: [0; SEG_SLOTS],
        }
    }
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
        let x87 = self.context.lends_x87
            && !state.cr0.intersects(Cr0::EM | Cr0::TS)
            && state.fpu.control() & X87_EXCEPTIONS == X87_EXCEPTIONS
            && !state.fpu.pending();
        let bit = |allowed: bool, unit: u8| if allowed { u64::from(unit) } else { 0 };
        self.context.allowed = bit(sse, SSE) | bit(avx, AVX) | bit(x87, X87);
        self.context.tlb = self.mmu.data.tables(self.mmu.view) as u64;
        self.context.space = self.mmu.data.space(self.mmu.view);
        let (plain, over) = (self.mmu.kernel_view(false), self.mmu.kernel_view(true));
        self.context.tlb_plain = self.mmu.data.tables(plain) as u64;
        self.context.tlb_over = self.mmu.data.tables(over) as u64;
        self.context.space_plain = self.mmu.data.space(plain);
        self.context.space_over = self.mmu.data.space(over);
        self.sync_mirror();
        let gs = self.state.segment(SegReg::Gs).base;
        self.mmu.gs_pages.enter((!self.mmu.is_user()).then_some(gs));
        if self.code_size != CodeSize::Bits64 {
            self.sync_segments();
        }
    }

    /// The status flags, from where translated code keeps them to RFLAGS; and what follows
    /// from AC, which it may have changed.
    #[inline]
    pub(super) fn flags_from_context(&mut self) {
        self.catch_up_with_ac();
        // No more than was stored last, which a wider load would have to wait for.
        let image = u64::from(self.context.flags as u16);
        let overflow = if image & 1 != 0 { RFlags::OF.bits() } else { 0 };
        let others = RFlags::STATUS.difference(RFlags::OF).bits();
        self.state.rflags = self.state.rflags.with_status(image >> 8 & others | overflow);
    }

    /// `stac` and `clac` in line leave the MMU's view to whoever needs it next.
    #[inline]
    pub(super) fn catch_up_with_ac(&mut self) {
        self.mmu.set_alignment_override(self.state.rflags.contains(RFlags::AC));
    }

    /// The other way round.
    pub(super) fn flags_to_context(&mut self) {
        let flags = self.state.rflags;
        let overflow = u64::from(flags.contains(RFlags::OF));
        let others = RFlags::STATUS.difference(RFlags::OF) | RFlags::FIXED;
        self.context.flags = (flags & others).bits() << 8 | overflow;
    }
}
