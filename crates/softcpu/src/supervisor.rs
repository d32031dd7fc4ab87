//! A supervisor: whoever takes the events of a vCPU before its own tables do.
//!
//! With one installed ([`Vcpu::supervise`]), exceptions, software interrupts, hypercall
//! instructions and [`Event::INTERRUPT`](crate::handle::Event::INTERRUPT) are not delivered
//! through the IDT but handed to it, on the vCPU's thread. It may change registers and
//! mappings and reach guest memory through the guest's own page tables, and says what
//! happens next. Segment descriptors then come from a table that it holds
//! ([`Vcpu::hold_descriptors`]), as the guest has none that the CPU could trust. This is
//! what a platform builds on whose guests run deprivileged, in a ring above 0. Without one
//! it costs a test on paths that are cold.

use std::fmt;

use crate::addr::{GuestPhysAddr, GuestVirtAddr};
use crate::exception::{Exception, PageFaultCode};
use crate::handle::Event;
use crate::memory::PhysMemory;
use crate::mmu::tlb::Whose;
use crate::mmu::{Access as PageAccess, PagingMode, RefusedFlags, View};
use crate::state::control::{Cr0, Cr4};
use crate::state::rflags::RFlags;
use crate::state::segment::Access;
use crate::vcpu::{Abort, Exit, Shadow, Step, Vcpu};

/// What a supervisor is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// An exception; RIP is at the instruction that raised it (for traps, behind it). CR2
    /// and DR6 are as they were: what they would hold is in the exception.
    Exception(Exception),
    /// `int n`, `int3`, `into` or `int1`. RIP is behind it.
    Software {
        /// The vector.
        vector: u8,
        /// Where the instruction is: RIP for whoever wants it to fault instead.
        at: u64,
        /// Whether the gate's DPL decides if the program may do this; not for `int1`.
        checked: bool,
    },
    /// `vmcall` or `vmmcall`, at any privilege. RIP is behind it.
    Hypercall {
        /// Where the instruction is.
        at: u64,
    },
    /// `syscall` where EFER.SCE allows it, at any privilege. RIP is behind it, and nothing
    /// else has changed.
    Syscall {
        /// Where the instruction is.
        at: u64,
    },
    /// [`Event::INTERRUPT`](crate::handle::Event::INTERRUPT) was raised (and taken) while
    /// RFLAGS.IF is set and nothing holds interrupts off.
    Interrupt,
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The guest goes on with the state as it is now.
    Resume,
    /// The guest waits: [`Vcpu::run`] returns [`Exit::Halt`].
    Halt,
    /// The guest is not to go on: [`Vcpu::run`] returns [`Exit::Stopped`]. Why is between the
    /// supervisor and the machine.
    Stop,
}

/// Takes a vCPU's events. See the module's own words.
pub trait Supervisor: Send {
    /// Called on the vCPU's thread, between two instructions.
    fn trap(&mut self, cpu: &mut Vcpu, trap: Trap) -> Verdict;
}

/// What a vCPU keeps of its supervisor.
#[derive(Default)]
pub(crate) struct Supervision {
    /// The supervisor; away while it works.
    sink: Option<Box<dyn Supervisor>>,
    installed: bool,
    watches_iret: bool,
    descriptors: Vec<u64>,
}

impl fmt::Debug for Supervision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supervision").field("installed", &self.installed).finish_non_exhaustive()
    }
}

impl Supervision {
    /// The held descriptor number `index`; `None` when the table ends before it.
    pub(crate) fn descriptor(&self, index: u64) -> Option<u64> {
        self.descriptors.get(usize::try_from(index).ok()?).copied()
    }
}

/// Control registers that make a paging mode outside of long mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// CR0: PG and WP are what matters here.
    pub cr0: Cr0,
    /// CR3.
    pub cr3: u32,
    /// CR4: PAE and PSE are what matters here.
    pub cr4: Cr4,
}

impl Vcpu {
    /// Installs `supervisor`. There is no way back: the guest has no tables of its own.
    pub fn supervise(&mut self, supervisor: Box<dyn Supervisor>) {
        self.supervision.sink = Some(supervisor);
        self.supervision.installed = true;
    }

    /// Whether a supervisor takes the events.
    #[inline]
    pub(crate) fn supervised(&self) -> bool {
        self.supervision.installed
    }

    /// Makes `table` the global descriptor table. Descriptors of code and data must have
    /// their accessed bit set, as the CPU does not write to this table. Segment registers
    /// keep what they hold.
    pub fn hold_descriptors(&mut self, table: &[u64]) {
        self.supervision.descriptors.clear();
        self.supervision.descriptors.extend_from_slice(table);
    }

    /// RAM.
    #[must_use]
    pub fn memory(&self) -> &PhysMemory {
        &self.memory
    }

    /// Reads guest-virtual memory (at most
    /// [`MAX_ACCESS`](crate::mmu::access::MAX_ACCESS) bytes) as the guest's kernel could.
    ///
    /// # Errors
    /// The page fault that the guest would have.
    pub fn read_virtual(&mut self, addr: u64, data: &mut [u8]) -> Result<(), Exception> {
        self.read_bytes_as(View::Kernel, addr, data).map_err(|_| self.fault)
    }

