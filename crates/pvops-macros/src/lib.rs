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

/// Emits a register-saving thunk beside a function. See `pvops::callee_save`.
#[proc_macro_attribute]
pub fn callee_save(attribute: TokenStream, item: TokenStream) -> TokenStream {
    callee_save::expand(attribute.into(), item.into())
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

/// Declares a family of operations. See `pvops::family`.
#[proc_macro]
pub fn family(input: TokenStream) -> TokenStream {
    family::expand(input.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// The assembly text of a thunk, as a string literal. See `pvops::thunk_text`.
#[proc_macro]
pub fn thunk_text(input: TokenStream) -> TokenStream {
    thunk::expand_text(input.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}
