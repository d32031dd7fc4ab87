//! The architectural state of one vCPU, in a layout that generated code may rely on.
//!
//! [`VcpuState`] is `repr(C)`: native stubs (and one day the translator) address its
//! fields by offset from one base register. Anything that only Rust touches (caches,
//! TLB, environment) lives beside it in [`Vcpu`](crate::vcpu::Vcpu), not in here.

pub mod control;
pub mod fpu;
pub mod regs;
pub mod rflags;
pub mod segment;

use control::{Cr0, Cr4, Efer};
use fpu::{FpuState, VectorRegister};
use rflags::RFlags;
use segment::{DescriptorTable, SegReg, Segment};

/// General-purpose register slots: 16 real ones, one that is always zero (the
/// "no base" and "no index" of an effective address), and room to make the length
/// a power of two, so that a masked index needs no bounds check.
pub const GPR_SLOTS: usize = 32;
/// The slot that always reads zero.
pub const GPR_ZERO: u8 = 16;

/// Segment slots: the six registers in [`SegReg`] order and one flat segment of base
/// zero, which 64-bit code's ES, CS, SS and DS resolve to.
pub const SEG_SLOTS: usize = 8;
/// The slot of the flat segment.
pub const SEG_FLAT: u8 = 6;

/// What the current code is: decides decoding, addressing and stack width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CodeSize {
    /// CS.D = 0 outside 64-bit mode.
    Bits16 = 16,
    /// CS.D = 1 outside 64-bit mode.
    Bits32 = 32,
    /// CS.L = 1 in long mode.
    Bits64 = 64,
}

/// The architectural registers of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct VcpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15, then [`GPR_ZERO`].
    pub gpr: [u64; GPR_SLOTS],
    /// Instruction pointer. Inside a block it is that of the block's first
    /// instruction; it is exact whenever a handler has returned an error.
    pub rip: u64,
    /// Flags, always in architectural form (bit 1 set).
    pub rflags: RFlags,
    /// XMM/YMM registers, whole.
    pub vec: [VectorRegister; 16],
    /// SSE control and status.
    pub mxcsr: u32,
    /// x87/MMX state and what XSAVE knows about it all.
    pub fpu: FpuState,
    /// ES, CS, SS, DS, FS, GS, then the flat one.
    pub seg: [Segment; SEG_SLOTS],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: Cr0,
    /// CR2: the address of the last page fault.
    pub cr2: u64,
    /// CR3, without the no-flush bit.
    pub cr3: u64,
    /// CR4.
    pub cr4: Cr4,
    /// XCR0: what XSAVE manages and the guest may use.
    pub xcr0: u64,
    /// Extended features: long mode, NX, syscall.
    pub efer: Efer,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// The model-specific registers the CPU itself holds.
    pub msr: Msrs,
}

/// Model-specific registers with no home elsewhere in the state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs, reason = "each is the manual's name for the register")]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub debugctl: u64,
    /// Guest TSC minus host TSC.
    pub tsc_offset: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 16],
}

impl VcpuState {
    /// The state after RESET or INIT (SDM vol. 3, table 9-1): real mode at the reset vector.
    #[must_use]
    pub fn at_reset() -> Self {
        let mut state = Self {
            gpr: [0; GPR_SLOTS],
            rip: 0xfff0,
            rflags: RFlags::FIXED,
            vec: [VectorRegister::default(); 16],
            mxcsr: fpu::MXCSR_RESET,
            fpu: FpuState::at_reset(),
            seg: [Segment::real_mode(0); SEG_SLOTS],
            ldtr: Segment::ldt_at_reset(),
            tr: Segment::tss_at_reset(),
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: Cr0::ET | Cr0::NW | Cr0::CD,
            cr2: 0,
            cr3: 0,
            cr4: Cr4::empty(),
            xcr0: fpu::XCR0_X87,
            efer: Efer::empty(),
            dr: [0; 4],
            dr6: DR6_FIXED,
            dr7: DR7_FIXED,
            msr: Msrs { pat: 0x0007_0406_0007_0406, misc_enable: 1, ..Msrs::default() },
        };
        *state.segment_mut(SegReg::Cs) = Segment::code_at_reset();
        *state.seg_slot_mut(SEG_FLAT) = Segment::flat();
        state
    }

    /// The segment register `reg`.
    #[inline]
    #[must_use]
    pub fn segment(&self, reg: SegReg) -> &Segment {
        self.seg_slot(reg as u8)
    }

    /// The segment register `reg`, to be changed.
    #[inline]
    pub fn segment_mut(&mut self, reg: SegReg) -> &mut Segment {
        self.seg_slot_mut(reg as u8)
    }

    /// The segment slot `index`, which comes from a decoded instruction and is masked
    /// to the array, so that no index can be out of bounds.
    #[inline(always)]
    #[must_use]
    #[expect(
        clippy::indexing_slicing,
        reason = "masked to the array's length, which is a power of two"
    )]
    pub(crate) fn seg_slot(&self, index: u8) -> &Segment {
        &self.seg[usize::from(index) & (SEG_SLOTS - 1)]
    }

    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "as in `seg_slot`")]
    fn seg_slot_mut(&mut self, index: u8) -> &mut Segment {
        &mut self.seg[usize::from(index) & (SEG_SLOTS - 1)]
    }

    /// Current privilege level: SS.DPL, as the manual defines it for all modes
    /// (SDM vol. 3, 24.4.1); 0 in real mode, 3 in virtual-8086 mode.
    #[inline]
    #[must_use]
    pub fn cpl(&self) -> u8 {
        self.segment(SegReg::Ss).dpl()
    }

    /// Whether long mode is active (64-bit or compatibility).
    #[inline]
    #[must_use]
    pub fn long_mode(&self) -> bool {
        self.efer.contains(Efer::LMA)
    }

    /// Whether the CPU is in protected mode (long mode included).
    #[inline]
    #[must_use]
    pub fn protected_mode(&self) -> bool {
        self.cr0.contains(Cr0::PE)
    }

    /// What code CS selects.
    #[inline]
    #[must_use]
    pub fn code_size(&self) -> CodeSize {
        let cs = self.segment(SegReg::Cs);
        if self.long_mode() && cs.is_long() {
            CodeSize::Bits64
        } else if cs.is_big() {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }
}

/// DR6 bits that always read one.
pub const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR7 bits that always read one.
pub const DR7_FIXED: u64 = 0x400;
