//! The macros of `pvops`. Use them through that crate, which documents them.
//!
//! The text they generate is derived from the table of conventions that `pvops` itself
//! is built on: the same source file, compiled into both crates.

mod callee_save;
// Half of the table's methods serve only the run-time half of the crate.
#[allow(dead_code, unreachable_pub)]
#[path = "../../pvops/src/convention.rs"]
mod convention;
mod family;
mod signature;
mod site;
mod thunk;

use proc_macro::TokenStream;

/// Makes an ordinary function callable where only the return register may change.
///
/// The function becomes `extern "sysv64"`. A type of its name appears beside it, whose
/// constant `NAME::CALLEE_SAVE` is the pointer to its thunk, to be bound to an op:
///
/// ```text
/// #[callee_save]
/// fn save_fl() -> usize { ... }
///
/// bindings.bind(irq::op::SaveFl, Binding::call(save_fl::CALLEE_SAVE))?;
/// ```
///
/// Arguments are words in registers, six at most; the result is a word or nothing.
#[proc_macro_attribute]
pub fn callee_save(attribute: TokenStream, item: TokenStream) -> TokenStream {
    callee_save::expand(attribute.into(), item.into())
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

/// Declares a family of operations: a table, a type and a function for each.
///
/// ```text
/// pvops::family! {
///     /// Documentation of the module.
///     pub mod irq {
///         use crate::something;                  // as many as needed
///         /// Documentation of the op.
///         callee_save unsafe fn restore_fl(flags: usize) = native::RESTORE_FL;
///         callee_save(room = 10) fn irq_disable();
///     }
/// }
/// ```
///
/// An op is `callee_save` (its sites lose the return register only), `plain` (they lose
/// what any function may trash), `jump` (returns `!`; nothing is saved) or `direct` (an
/// ordinary call through the pointer, never patched). `room = N` reserves bytes at each
/// site for instructions longer than the call's six. `= binding` is the default; ops
/// without one must be bound.
///
/// The module then has the functions, `Family` (to claim it), and `op` with one type for
/// each op.
#[proc_macro]
pub fn family(input: TokenStream) -> TokenStream {
    family::expand(input.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// The assembly text of a thunk, as a string literal for `global_asm!`.
///
/// `thunk_text!(32, "label", "callee")`: the width (32 or 64), the thunk's label, and the
/// callee as the assembler shall spell it. The sets come from the table of conventions:
/// 32-bit thunks keep ECX and let a pair in EDX:EAX through.
#[proc_macro]
pub fn thunk_text(input: TokenStream) -> TokenStream {
    thunk::expand_text(input.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}
