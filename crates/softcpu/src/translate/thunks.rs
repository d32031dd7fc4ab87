//! The code around translated blocks: the way in, the ways out, and calls back to Rust.
//!
//! Made once, at the start of the code memory. The calls back are the register-saving
//! thunks of this engine: a block that wants an instruction interpreted loses no register.

use iced_x86::{Code, Instruction, Register as R};

use super::assembler::{Assembler, Condition, NotCopied};
use super::context::{AVX, SSE, X87};
use super::fields;
use super::registers::{VALUE, pinned};
use super::returns::DEPTH;
use super::run::{go_on, go_on_behind_split, go_on_in_hot, interpret, interpret_last};
use super::string_runs::StringRuns;

/// Why translated code was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Exit {
    /// RIP is exact: find the block there.
    Next = 1,
    /// As `Next`, by the link whose number is in the context: RIP is not set.
    Link = 2,
    /// The block at RIP wants what it may not have (the vector unit): interpret it.
    Interpret = 3,
    /// An instruction wants the machine.
    Machine = 4,
    /// An instruction has faulted, which is for the run loop to deliver.
    Fault = 5,
    /// As `Next`: what stands for the block at RIP is closed.
    Closed = 6,
}

/// Addresses of the thunks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Thunks {
    /// `extern "sysv64" fn(block) -> Exit`, with the base set.
    pub(super) enter: u64,
    /// Goes on at RIP from RAX, or leaves with [`Exit::Next`].
    pub(super) leave_at: u64,
    /// Leaves with [`Exit::Link`] by the link whose number is in EAX.
    pub(super) leave_by_link: u64,
    /// Leaves with [`Exit::Interpret`] and RIP from RAX.
    pub(super) leave_to_interpret: u64,
    /// Leaves with [`Exit::Closed`] and RIP from RAX.
    pub(super) leave_closed: u64,
    /// Goes on at RIP from RAX, or leaves with [`Exit::Next`]: what the trace at the address in
    /// the context's spare field checks at once cannot be. Where that begins is in the context, too.
    pub(super) leave_split: u64,
    /// Goes on at RIP from RAX, or leaves with [`Exit::Next`]: the trace at the address in the
    /// context's spare field is hot.
    pub(super) leave_hot: u64,
    /// Called with an op in RAX: runs it and returns, or goes elsewhere, or leaves.
    pub(super) interpret: u64,
    /// The same for the last op of a block: never returns.
    pub(super) interpret_last: u64,
    /// Loads what may be loaded of the vector unit.
    pub(super) load_vectors: u64,
    /// Loads the x87 unit if it may be.
    pub(super) load_x87: u64,
    /// Called for a run of elements: does it and sets ZF, or does nothing.
    pub(super) strings: StringRuns,
}

/// Survives calls of Rust, once the guest's register in it is saved.
const KEPT: R = R::RBX;
/// What System V callees preserve.
const CALLEE_SAVED: [R; 6] = [R::RBX, R::RBP, R::R12, R::R13, R::R14, R::R15];

