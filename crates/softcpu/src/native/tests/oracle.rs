//! Runs one instruction on the host with every register loaded and saved around it.
//!
//! Shares nothing with the stubs: everything sits at fixed addresses below 2 GiB, so
//! that no register is needed to reach it, and all registers, RSP too, are the
//! instruction's. A fault on the host is caught by a signal handler that resumes where
//! the registers are saved.

use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, Once, OnceLock};

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register as R};

use crate::state::VcpuState;
use crate::state::fpu::{FpuState, VectorRegister};
use crate::sync::lock;
use crate::testing::pass_on_fault;

/// Bytes of memory for operands.
pub(super) const DATA: usize = 8192;

/// What the harness loads and saves; at a fixed address.
#[repr(C, align(64))]
struct Registers {
    vec: [VectorRegister; 16],
    fxsave: [u8; 512],
    gpr: [u64; 16],
    rflags: u64,
    mxcsr: u32,
}

#[repr(C, align(4096))]
struct Context {
    input: Registers,
    output: Registers,
    host_rsp: u64,
    host_mxcsr: u32,
    stack: [u64; 64],
    data: Data,
    code: Code4K,
}

#[repr(C, align(4096))]
struct Data([u8; DATA]);
#[repr(C, align(4096))]
struct Code4K([u8; 4096]);

pub(super) struct Oracle {
    context: *mut Context,
    prefix: Vec<u8>,
    suffix: Vec<u8>,
    _turn: MutexGuard<'static, ()>,
}

/// One at a time: the signal handler's mailbox is global.
static TURN: Mutex<()> = Mutex::new(());
/// The code of the instruction that runs: faults there go to [`RESUME`].
/// Who had faults of memory before: translated code has some too.
static FORMER: OnceLock<libc::sigaction> = OnceLock::new();
static START: AtomicU64 = AtomicU64::new(0);
static RESUME: AtomicU64 = AtomicU64::new(0);
static SIGNAL: AtomicI32 = AtomicI32::new(0);

impl Oracle {
    pub(super) fn new() -> Self {
        let turn = lock(&TURN);
        static HANDLERS: Once = Once::new();
        HANDLERS.call_once(catch_faults);
        let (read, write, exec) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
        // SAFETY: a fresh private mapping.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), size_of::<Context>(), read | write | exec, flags, -1, 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        let context: *mut Context = at.cast();
        // SAFETY: the mapping is zeroed and ours.
        unsafe { (*context).host_mxcsr = 0x1f80 };
        let (prefix, suffix) = harness(context);
        Self { context, prefix, suffix, _turn: turn }
    }

    /// The address of operand memory.
    pub(super) fn data_address(&self) -> u64 {
        // SAFETY: in bounds of the mapping.
        unsafe { &raw const (*self.context).data as u64 }
    }

    pub(super) fn data(&mut self) -> &mut [u8; DATA] {
        // SAFETY: in bounds, and borrowed through self.
        unsafe { &mut (*self.context).data.0 }
    }

    /// Runs `bytes` on `state`; `Err` is the signal that it ended in, with the state as
    /// it was then.
    pub(super) fn run(&mut self, bytes: &[u8], state: &mut VcpuState) -> Result<(), i32> {
        let start = self.prefix.len() as u64;
        let code = [&self.prefix, bytes, &self.suffix].concat();
        // SAFETY: the context is ours; the code is far smaller than its area.
        let context = unsafe { &mut *self.context };
        context.code.0[..code.len()].copy_from_slice(&code);
        let input = &mut context.input;
        input.vec = state.vec;
        input.fxsave = state.fpu.fxsave;
        input.gpr.copy_from_slice(&state.gpr[..16]);
        input.rflags = state.rflags.bits() & 0x8d5 | 0x202;
        input.mxcsr = state.mxcsr;
        let base = &raw const context.code as u64;
        SIGNAL.store(0, Ordering::SeqCst);
        RESUME.store(base + start + bytes.len() as u64, Ordering::SeqCst);
        START.store(base + start, Ordering::SeqCst);
        // SAFETY: the harness preserves what System V wants preserved, and the
        // instruction's faults are caught; writes through `context` happen in the call.
        unsafe {
            let call: unsafe extern "sysv64" fn() = std::mem::transmute(base);
            call();
        }
        START.store(0, Ordering::SeqCst);
        // SAFETY: as above; read again after the call.
        let output = unsafe { &(*self.context).output };
        state.vec = output.vec;
        state.fpu = FpuState::from_image(output.fxsave);
        state.gpr[..16].copy_from_slice(&output.gpr);
        state.rflags = state.rflags.with_status(output.rflags);
        state.mxcsr = output.mxcsr;
        match SIGNAL.load(Ordering::SeqCst) {
            0 => Ok(()),
            signal => Err(signal),
        }
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // SAFETY: our own mapping, no longer used.
        unsafe { libc::munmap(self.context.cast(), size_of::<Context>()) };
    }
}

