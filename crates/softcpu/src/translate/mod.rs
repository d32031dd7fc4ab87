//! The translator: guest code as host code.
//!
//! Same architecture on both sides, so most instructions are copied as they are, their
//! registers renamed (`registers`) and their memory operand checked against the data TLB
//! in line (`access`). Blocks are the interpreter's own, decoded and validated by it; those that
//! turn out hot are translated (`block`), kept (`translations`, `regions`) and entered from then
//! on (`run`). Whatever a block does not do itself it has the interpreter do, one instruction
//! at a time, through thunks that keep every register (`thunks`): the interpreter stays the
//! definition.
//!
//! The vCPUs of a machine share what is translated (`code_cache`); each has a `translator` of its
//! own, which knows how it stands with that. A block is entered from another in its page by a
//! direct jump, from anywhere by a look into the jump cache (`jumps`), and else by the run loop.
//! When the code under it changes, its first instruction is replaced by a jump out.

mod access;
mod alignment;
mod assembler;
mod batch;
mod block;
mod branch;
mod checks;
mod clone;
mod code_cache;
mod cold;
mod config;
pub(crate) mod context;
mod copy;
mod counters;
mod division;
mod effects;
mod faults;
mod fields;
mod finding;
mod flags;
mod flags_word;
mod frames;
mod gs_pages;
mod heads;
mod invalidation;
pub(crate) mod jumps;
mod lending;
mod machine_state;
mod maker;
mod making;
pub(crate) mod manner;
mod memory_form;
mod mirrored;
pub(crate) mod mode;
mod ops;
mod orders;
mod patience;
mod privileged;
mod regions;
mod registers;
mod relocate;
mod returns;
mod route;
mod run;
mod scratch;
mod shapes;
mod sharing;
mod splits;
mod stack;
mod streams;
mod string_runs;
mod strings;
#[cfg(test)]
mod tests;
mod thunks;
mod trace;
mod translations;
mod translator;
mod verify;
mod wishes;
mod workbench;
mod workshop;
mod x87;

pub use batch::Batch;
pub use code_cache::CodeCache;
pub use config::{BadTranslation, Config, Invalidate};
pub use counters::Counters;
pub(crate) use faults::pass_on as pass_on_fault;
pub(crate) use frames::Sought;
pub(crate) use run::{THRESHOLD, Translation};
pub(crate) use translations::Entry;
pub(crate) use translator::Translator;
pub use workshop::Workshop;

/// What a test does to an instruction, so that its translation is wrong.
#[cfg(test)]
pub(crate) type Mistake = fn(&mut iced_x86::Instruction, &mut crate::decode::op::Op);
