//! Paging and the software TLB.
//!
//! [`Mmu`] holds what follows from the control registers (paging mode, permissions in
//! force, address-space tag) and the cached translations. [`walk`] reads the guest's
//! page tables; [`linear`] and [`access`] are what instruction handlers call. The rules
//! are those of the SDM, vol. 3, chapter 4.

pub mod access;
mod code_tlb;
mod frame_filter;
pub(crate) mod gs_pages;
pub mod large_pages;
pub mod linear;
pub(crate) mod mirror;
pub mod space;
pub mod tlb;
pub mod walk;

use crate::state::VcpuState;
use crate::state::control::{Cr0, Cr4, Efer};
use code_tlb::CodeTlb;
use gs_pages::GsPages;
use large_pages::LargePages;
use mirror::Mirror;
use space::Spaces;
use tlb::DataTlb;

use crate::translate::jumps::JumpCache;

/// Guest-physical address width this CPU reports (CPUID 8000_0008h) and checks.
pub const PHYS_BITS: u32 = 46;

/// How linear addresses become physical ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagingMode {
    /// CR0.PG = 0: they are the same.
    Off,
    /// 32-bit paging, two levels, 4 KiB and (with CR4.PSE) 4 MiB pages.
    TwoLevel,
    /// PAE paging, three levels, 4 KiB and 2 MiB pages.
    Pae,
    /// 4-level paging of long mode.
    FourLevel,
}

/// Whose permissions an access is made with. Each has its own TLB, so that a hit
/// needs no permission check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum View {
    /// CPL 0 to 2 (or an implicit system access) with SMAP, if on, in force.
    Kernel = 0,
    /// CPL 3.
    User = 1,
    /// CPL 0 to 2 with SMAP lifted by RFLAGS.AC.
    KernelOverUser = 2,
    /// CPL 3 with alignment checking (CR0.AM and RFLAGS.AC): its TLB is never filled, so
    /// that every access is looked at.
    UserAligned = 3,
}

/// The kind of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A load.
    Read,
    /// A store, or the load half of a read-modify-write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// The permission bits in force, as the walker needs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// CR0.WP: supervisor stores respect read-only pages.
    pub write_protect: bool,
    /// EFER.NXE.
    pub no_execute: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PSE: 4 MiB pages in 32-bit paging.
    pub pse: bool,
    /// CR4.PGE: global pages.
    pub global: bool,
    /// CR0.AM: RFLAGS.AC makes misaligned accesses at CPL 3 fault.
    pub alignment: bool,
}

/// Flags of table entries that are refused beside those that the architecture reserves, in
/// every mode: what uses such an entry is a page fault with the reserved bit in its code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefusedFlags {
    /// In entries above the lowest level, but for PAE's four.
    pub upper: u64,
    /// In entries of the lowest level.
    pub lowest: u64,
}

/// Paging state and cached translations of one vCPU.
#[derive(Debug)]
pub struct Mmu {
    pub(crate) mode: PagingMode,
    pub(crate) rules: Rules,
    pub(crate) refused: RefusedFlags,
    /// Root table: CR3's address bits.
    pub(crate) root: u64,
    /// PAE paging's four PDPTE registers, loaded with CR3 (SDM vol. 3, 4.4.1).
    pub(crate) pdpte: [u64; 4],
    /// The view of ordinary accesses at the current CPL.
    pub(crate) view: View,
    user: bool,
    ac: bool,
    pub(crate) data: DataTlb,
    pub(crate) code: CodeTlb,
    pub(crate) mirror: Mirror,
    pub(crate) gs_pages: GsPages,
    spaces: Spaces,
    large: LargePages,
    /// Where translated code jumps to, which holds as long as mappings do.
    pub(crate) jumps: JumpCache,
    /// Counts whatever may make a translation not hold any more.
    version: u64,
}

impl Mmu {
    pub(crate) fn new() -> Self {
        Self {
            mode: PagingMode::Off,
            rules: Rules {
                write_protect: false,
                no_execute: false,
                smep: false,
                smap: false,
                pse: false,
                global: false,
                alignment: false,
            },
            refused: RefusedFlags::default(),
            root: 0,
            pdpte: [0; 4],
            view: View::Kernel,
            user: false,
            ac: false,
            data: DataTlb::new(),
            code: CodeTlb::new(),
            mirror: Mirror::new(),
            gs_pages: GsPages::new(),
            spaces: Spaces::new(),
            large: LargePages::new(),
            jumps: JumpCache::new(),
            version: 0,
        }
    }

    /// Takes paging mode and permissions from the control registers. Flushes what no
    /// longer holds, except for what CR3 itself governs (see [`Mmu::switch_space`]).
    pub(crate) fn set_mode(&mut self, state: &VcpuState, user: bool) {
        let mode = if !state.cr0.contains(Cr0::PG) {
            PagingMode::Off
        } else if !state.cr4.contains(Cr4::PAE) {
            PagingMode::TwoLevel
        } else if !state.efer.contains(Efer::LMA) {
            PagingMode::Pae
        } else {
            PagingMode::FourLevel
        };
        let rules = Rules {
            write_protect: state.cr0.contains(Cr0::WP),
            no_execute: state.efer.contains(Efer::NXE),
            smep: state.cr4.contains(Cr4::SMEP),
            smap: state.cr4.contains(Cr4::SMAP),
            pse: state.cr4.contains(Cr4::PSE),
            global: state.cr4.contains(Cr4::PGE),
            alignment: state.cr0.contains(Cr0::AM),
        };
        if mode != self.mode || rules != self.rules {
            self.mode = mode;
            self.rules = rules;
            self.flush_all();
        }
        self.root = match mode {
            PagingMode::FourLevel => state.cr3 & ((1 << PHYS_BITS) - 1) & !0xfff,
            PagingMode::Pae => state.cr3 & 0xffff_ffe0,
            PagingMode::TwoLevel | PagingMode::Off => state.cr3 & 0xffff_f000,
        };
        self.user = user;
        self.ac = state.rflags.contains(crate::state::rflags::RFlags::AC);
        self.choose_view();
    }

    /// RFLAGS.AC changed.
    #[inline]
    pub(crate) fn set_alignment_override(&mut self, ac: bool) {
        if self.ac != ac {
            self.ac = ac;
            self.choose_view();
        }
    }

    /// Whether accesses are made at CPL 3.
    #[inline]
    pub(crate) fn is_user(&self) -> bool {
        self.user
    }

    /// A number that changes whenever translations are forgotten, or others are current.
    #[inline]
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    fn choose_view(&mut self) {
        self.view = match self.user {
            true if self.ac && self.rules.alignment => View::UserAligned,
            true => View::User,
            false => self.kernel_view(self.ac),
        };
    }

    /// The view below CPL 3 where RFLAGS.AC is `ac`.
    #[inline]
    pub(crate) fn kernel_view(&self, ac: bool) -> View {
        if ac && self.rules.smap { View::KernelOverUser } else { View::Kernel }
    }
}
