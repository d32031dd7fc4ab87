//! Operations that are bound at run time, called without costing the caller a register,
//! and patched into a single instruction where there is nothing to virtualize.
//!
//! # The idea in two minutes
//!
//! A kernel turns interrupts off with one instruction, `cli`. Under a hypervisor it should
//! store a byte instead, or call somebody. So the instruction becomes a call through a
//! table, and the table is filled when the kernel knows where it runs. That is easy; what
//! it costs is not obvious. To the compiler a call is a place where every register that
//! the C convention lets a function trash *is* trashed: nine on x86-64. Values that lived
//! there move to the stack before each call and back after it, even when the function
//! called is two instructions long, and even after the call was patched back into `cli`:
//! the code around it was made for a call, and stays so.
//!
//! ```text
//!   before: a C call                    after: a callee-save call
//!
//!   push rbx, rbp, r12 ... r15          (nothing to save)
//!   mov  [rsp+8], rdi     ; spill
//!   call [table.irq_disable]            call [table.irq_disable]      6 bytes
//!        |                                   |
//!        v                                   v
//!   irq_disable:                        thunk:                        or, patched:
//!        may trash rax rcx rdx               push rcx rdx rsi rdi
//!        rsi rdi r8 r9 r10 r11                    r8 r9 r10 r11         cli
//!        ret                                 call irq_disable           nop (5 bytes)
//!        |                                   pop  r11 ... rcx
//!        v                                   ret
//!   mov  rdi, [rsp+8]     ; reload           |
//!   ...                                      v  only rax may have changed
//!   pop  r15 ... rbx                    ...
//! ```
//!
//! The remedy: tell the compiler that the call loses the return register only, and make it
//! true. A function that the compiler made is wrapped in a **thunk** that saves the rest
//! ([`callee_save`](macro@callee_save)). One written in assembler may
//! [promise](CalleeSave::promise) that it keeps them itself. And because the caller gave
//! up nothing, replacing the call by the instruction gives native speed.
//!
//! # What there is
//!
//! * [`convention`]: which registers, as one table. Call sites, thunks and tests follow it.
//! * [`callee_save`](macro@callee_save), [`dynamic`], [`thunk_text!`]: thunks at compile
//!   time, at run time, and as text for 32-bit code.
//! * [`CalleeSave`], [`Plain`], [`JumpTarget`]: pointers that carry their convention in the
//!   type. Mixing them up does not compile.
//! * [`family!`]: declares a table of ops. The x86 ones of Linux are in [`families`].
//! * [`Sites`], [`Unpatched::apply`]: each call site records itself; patching rewrites it to
//!   instructions, nops, a direct call, or leaves it, and says which.
//! * [`backend`]: native, lguest, Xen, VMI, vSMP, KVM.
//! * [`Text`]: writing text is the kernel's business. [`user`] does it for programs.
//! * [`probe`]: tests a promise at run time.
//!
//! # An op from declaration to patch
//!
//! ```
//! use pvops::user::{DualMapping, Threads};
//! use pvops::{Binding, Bindings, Family, Sites, callee_save};
//!
//! // A family with one op, and what it is bound to until somebody knows better.
//! pvops::family! {
//!     mod clock {
//!         use super::ticks_by_counting;
//!         /// Ticks since the start.
//!         callee_save fn ticks() -> u64 = pvops::Binding::call(ticks_by_counting::CALLEE_SAVE);
//!     }
//! }
//!
//! #[callee_save] // an ordinary function, and its thunk beside it
//! fn ticks_by_counting() -> u64 {
//!     1
//! }
//!
//! #[callee_save]
//! fn better_ticks() -> u64 {
//!     2
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! assert_eq!(clock::ticks(), 1); // works from the first instruction
//!
//! // Bind, then patch.
//! let mut family = clock::Family::claim()?;
//! let mut bindings = Bindings::new("better");
//! bindings.bind(clock::op::Ticks, Binding::call(better_ticks::CALLEE_SAVE))?;
//! family.bind(&bindings)?;
//! let sites = Sites::of_program();
//! let mut text = DualMapping::around(sites, Threads::stop(40))?;
//! let (patched, report) = family.apply(sites, &mut text, |_| ()).map_err(|(_, e)| e)?;
//! assert_eq!(clock::ticks(), 2);
//! assert_eq!((report.direct, report.indirect), (report.sites(), 0));
//! # drop(patched);
//! # Ok(())
//! # }
//! ```
//!
//! Two complete programs are among the examples: `kernel_irq`, a tiny kernel's interrupt
//! ops, and `cpu_feature`, which picks an implementation by CPU feature at start.
//!
//! # Limits
//!
//! Arguments go in registers only: six words at most. Thunks keep general registers; where
//! the compiler uses vector registers every site lists those as lost (a thunk written by
//! [`dynamic`] can keep them). Records keep the functions they lie in from being dropped
//! by the linker; the compiler may drop or duplicate calls as it likes, and records follow.
//!
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
pub use error::{BindError, Cause, HalfDone, PatchError, TextError};
pub use family::{Bindings, Family, Op, OpInfo, Patched, Slots, Table, Unpatched};
pub use pointer::{CalleeSave, FnPtr, JumpTarget, Plain};
pub use pvops_macros::{callee_save, family, thunk_text};
pub use report::{Form, Outcome, Report, Why};
pub use site::{Site, Sites};
pub use text::{Spans, Text};
pub use word::Word;
