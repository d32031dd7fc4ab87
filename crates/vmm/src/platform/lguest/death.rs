//! What a guest dies of: the reasons, in words that name the rule and who broke it.
//!
//! There is no other answer to a guest that breaks the ABI: no call returns a value, so
//! there is nowhere to report an error to.

use lguest_abi::segments::BadGate;
use lguest_abi::tables::BadEntry;
use lguest_abi::{Paging, Phys};

/// Why a guest cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum Death {
    #[error("it made hypercall {0:#x} before LGUEST_INIT")]
    BeforeInit(u32),
    #[error("it called LGUEST_INIT twice")]
    SecondInit,
    #[error("its LGUEST_INIT names no lguest_data that any Linux from 2.6.24 to 4.13 has")]
    UnknownAbi,
    #[error("hypercall {0:#x} does not exist")]
    UnknownCall(u32),
    #[error("it asked for system calls by vector {0:#x}, which cannot be: 0x40 to 0xff can")]
    SyscallVector(u32),
    #[error("it named {len} bytes at {at}, and memory ends at {limit:#x}")]
    OutsideMemory { at: Phys, len: usize, limit: u64 },
    #[error("it accessed physical {0:#x}, where there is neither memory nor a device")]
    StrayAccess(u64),
    #[error(
        "there is no room for the page tables that a host makes for this kernel ({0:?}): give it \
         more memory, or with PAE at most 1 GiB"
    )]
    NoRoomForTables(Paging),
    #[error("the table at {0} is a top level neither of two-level nor of PAE page tables")]
    UnknownPaging(Phys),
    #[error("its page tables at {0} have reserved bits set")]
    BadPageTable(Phys),
    #[error("its {0}")]
    Entry(#[from] BadEntry),
    #[error("reserved bits are set in the page table entry for {0:#x}")]
    ReservedBits(u64),
    #[error("there is no top-level entry {0} to change")]
    TopLevelIndex(u32),
    #[error(transparent)]
    Gate(#[from] BadGate),
    #[error("it has {0} descriptors for 32 entries")]
    DescriptorCount(u32),
    #[error("there is no descriptor {0}")]
    DescriptorIndex(u32),
    #[error("its stack segment {0:#x} is none for ring 1")]
    StackSegment(u32),
    #[error("its kernel stack has {0} pages: 2 are the most")]
    StackPages(u32),
    #[error("its kernel stack at {0:#x} is not mapped for writing")]
    StackNotMapped(u64),
    #[error("its kernel's code segment, entry 12 of the GDT, is no longer one for ring 1")]
    KernelCode,
    #[error("it changed the descriptor under {0}, which is in use, to one that cannot be")]
    SegmentInUse(&'static str),
    #[error("unhandled trap {vector} ({detail:#x})")]
    UnhandledTrap { vector: u8, detail: u64 },
}
