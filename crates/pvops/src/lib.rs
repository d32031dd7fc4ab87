//! Paravirtual operations.
#![cfg_attr(not(test), no_std)]
#![cfg(target_arch = "x86_64")]

// The macros name this crate from the outside; so do the families it ships.
extern crate self as pvops;

pub mod backend;
pub mod binding;
pub mod convention;
pub mod dynamic;
pub mod engine;
pub mod error;
pub mod families;
pub mod family;
pub mod plan;
pub mod pointer;
pub mod probe;
pub mod report;
pub mod site;
pub mod text;
#[cfg(target_os = "linux")]
pub mod user;
pub mod word;

pub use binding::{Binding, Code, Erase, Erased, Fixup, Template};
pub use convention::{CallKind, Gpr, RegSet, Width};
pub use error::{BindError, PatchError, TextError};
pub use family::{Bindings, Family, Op, OpInfo, Patched, Slots, Table, Unpatched};
pub use pointer::{CalleeSave, FnPtr, JumpTarget, Plain};
pub use pvops_macros::{callee_save, family, thunk_text};
pub use report::{Form, Outcome, Report, Why};
pub use site::{Site, Sites};
pub use text::{Spans, Text};
pub use word::Word;