    /// Writes guest-virtual memory, likewise: all of it or nothing.
    ///
    /// # Errors
    /// The page fault that the guest would have.
    pub fn write_virtual(&mut self, addr: u64, data: &[u8]) -> Result<(), Exception> {
        self.write_bytes_as(View::Kernel, addr, data).map_err(|_| self.fault)
    }

    /// Where a store by the guest's kernel to `addr` would go. Like the store, this marks what
    /// it goes through in the page tables.
    ///
    /// # Errors
    /// The error code of the page fault that the guest would have.
    pub fn translate_store(&self, addr: u64) -> Result<GuestPhysAddr, PageFaultCode> {
        let walk =
            self.mmu.walk(&self.memory, GuestVirtAddr(addr), View::Kernel, PageAccess::Write);
        walk.map(|found| found.addr)
    }

    /// Whether an `iret` is followed by [`Trap::Interrupt`], as if the event had been raised:
    /// for who waits for the guest to return from a handler.
    pub fn watch_iret(&mut self, on: bool) {
        self.supervision.watches_iret = on;
    }

    /// An `iret` is about to be done.
    #[inline]
    pub(crate) fn note_iret(&self) {
        if self.supervision.watches_iret {
            self.handle.raise(Event::INTERRUPT);
        }
    }

    /// Must be called after CS or SS were changed in [`Vcpu::state`]: privilege and code
    /// size follow. Cached translations stay.
    pub fn segments_changed(&mut self) {
        self.mode_changed();
    }

    /// Replaces RFLAGS.
    pub fn load_flags(&mut self, flags: RFlags) {
        self.set_rflags(flags);
    }

    /// Changes the paging mode; every cached translation is forgotten.
    ///
    /// # Errors
    /// `#GP(0)` when PAE's top-level table has reserved bits set; nothing has changed then.
    pub fn load_paging(&mut self, paging: Paging) -> Result<(), Exception> {
        let Paging { cr0, cr3, cr4 } = paging;
        if Self::is_pae(cr0, cr4, self.state.efer) {
            self.mmu.pdpte = self.read_pdptes(cr3.into()).map_err(|_| self.fault)?;
        }
        self.state.cr0 = cr0;
        self.state.cr3 = cr3.into();
        self.state.cr4 = cr4;
        self.mmu.flush_all();
        self.mode_changed();
        Ok(())
    }

    /// Makes the table at `cr3` the current top level, as `mov cr3` does: translations that
    /// are not global are forgotten, and PAE's top-level entries read anew.
    ///
    /// # Errors
    /// `#GP(0)` when PAE's top-level table has reserved bits set; nothing has changed then.
    pub fn load_cr3(&mut self, cr3: impl Into<u64>) -> Result<(), Exception> {
        self.set_cr3(cr3.into()).map_err(|_| self.fault)
    }

    /// Whether PAE's top-level table differs from what the CPU has read of it. A guest that
    /// adds to the table does not always say so; what faulted may be mapped by now.
    #[must_use]
    pub fn top_level_is_stale(&mut self) -> bool {
        let held = self.mmu.pdpte;
        self.mmu.mode == PagingMode::Pae
            && self.read_pdptes(self.state.cr3).is_ok_and(|now| now != held)
    }

    /// Refuses flags in page table entries from now on; every cached translation is forgotten.
    pub fn refuse_flags(&mut self, flags: RefusedFlags) {
        self.mmu.refused = flags;
        self.mmu.flush_all();
    }

    /// Forgets every cached translation.
    pub fn flush_tlb(&mut self) {
        self.mmu.flush_all();
    }

    /// Forgets whatever translates `addr`, in every address space.
    pub fn flush_page(&mut self, addr: u64) {
        self.mmu.invalidate(addr, Whose::All);
    }

    /// Hands `trap` to the supervisor, between two instructions.
    pub(crate) fn hand_over(&mut self, trap: Trap) -> Option<Exit> {
        // It cannot be called again while it works: nothing it may do here raises events.
        let mut sink = self.supervision.sink.take()?;
        self.shadow = Shadow::None;
        let verdict = sink.trap(self, trap);
        self.supervision.sink = Some(sink);
        self.update_event_mask();
        match verdict {
            Verdict::Resume => None,
            Verdict::Halt => Some(Exit::Halt),
            Verdict::Stop => Some(Exit::Stopped),
        }
    }

    /// The same at the end of an instruction, which has set RIP.
    pub(crate) fn hand_over_from(&mut self, trap: Trap) -> Step {
        match self.hand_over(trap) {
            None => Err(Abort::EndBlock),
            Some(exit) => {
                self.exit = exit;
                Err(Abort::Exit)
            }
        }
    }
}

/// Sets the accessed bit of a descriptor of code or data, as
/// [`Vcpu::hold_descriptors`] wants it.
#[must_use]
pub const fn accessed(raw: u64) -> u64 {
    let is_segment = raw >> 40 & Access::CODE_OR_DATA.bits() as u64 != 0;
    if is_segment { raw | (Access::ACCESSED.bits() as u64) << 40 } else { raw }
}
