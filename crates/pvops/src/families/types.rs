//! The words that kernels and backends exchange. Structures that only the kernel knows
//! the inside of are opaque here.

use crate::word::Word;

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        #[repr(C)]
        pub struct $name {
            inside: [u8; 0],
        }
    )*};
}

opaque! {
    /// An address space.
    Mm
    /// A thread's state, with its TLS descriptors.
    Thread
    /// The task state segment.
    Tss
    /// A set of CPUs.
    CpuMask
}

macro_rules! entries {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        // SAFETY: one register, and every bit pattern is a value.
        unsafe impl Word for $name {
            #[inline(always)]
            fn into_word(self) -> usize {
                self.0 as usize
            }
            #[inline(always)]
            fn from_word(word: usize) -> Self {
                Self(word as u64)
            }
        }
    )*};
}

entries! {
    /// An entry of the last level of page tables, as the CPU reads it.
    Pte
    /// An entry of the second level.
    Pmd
    /// An entry of the third level.
    Pud
    /// An entry of the top level.
    Pgd
}

/// The operand of `lgdt` and `lidt`.
#[derive(Clone, Copy, Debug)]
#[repr(C, packed)]
pub struct TablePointer {
    /// Bytes in the table, less one.
    pub limit: u16,
    /// Where it is.
    pub base: u64,
}

/// A spin lock: its first byte is 1 while somebody holds it, 0 otherwise, and 3 while
/// somebody sleeps waiting for it in a hypervisor.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Lock(pub core::sync::atomic::AtomicU8);

/// What a kernel knows about where it runs: the facts beside the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Privilege level of kernel segments: 0, or 1 under lguest and 32-bit Xen.
    pub kernel_rpl: u8,
    /// Whether PAE processes may share the kernel's page directory.
    pub shared_kernel_pmd: bool,
    /// Whether the kernel runs on a hypervisor's interface.
    pub paravirt_enabled: bool,
    /// What the boot banner says.
    pub name: &'static str,
}

impl Info {
    /// Bare hardware.
    pub const NATIVE: Self = Self {
        kernel_rpl: 0,
        shared_kernel_pmd: true,
        paravirt_enabled: false,
        name: "bare hardware",
    };
}