/// What comes before and after the instruction.
fn harness(context: *mut Context) -> (Vec<u8>, Vec<u8>) {
    let gpr = |i: u32| R::RAX + i;
    // SAFETY: only addresses are taken.
    let (input, output, host_rsp, host_mxcsr, stack) = unsafe {
        (
            &raw const (*context).input as u64,
            &raw const (*context).output as u64,
            &raw const (*context).host_rsp as u64,
            &raw const (*context).host_mxcsr as u64,
            &raw const (*context).stack as u64 + 256,
        )
    };
    let at = |address: u64| MemoryOperand::with_displ(address, 4);
    macro_rules! field {
        ($base:expr, $name:ident) => {
            $base + std::mem::offset_of!(Registers, $name) as u64
        };
    }
    let saved = [R::RBX, R::RBP, R::R12, R::R13, R::R14, R::R15];
    let mut before = Vec::new();
    for register in saved {
        before.push(Instruction::with1(Code::Push_r64, register));
    }
    before.push(Instruction::with2(Code::Mov_rm64_r64, at(host_rsp), R::RSP));
    before.push(Instruction::with1(Code::Fxrstor64_m512byte, at(field!(input, fxsave))));
    for i in 0..16_u32 {
        let from = at(field!(input, vec) + u64::from(i) * 32);
        before.push(Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, R::YMM0 + i, from));
    }
    before.push(Instruction::with1(Code::Ldmxcsr_m32, at(field!(input, mxcsr))));
    before.push(Instruction::with2(Code::Mov_r64_imm64, R::RSP, stack));
    before.push(Instruction::with1(Code::Push_rm64, at(field!(input, rflags))));
    before.push(Ok(Instruction::with(Code::Popfq)));
    for i in 0..16_u32 {
        let from = at(field!(input, gpr) + u64::from(i) * 8);
        before.push(Instruction::with2(Code::Mov_r64_rm64, gpr(i), from));
    }
    let mut after = Vec::new();
    for i in 0..16_u32 {
        let to = at(field!(output, gpr) + u64::from(i) * 8);
        after.push(Instruction::with2(Code::Mov_rm64_r64, to, gpr(i)));
    }
    after.push(Instruction::with2(Code::Mov_r64_imm64, R::RSP, stack));
    after.push(Ok(Instruction::with(Code::Pushfq)));
    after.push(Instruction::with1(Code::Pop_rm64, at(field!(output, rflags))));
    after.push(Instruction::with1(Code::Stmxcsr_m32, at(field!(output, mxcsr))));
    for i in 0..16_u32 {
        let to = at(field!(output, vec) + u64::from(i) * 32);
        after.push(Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, to, R::YMM0 + i));
    }
    after.push(Instruction::with1(Code::Fxsave64_m512byte, at(field!(output, fxsave))));
    after.push(Ok(Instruction::with(Code::Fninit)));
    after.push(Instruction::with1(Code::Ldmxcsr_m32, at(host_mxcsr)));
    after.push(Ok(Instruction::with(Code::VEX_Vzeroupper)));
    after.push(Instruction::with2(Code::Mov_r64_rm64, R::RSP, at(host_rsp)));
    for register in saved.iter().rev() {
        after.push(Instruction::with1(Code::Pop_r64, *register));
    }
    after.push(Ok(Instruction::with(Code::Retnq)));
    let assemble = |code: Vec<Result<Instruction, iced_x86::IcedError>>| {
        let mut encoder = Encoder::new(64);
        for instruction in code {
            encoder.encode(&instruction.unwrap(), 0).unwrap();
        }
        encoder.take_buffer()
    };
    (assemble(before), assemble(after))
}

/// Faults of the instruction under test go to the end of the harness; others keep
/// their usual effect.
extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, told: *mut libc::c_void) {
    let context: *mut libc::ucontext_t = told.cast();
    // SAFETY: the kernel passes a valid context.
    let rip = unsafe { &mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize] };
    if *rip as u64 == START.load(Ordering::SeqCst) && *rip != 0 {
        SIGNAL.store(signal, Ordering::SeqCst);
        *rip = RESUME.load(Ordering::SeqCst) as i64;
    } else {
        let former = if signal == libc::SIGSEGV { FORMER.get() } else { None };
        pass_on_fault(former, signal, info, told);
    }
}

fn catch_faults() {
    for signal in [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGBUS] {
        // SAFETY: a handler of the right signature, on the alternate stack that Rust's
        // runtime gives every thread: RSP may be anything.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            let mut former: libc::sigaction = std::mem::zeroed();
            assert_eq!(libc::sigaction(signal, &action, &raw mut former), 0);
            if signal == libc::SIGSEGV {
                let _ = FORMER.set(former);
            }
        }
    }
}