/// Makes them for code memory whose first byte is executed at `base`.
///
/// # Errors
/// None, unless the assembler is wrong.
pub(super) fn make(base: u64) -> Result<(Vec<u8>, Thunks), NotCopied> {
    let mut code = Assembler::new(base);
    let mut thunks = Thunks::default();
    let here = |code: &Assembler| base.wrapping_add(code.len() as u64);

    thunks.enter = here(&code);
    for register in CALLEE_SAVED {
        code.emit(&Instruction::with1(Code::Push_r64, register).map_err(|_| NotCopied)?)?;
    }
    // sub rsp, 8: aligned as callees want it.
    code.bytes(&[0x48, 0x83, 0xec, 0x08]);
    // A return to an address for which no call was noted: an address like any other, so that one
    // could go there.
    code.constant(VALUE, 0);
    code.push_value();
    let begin = code.label();
    code.call_label(begin);
    code.forget_calls();
    code.constant(VALUE, 0);
    let unforeseen = code.label();
    code.jump(unforeseen);
    code.bind(begin);
    code.store(fields::HOST_STACK, R::RSP);
    code.lea(VALUE, R::RSP, R::None, 1, i64::from(DEPTH).wrapping_mul(-16))?;
    code.store(fields::STACK_LIMIT, VALUE);
    code.copy(VALUE, R::RDI);
    load_registers(&mut code);
    // jmp rax
    code.bytes(&[0xff, 0xe0]);

    let save_vectors = here(&code);
    save_vector_registers(&mut code)?;
    // ret
    code.bytes(&[0xc3]);

    // Once the general registers are saved.
    let save_units = here(&code);
    let not_loaded = code.label();
    code.test_field(fields::VECTORS, X87.into());
    code.jump_if(Condition::EQUAL, not_loaded);
    code.save_x87()?;
    code.bind(not_loaded);
    let none = code.label();
    code.test_field(fields::VECTORS, (SSE | AVX).into());
    code.jump_if(Condition::EQUAL, none);
    code.call(save_vectors);
    code.bind(none);
    code.bytes(&[0xc3]);

    thunks.load_vectors = here(&code);
    let none = code.label();
    code.test_field(fields::VECTORS, (SSE | AVX).into());
    let fresh = code.label();
    code.jump_if(Condition::EQUAL, fresh);
    code.call(save_vectors);
    code.bind(fresh);
    code.load(VALUE, fields::ALLOWED);
    // and eax, SSE | AVX
    code.bytes(&[0x83, 0xe0, SSE | AVX]);
    code.jump_if(Condition::EQUAL, none);
    code.or(VALUE, fields::VECTORS);
    code.store(fields::VECTORS, VALUE);
    load_vector_registers(&mut code)?;
    code.bind(none);
    code.bytes(&[0xc3]);

    thunks.load_x87 = here(&code);
    code.load_x87()?;
    code.bytes(&[0xc3]);

    // With the reason in RAX and all registers saved.
    let left = here(&code);
    code.forget_calls();
    // add rsp, 24
    code.bytes(&[0x48, 0x83, 0xc4, 24]);
    for register in CALLEE_SAVED.iter().rev() {
        code.emit(&Instruction::with1(Code::Pop_r64, *register).map_err(|_| NotCopied)?)?;
    }
    code.bytes(&[0xc3]);

    // With the reason in RAX.
    let leave = here(&code);
    save_all(&mut code, save_units);
    code.copy(VALUE, KEPT);
    code.jump_to(left);

    for (thunk, keeps, exit) in [
        (&mut thunks.leave_by_link, fields::LINK, Exit::Link),
        (&mut thunks.leave_to_interpret, fields::RIP, Exit::Interpret),
        (&mut thunks.leave_closed, fields::RIP, Exit::Closed),
    ] {
        *thunk = here(&code);
        code.store(keeps, VALUE);
        code.constant(VALUE, exit as u64);
        code.jump_to(leave);
    }

    // With where to go on in RAX: a block, or else the reason to leave; and all registers
    // saved.
    let elsewhere = here(&code);
    // cmp rax, 16
    code.bytes(&[0x48, 0x83, 0xf8, 16]);
    let leaves = code.label();
    code.jump_if(Condition::BELOW, leaves);
    code.forget_calls();
    load_registers(&mut code);
    code.bytes(&[0xff, 0xe0]);
    code.bind(leaves);
    code.jump_to(left);

    code.bind(unforeseen);
    for (thunk, called) in [
        (&mut thunks.leave_at, go_on as *const ()),
        (&mut thunks.leave_split, go_on_behind_split as *const ()),
        (&mut thunks.leave_hot, go_on_in_hot as *const ()),
    ] {
        *thunk = here(&code);
        code.store(fields::RIP, VALUE);
        save_all(&mut code, save_units);
        code.load(R::RDI, fields::VCPU);
        code.constant(VALUE, called as u64);
        code.bytes(&[0xff, 0xd0]);
        code.jump_to(elsewhere);
    }

    thunks.interpret = here(&code);
    save_all(&mut code, save_units);
    code.load(R::RDI, fields::VCPU);
    code.copy(R::RSI, KEPT);
    code.bytes(&[0x48, 0x83, 0xec, 0x08]);
    code.constant(VALUE, interpret as *const () as u64);
    // call rax; add rsp, 8; test rax, rax
    code.bytes(&[0xff, 0xd0, 0x48, 0x83, 0xc4, 0x08, 0x48, 0x85, 0xc0]);
    let goes_on = code.label();
    code.jump_if(Condition::EQUAL, goes_on);
    code.jump_to(elsewhere);
    code.bind(goes_on);
    for (units, load) in [(SSE | AVX, thunks.load_vectors), (X87, thunks.load_x87)] {
        // test ebp, units
        code.bytes(&[0xf7, 0xc5, units, 0, 0, 0]);
        let unused = code.label();
        code.jump_if(Condition::EQUAL, unused);
        code.call(load);
        code.bind(unused);
    }
    load_registers(&mut code);
    code.bytes(&[0xc3]);

    thunks.interpret_last = here(&code);
    save_all(&mut code, save_units);
    code.load(R::RDI, fields::VCPU);
    code.copy(R::RSI, KEPT);
    // Called from a block, which is not gone back to: the stack is as a callee wants it
    // once the address is dropped.
    code.bytes(&[0x48, 0x83, 0xc4, 0x08]);
    code.constant(VALUE, interpret_last as *const () as u64);
    code.bytes(&[0xff, 0xd0]);
    code.jump_to(elsewhere);

    thunks.strings = StringRuns::make(&mut code, base)?;

    // They stay where they are.
    let (code, _) = code.finish()?;
    Ok((code, thunks))
}

