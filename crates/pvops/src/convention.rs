//! The calling conventions, as one table.
//!
//! Everything the crate knows about registers is derived from the constants
//! [`X86_64`] and [`X86_32`]: what a call site tells the compiler it loses, what a
//! thunk pushes, what the dynamic thunk writer encodes, what a template may touch, and
//! what the tests fill with patterns. (Where site and thunk were two hand-written
//! lists they drifted apart the day they were written.)
//!
//! |                      | x86-64 (System V)       | x86-32 (register arguments) |
//! |----------------------|-------------------------|-----------------------------|
//! | arguments, in order  | rdi rsi rdx rcx r8 r9   | eax edx ecx                 |
//! | return, scratch too  | rax                     | eax edx                     |
//! | other scratch        | r10 r11                 | none                        |
//! | plain call loses     | all nine of these       | eax edx ecx                 |
//! | callee-save call loses | rax                   | eax edx                     |
//! | thunk saves          | rcx rdx rsi rdi r8-r11  | ecx                         |
//! | stack at a call      | 16                      | 16 (user), 4 in old kernels |
//!
//! The file uses nothing but `core`: the macro crate compiles it as its own module, so
//! that the text it generates comes from the same lines.

/// A general register, by its hardware number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum Gpr {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

impl Gpr {
    /// All sixteen, by number.
    pub const ALL: [Self; 16] = [
        Self::Rax,
        Self::Rcx,
        Self::Rdx,
        Self::Rbx,
        Self::Rsp,
        Self::Rbp,
        Self::Rsi,
        Self::Rdi,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
    ];

    /// The register's name in code of `width`; the registers that 32-bit code lacks keep
    /// their 64-bit name.
    #[must_use]
    pub const fn name(self, width: Width) -> &'static str {
        const WIDE: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        const NARROW: [&str; 16] = [
            "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        match width {
            Width::Bits64 => WIDE[self as usize],
            Width::Bits32 => NARROW[self as usize],
        }
    }
}

/// A set of general registers: bit n is register number n.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct RegSet(u16);

impl RegSet {
    /// No register.
    pub const EMPTY: Self = Self(0);

    /// The set of the registers listed.
    #[must_use]
    pub const fn of(registers: &[Gpr]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < registers.len() {
            bits |= 1 << registers[i] as u16;
            i += 1;
        }
        Self(bits)
    }

    /// The set with these bits.
    #[must_use]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Bit n for register number n.
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Registers in either.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Registers in `self` that `other` lacks.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether the register is a member.
    #[must_use]
    pub const fn contains(self, register: Gpr) -> bool {
        self.0 & (1 << register as u16) != 0
    }

    /// Whether every member is one of `other`'s.
    #[must_use]
    pub const fn is_subset(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }

    /// How many members.
    #[must_use]
    pub const fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The members, by number.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Gpr> {
        Gpr::ALL.into_iter().filter(move |r| self.contains(*r))
    }
}

impl core::fmt::Debug for RegSet {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Which instruction set the code is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 64-bit mode.
    Bits64,
    /// 32-bit protected or compatibility mode.
    Bits32,
}

/// How an operation is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CallKind {
    /// An ordinary function: the caller gives up every register the ABI lets it lose.
    Plain = 0,
    /// Through a thunk, or into assembler that promises as much: only the return
    /// registers are lost.
    CalleeSave = 1,
    /// A jump that does not come back: nothing of the caller is left to lose, and the
    /// target finds every register as it was.
    Jump = 2,
}

impl CallKind {
    /// The kind a site record names, if there is one.
    #[must_use]
    pub const fn from_u8(kind: u8) -> Option<Self> {
        match kind {
            0 => Some(Self::Plain),
            1 => Some(Self::CalleeSave),
            2 => Some(Self::Jump),
            _ => None,
        }
    }
}

/// One calling convention.
#[derive(Clone, Copy, Debug)]
pub struct Convention {
    /// The code it is for.
    pub width: Width,
    /// Argument registers, first argument first. There are no stack arguments: the thunk
    /// puts its own words between caller and callee.
    pub args: &'static [Gpr],
    /// Return registers, low word first. Always scratch, even for operations that return
    /// nothing.
    pub ret: &'static [Gpr],
    /// Registers that are neither, and that a function may trash all the same.
    pub scratch: &'static [Gpr],
    /// Bytes in a stack slot.
    pub slot: u32,
    /// The alignment of the stack pointer just before a `call`, in bytes.
    pub stack_align: u32,
}

