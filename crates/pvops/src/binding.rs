//! What a backend gives for an op: a pointer, and what may stand in its place.

use crate::convention::RegSet;
use crate::pointer::{CalleeSave, FnPtr, JumpTarget, Plain};

/// A place in a template's bytes that depends on where the bytes land.
#[derive(Clone, Copy, Debug)]
pub struct Fixup {
    /// Offset of the four bytes of displacement.
    pub at: u8,
    /// Offset of the end of their instruction, which the displacement counts from.
    pub end: u8,
    /// What they point at.
    pub target: *const (),
}

/// Instructions that can replace the call.
///
/// They find the arguments in the registers of the convention and leave a result in its
/// return register. In 64-bit code the first of them may get segment prefixes in front,
/// which mean nothing there, to fill the site.
#[derive(Clone, Copy, Debug)]
pub struct Code {
    /// The instructions.
    pub bytes: &'static [u8],
    /// Registers they change, the return register included.
    pub clobbers: RegSet,
    /// Displacements to fill in (64-bit code only).
    pub fixups: &'static [Fixup],
}

/// What may stand at a site in place of a call.
#[derive(Clone, Copy, Debug)]
pub enum Template {
    /// Nothing: the callee must be called.
    Call,
    /// Nothing needs to be done at all.
    Nop,
    /// The result is the argument.
    Identity,
    /// These instructions do it.
    Inline(Code),
}

/// One op's implementation by one backend, typed by the op's pointer.
#[derive(Clone, Copy, Debug)]
pub struct Binding<P> {
    pointer: P,
    template: Template,
}

impl<P: Copy> Binding<P> {
    /// By call only.
    #[must_use]
    pub const fn call(pointer: P) -> Self {
        Self { pointer, template: Template::Call }
    }

    /// By call, or in line where the site has room for `code`.
    ///
    /// # Safety
    /// `code` must do what the pointer's function does, be complete instructions for the
    /// mode the sites run in, fall through at its end, change no register outside
    /// `clobbers` and neither the stack pointer nor memory below it, other than by
    /// balanced pushes and pops. It must not call: a callee that runs while its site is
    /// changed again would return into the middle of another form.
    #[must_use]
    pub const unsafe fn inline(pointer: P, code: Code) -> Self {
        Self { pointer, template: Template::Inline(code) }
    }
}

impl<F: FnPtr> Binding<CalleeSave<F>> {
    /// The op does nothing here.
    #[must_use]
    pub const fn nop() -> Self
    where
        F: FnPtr<Ret = ()>,
    {
        Self { pointer: CalleeSave::nop(), template: Template::Nop }
    }

    /// The op returns its argument here.
    #[must_use]
    pub const fn identity<T: crate::Word>() -> Self
    where
        F: FnPtr<Args = (T,), Ret = T>,
    {
        Self { pointer: CalleeSave::identity(), template: Template::Identity }
    }

    /// For the slot's eyes: without its type.
    #[must_use]
    pub const fn erase(self) -> Erased {
        Erased { target: self.pointer.address(), template: self.template }
    }
}

impl<F: FnPtr> Binding<Plain<F>> {
    /// The op does nothing here.
    #[must_use]
    pub const fn nop() -> Self
    where
        F: FnPtr<Ret = ()>,
    {
        Self { pointer: Plain::nop(), template: Template::Nop }
    }

    /// The op returns its argument here.
    #[must_use]
    pub const fn identity<T: crate::Word>() -> Self
    where
        F: FnPtr<Args = (T,), Ret = T>,
    {
        Self { pointer: Plain::identity(), template: Template::Identity }
    }

    /// For the slot's eyes: without its type.
    #[must_use]
    pub const fn erase(self) -> Erased {
        Erased { target: self.pointer.address(), template: self.template }
    }
}

impl<F: Copy> Binding<JumpTarget<F>> {
    /// For the slot's eyes: without its type.
    #[must_use]
    pub const fn erase(self) -> Erased {
        Erased { target: self.pointer.address(), template: self.template }
    }
}

/// Bindings of any op, as [`Bindings::bind`](crate::Bindings::bind) takes them.
pub trait Erase {
    /// The op's pointer type.
    type Pointer;
    /// The binding without its type.
    fn erased(self) -> Erased;
}

macro_rules! erase {
    ($wrapper:ident, $bound:path) => {
        impl<F: $bound> Erase for Binding<$wrapper<F>> {
            type Pointer = $wrapper<F>;
            fn erased(self) -> Erased {
                self.erase()
            }
        }
    };
}
erase!(CalleeSave, FnPtr);
erase!(Plain, FnPtr);
erase!(JumpTarget, Copy);

/// A binding without its type: what the patcher works with.
#[derive(Clone, Copy, Debug)]
pub struct Erased {
    /// The callee's address.
    pub target: *const (),
    /// What may stand in place of the call.
    pub template: Template,
}

// SAFETY: addresses of code and of immutable bytes; nothing is reached through them here.
unsafe impl Send for Erased {}
// SAFETY: as above.
unsafe impl Sync for Erased {}
// SAFETY: as above.
unsafe impl Sync for Fixup {}
// SAFETY: as above.
unsafe impl Send for Fixup {}
