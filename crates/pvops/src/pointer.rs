//! Pointers that carry their convention in their type.
//!
//! A table slot for a callee-save op takes a [`CalleeSave`], one for a plain op a
//! [`Plain`]. Neither can be called as a function, and a bare function pointer is
//! neither: mixing the conventions does not compile.

use core::arch::naked_asm;
use core::mem::transmute_copy;

mod sealed {
    pub trait Sealed {}
}

/// A function pointer of the `sysv64` convention with up to six arguments.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a function pointer that an op can hold",
    label = "expected `extern \"sysv64\" fn(...)` with at most six arguments",
    note = "ops take all arguments in registers"
)]
pub trait FnPtr: Copy + sealed::Sealed {
    /// Its arguments, as a tuple.
    type Args;
    /// Its result.
    type Ret;
}

macro_rules! functions {
    ($(($($arg:ident)*))*) => {$(
        impl<R $(, $arg)*> sealed::Sealed for extern "sysv64" fn($($arg),*) -> R {}
        impl<R $(, $arg)*> FnPtr for extern "sysv64" fn($($arg),*) -> R {
            type Args = ($($arg,)*);
            type Ret = R;
        }
        impl<R $(, $arg)*> sealed::Sealed for unsafe extern "sysv64" fn($($arg),*) -> R {}
        impl<R $(, $arg)*> FnPtr for unsafe extern "sysv64" fn($($arg),*) -> R {
            type Args = ($($arg,)*);
            type Ret = R;
        }
    )*};
}
functions!(() (A) (A B) (A B C) (A B C D) (A B C D E) (A B C D E G));

/// Does nothing, in either convention.
#[unsafe(naked)]
pub(crate) extern "sysv64" fn nothing() {
    naked_asm!("endbr64", "ret")
}

/// Returns its argument, in either convention.
#[unsafe(naked)]
pub(crate) extern "sysv64" fn same(word: usize) -> usize {
    naked_asm!("endbr64", "mov rax, rdi", "ret")
}

/// Where ops without a binding lead: an undefined instruction, not a random address.
#[unsafe(naked)]
pub(crate) extern "sysv64" fn unbound() {
    naked_asm!("endbr64", "ud2")
}

/// A pointer of one word, whatever its type: how pointers get into slots.
const fn erase<F: Copy>(function: F) -> *const () {
    const { assert!(size_of::<F>() == size_of::<*const ()>()) };
    // SAFETY: same size, checked above; every pointer is a valid `*const ()`.
    unsafe { transmute_copy(&function) }
}

/// A function that preserves every register but the return register: a thunk, or
/// assembler that keeps to the same rule.
///
/// Made by [`callee_save`](macro@crate::callee_save) for ordinary functions, and by
/// [`CalleeSave::promise`] for assembler. It cannot be called, only bound:
///
/// ```compile_fail
/// use pvops::CalleeSave;
/// fn call(f: CalleeSave<extern "sysv64" fn() -> usize>) -> usize {
///     f() // not a function: the compiler would assume the wrong convention
/// }
/// ```
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct CalleeSave<F>(F);

impl<F: FnPtr> CalleeSave<F> {
    /// Takes the author's word that `function` already preserves everything but the
    /// return register.
    ///
    /// [`probe::keeps_promise`](crate::probe::keeps_promise) tests the word at run time.
    ///
    /// # Safety
    /// `function` must be written in assembler from its first to its last instruction (a
    /// naked function, `global_asm!`, a ROM entry) and must preserve every general
    /// register but `rax`; vector registers and arithmetic flags it may trash. A body
    /// made by a compiler never qualifies, however small: stack protectors, profiling
    /// and the next release put registers to use that the source does not show.
    #[must_use]
    pub const unsafe fn promise(function: F) -> Self {
        Self(function)
    }

    /// A function that returns its argument. Sites bound to it are patched to a move.
    #[must_use]
    pub const fn identity<T>() -> Self
    where
        F: FnPtr<Args = (T,), Ret = T>,
        T: crate::Word,
    {
        // SAFETY: `same` returns its argument whatever one-word type it has, touches
        // nothing else, and `F` is a pointer to a function of that shape.
        Self(unsafe { transmute_copy(&(same as extern "sysv64" fn(usize) -> usize)) })
    }

    /// A function that does nothing. Sites bound to it are patched to nops.
    #[must_use]
    pub const fn nop() -> Self
    where
        F: FnPtr<Ret = ()>,
    {
        // SAFETY: `nothing` ignores its arguments, has no result and touches nothing.
        Self(unsafe { transmute_copy(&(nothing as extern "sysv64" fn())) })
    }

    /// Its address.
    #[must_use]
    pub const fn address(self) -> *const () {
        erase(self.0)
    }
}

/// A conventional function, for slots whose sites give up every register it may trash.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Plain<F>(F);

impl<F: FnPtr> Plain<F> {
    /// Wraps a function pointer; needs no promise, because the site expects the worst.
    #[must_use]
    pub const fn new(function: F) -> Self {
        Self(function)
    }

    /// A function that returns its argument.
    #[must_use]
    pub const fn identity<T>() -> Self
    where
        F: FnPtr<Args = (T,), Ret = T>,
        T: crate::Word,
    {
        Self(CalleeSave::<F>::identity().0)
    }

    /// A function that does nothing.
    #[must_use]
    pub const fn nop() -> Self
    where
        F: FnPtr<Ret = ()>,
    {
        Self(CalleeSave::<F>::nop().0)
    }

    /// Its address.
    #[must_use]
    pub const fn address(self) -> *const () {
        erase(self.0)
    }
}

/// What keeps more than asked for may stand where less is asked.
impl<F: FnPtr> From<CalleeSave<F>> for Plain<F> {
    fn from(pointer: CalleeSave<F>) -> Self {
        Self(pointer.0)
    }
}

/// Code that a site jumps to and that never comes back: it finds every register as the
/// site left it.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct JumpTarget<F>(F);

impl<F: Copy> JumpTarget<F> {
    /// Wraps the address of such code.
    ///
    /// # Safety
    /// The code is entered by a jump, so no return address lies on the stack: it must not
    /// be compiler-made, and must leave by an instruction such as `iretq` or `sysretq`.
    #[must_use]
    pub const unsafe fn new(function: F) -> Self {
        Self(function)
    }

    /// Its address.
    #[must_use]
    pub const fn address(self) -> *const () {
        erase(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_and_nop_do_what_they_say() {
        assert_eq!(same(0x1234_5678_9abc_def0), 0x1234_5678_9abc_def0);
        nothing();
        let identity = CalleeSave::<extern "sysv64" fn(u32) -> u32>::identity();
        assert_eq!(identity.address(), same as *const ());
        let nop = Plain::<extern "sysv64" fn(u32, u64)>::nop();
        assert_eq!(nop.address(), nothing as *const ());
    }
}