/// x86-64, System V.
pub const X86_64: Convention = Convention {
    width: Width::Bits64,
    args: &[Gpr::Rdi, Gpr::Rsi, Gpr::Rdx, Gpr::Rcx, Gpr::R8, Gpr::R9],
    ret: &[Gpr::Rax],
    scratch: &[Gpr::R10, Gpr::R11],
    slot: 8,
    stack_align: 16,
};

/// x86-32 with arguments in registers, as Linux builds itself (`-mregparm=3`).
pub const X86_32: Convention = Convention {
    width: Width::Bits32,
    args: &[Gpr::Rax, Gpr::Rdx, Gpr::Rcx],
    ret: &[Gpr::Rax, Gpr::Rdx],
    scratch: &[],
    slot: 4,
    stack_align: 16,
};

/// Vector, mask and x87 registers: an ordinary function may trash all of them, and a
/// thunk saves none, so on targets whose compiler uses them every call site lists them.
pub const VECTOR_CLOBBERS: &[&str] = &[
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
    "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20",
    "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28", "zmm29", "zmm30",
    "zmm31", "k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "st(0)", "st(1)", "st(2)", "st(3)",
    "st(4)", "st(5)", "st(6)", "st(7)", "mm0", "mm1", "mm2", "mm3", "mm4", "mm5", "mm6", "mm7",
];

impl Convention {
    /// The convention for code of that width.
    #[must_use]
    pub const fn of(width: Width) -> &'static Self {
        match width {
            Width::Bits64 => &X86_64,
            Width::Bits32 => &X86_32,
        }
    }

    /// Everything an ordinary function may trash.
    #[must_use]
    pub const fn caller_saved(&self) -> RegSet {
        RegSet::of(self.args).union(RegSet::of(self.ret)).union(RegSet::of(self.scratch))
    }

    /// What a call site of this kind loses.
    #[must_use]
    pub const fn clobbers(&self, kind: CallKind) -> RegSet {
        match kind {
            CallKind::Plain => self.caller_saved(),
            CallKind::CalleeSave => RegSet::of(self.ret),
            CallKind::Jump => RegSet::EMPTY,
        }
    }

    /// What a thunk saves: the difference between the two kinds of call.
    #[must_use]
    pub const fn thunk_saves(&self) -> RegSet {
        self.clobbers(CallKind::Plain).minus(self.clobbers(CallKind::CalleeSave))
    }

    /// Bytes a thunk that pushes `slots` registers must leave below them so that the
    /// callee finds its stack aligned. The thunk itself was entered by a call made on an
    /// aligned stack, so one return address lies above.
    #[must_use]
    pub const fn thunk_pad(&self, slots: u32) -> u32 {
        let used = (slots + 1) * self.slot;
        (self.stack_align - used % self.stack_align) % self.stack_align
    }
}

/// The convention of the code this crate is compiled into.
pub const NATIVE: &Convention = &X86_64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_sets_are_the_published_ones() {
        use Gpr::*;
        assert_eq!(X86_64.thunk_saves(), RegSet::of(&[Rcx, Rdx, Rsi, Rdi, R8, R9, R10, R11]));
        assert_eq!(X86_64.clobbers(CallKind::CalleeSave), RegSet::of(&[Rax]));
        assert_eq!(X86_64.caller_saved().len(), 9);
        assert_eq!(X86_32.thunk_saves(), RegSet::of(&[Rcx]));
        assert_eq!(X86_32.clobbers(CallKind::CalleeSave), RegSet::of(&[Rax, Rdx]));
        assert_eq!(X86_32.caller_saved().len(), 3);
    }

    #[test]
    fn the_callee_finds_its_stack_aligned() {
        for convention in [&X86_64, &X86_32] {
            for slots in 0..20 {
                let below = (slots + 1) * convention.slot + convention.thunk_pad(slots);
                assert_eq!(below % convention.stack_align, 0);
            }
        }
        assert_eq!(X86_64.thunk_pad(8), 8);
    }
}