/// Saves all guest registers for Rust code to come. RAX is kept in [`KEPT`], and which units
/// were loaded in RBP.
fn save_all(code: &mut Assembler, save_units: u64) {
    save_registers(code);
    code.copy(KEPT, VALUE);
    code.load(R::RBP, fields::VECTORS);
    // test ebp, ebp
    code.bytes(&[0x85, 0xed]);
    let unused = code.label();
    code.jump_if(Condition::EQUAL, unused);
    code.call(save_units);
    code.bind(unused);
}

fn load_registers(code: &mut Assembler) {
    for (number, host) in pinned() {
        code.load(host, fields::gpr(number));
    }
}

fn save_registers(code: &mut Assembler) {
    for (number, host) in pinned() {
        code.store(fields::gpr(number), host);
    }
}

fn wide() -> bool {
    std::arch::is_x86_feature_detected!("avx")
}

/// Guest vector registers and MXCSR to the state, the host's MXCSR back; none is loaded
/// then.
#[allow(clippy::arithmetic_side_effects, reason = "sixteen registers follow one another")]
fn save_vector_registers(code: &mut Assembler) -> Result<(), NotCopied> {
    for number in 0..16 {
        let to = fields::vector(number).operand();
        let store = if wide() {
            Instruction::with2(Code::VEX_Vmovaps_ymmm256_ymm, to, R::YMM0 + u32::from(number))
        } else {
            Instruction::with2(Code::Movaps_xmmm128_xmm, to, R::XMM0 + u32::from(number))
        };
        code.emit(&store.map_err(|_| NotCopied)?)?;
    }
    if wide() {
        code.emit(&Instruction::with(Code::VEX_Vzeroupper))?;
    }
    for (instruction, field) in
        [(Code::Stmxcsr_m32, fields::MXCSR), (Code::Ldmxcsr_m32, fields::HOST_MXCSR)]
    {
        code.emit(&Instruction::with1(instruction, field.operand()).map_err(|_| NotCopied)?)?;
    }
    code.and_field(fields::VECTORS, !u64::from(SSE | AVX));
    Ok(())
}

#[allow(clippy::arithmetic_side_effects, reason = "sixteen registers follow one another")]
fn load_vector_registers(code: &mut Assembler) -> Result<(), NotCopied> {
    for number in 0..16 {
        let from = fields::vector(number).operand();
        let load = if wide() {
            Instruction::with2(Code::VEX_Vmovaps_ymm_ymmm256, R::YMM0 + u32::from(number), from)
        } else {
            Instruction::with2(Code::Movaps_xmm_xmmm128, R::XMM0 + u32::from(number), from)
        };
        code.emit(&load.map_err(|_| NotCopied)?)?;
    }
    let load = Instruction::with1(Code::Ldmxcsr_m32, fields::MXCSR.operand());
    code.emit(&load.map_err(|_| NotCopied)?)
}
