//! Runs one instruction on the host, in 64-, 32- or 16-bit code.
//!
//! Around it is nothing but "load every register" and "save every register", at fixed
//! addresses. 32- and 16-bit code is entered by a far jump through Linux's own
//! compatibility segment or through segments of our local descriptor table. What
//! follows the instruction, and the one place branches may go to, are landing pads that
//! say which of them was reached. Faults are caught by a signal handler that resumes
//! where registers are saved; the exception's vector, error code and address are kept.

use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};

use iced_x86::{Code, Encoder, IcedError, Instruction, MemoryOperand, Register as R};
use softcpu::state::VcpuState;
use softcpu::state::fpu::{FpuState, VectorRegister};
use softcpu::testing::pass_on_fault;

use crate::layout::{
    AREA, AREA_LEN, CODE, CODE_LEN, DATA, DATA_LEN, HARNESS, LDT, Mode, USER_CS64, USER_DS,
};

/// What the harness loads and saves.
#[repr(C, align(64))]
struct Registers {
    vec: [VectorRegister; 16],
    fxsave: [u8; 512],
    gpr: [u64; 16],
    rflags: u64,
    mxcsr: u32,
    /// ES, CS, SS, DS, FS, GS.
    selectors: [u16; 6],
    fs_base: u64,
    gs_base: u64,
}

#[repr(C, align(64))]
struct Context {
    input: Registers,
    output: Registers,
    host_rsp: u64,
    host_fs_base: u64,
    host_gs_base: u64,
    /// Where the instruction is: offset and selector.
    entry: u64,
    /// The same as a far pointer (of 32 bits: AMD's CPUs have no longer ones).
    far_entry: [u16; 3],
    host_mxcsr: u32,
    landed: u32,
    stack: [u64; 64],
}

const CONTEXT: u64 = HARNESS + 0x1000;
const FLAGS_STACK: u64 = CONTEXT + std::mem::offset_of!(Context, stack) as u64 + 256;

macro_rules! input {
    ($field:ident) => {
        CONTEXT
            + std::mem::offset_of!(Context, input) as u64
            + std::mem::offset_of!(Registers, $field) as u64
    };
}
macro_rules! output {
    ($field:ident) => {
        CONTEXT
            + std::mem::offset_of!(Context, output) as u64
            + std::mem::offset_of!(Registers, $field) as u64
    };
}
macro_rules! context {
    ($field:ident) => {
        CONTEXT + std::mem::offset_of!(Context, $field) as u64
    };
}

/// How the instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Whatever follows it comes next.
    Next,
    /// It branched to [`Placed::target`].
    Taken,
    /// It faulted.
    Fault {
        /// Exception vector.
        vector: u8,
        /// Its error code.
        code: u32,
        /// CR2, for page faults.
        address: u64,
    },
    /// It went to neither, and that is where things went wrong.
    Lost(u64),
}

/// Where the instruction is put. All are offsets in CS.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub(crate) mode: Mode,
    /// Of the instruction, from [`CODE`].
    pub(crate) offset: u64,
    /// Of the landing pad of branches, likewise.
    pub(crate) target: u64,
}

/// The single host CPU.
pub(crate) struct Oracle {
    enter: u64,
    enter_far: u64,
    saves: [u64; 3],
    /// Whether FSBASE and GSBASE can be accessed from user mode.
    pub(crate) has_fsgsbase: bool,
}

/// Who had faults of memory before: translated code has some too.
static FORMER: OnceLock<libc::sigaction> = OnceLock::new();
static START: AtomicU64 = AtomicU64::new(0);
/// The thread that runs the instruction under test.
static THREAD: AtomicI64 = AtomicI64::new(0);
static AT: AtomicU64 = AtomicU64::new(0);
static RESUME: AtomicU64 = AtomicU64::new(0);
static CLAIMED: AtomicBool = AtomicBool::new(false);
static VECTOR: AtomicU64 = AtomicU64::new(0);
static ERROR: AtomicU64 = AtomicU64::new(0);
static STACK_SELECTOR: AtomicU64 = AtomicU64::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);

impl Oracle {
    /// Maps the shared stretch. There can only be one.
    pub(crate) fn new() -> Self {
        catch_faults();
        let (read, write, exec) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a fresh private mapping where there is none.
        let at = unsafe { libc::mmap(AREA as *mut _, AREA_LEN, read | write | exec, flags, -1, 0) };
        assert_eq!(at as u64, AREA, "something else is mapped at {AREA:#x}");
        for (start, len) in [(DATA - 0x1000, 0x1000), (DATA + DATA_LEN as u64, 0x4000)] {
            // SAFETY: part of our own mapping.
            assert_eq!(unsafe { libc::mprotect(start as *mut _, len, libc::PROT_NONE) }, 0);
        }
        // SAFETY: reads the auxiliary vector.
        let has_fsgsbase = unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0;
        let mut oracle = Self { enter: 0, enter_far: 0, saves: [0; 3], has_fsgsbase };
        oracle.assemble();
        oracle.context().host_mxcsr = 0x1f80;
        oracle
    }

    /// Whether this host runs code of `mode` at all.
    pub(crate) fn offers(&mut self, mode: Mode, state: &VcpuState) -> bool {
        let based = matches!(mode, Mode::Based32 | Mode::Bits16);
        if based && !install_ldt() {
            return false;
        }
        let nop = Placed { mode, offset: 0x100, target: 0x200 };
        self.run(nop, &[0x90], &mut state.clone()) == End::Next
    }

    fn context(&mut self) -> &mut Context {
        // SAFETY: within our mapping, aligned, and plain data.
        unsafe { &mut *(CONTEXT as *mut Context) }
    }

    /// The operands' memory.
    pub(crate) fn data(&mut self) -> &mut [u8; DATA_LEN] {
        // SAFETY: within our mapping, and borrowed through self.
        unsafe { &mut *(DATA as *mut [u8; DATA_LEN]) }
    }

    /// Runs `bytes` on `state`. Selectors are those of the mode.
    pub(crate) fn run(&mut self, placed: Placed, bytes: &[u8], state: &mut VcpuState) -> End {
        let Placed { mode, offset, target } = placed;
        let next = offset + bytes.len() as u64;
        let pads = [self.pad(mode, next, 0), self.pad(mode, target, 1)];
        // SAFETY: within our mapping; nothing runs there now.
        let code = unsafe { &mut *(CODE as *mut [u8; CODE_LEN]) };
        for (at, bytes) in [(offset, bytes), (next, &pads[0]), (target, &pads[1])] {
            code[at as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        let entry = CODE - mode.base() + offset;
        let (long, enter, enter_far) = (mode == Mode::Long, self.enter, self.enter_far);
        let resume = self.saves[2];
        let context = self.context();
        context.entry = entry;
        let [es, cs, ss, ds] = mode.selectors();
        context.far_entry = [entry as u16, (entry >> 16) as u16, cs];
        let input = &mut context.input;
        input.vec = state.vec;
        input.fxsave = state.fpu.fxsave;
        input.gpr.copy_from_slice(&state.gpr[..16]);
        input.rflags = state.rflags.bits();
        input.mxcsr = state.mxcsr;
        input.selectors = [es, cs, ss, ds, 0, 0];
        input.fs_base = state.seg[4].base;
        input.gs_base = state.seg[5].base;
        RESUME.store(resume, SeqCst);
        CLAIMED.store(false, SeqCst);
        THREAD.store(thread(), SeqCst);
        START.store(entry, SeqCst);
        // SAFETY: the harness preserves what System V wants preserved, and faults of
        // the instruction are caught.
        unsafe {
            let call: unsafe extern "sysv64" fn() =
                std::mem::transmute(if long { enter } else { enter_far });
            call();
        }
        START.store(0, SeqCst);
        // SAFETY: as in `context`; read again after the call.
        let context = unsafe { &*(CONTEXT as *const Context) };
        let output = &context.output;
        state.vec = output.vec;
        state.fpu = FpuState::from_image(output.fxsave);
        state.gpr[..16].copy_from_slice(&output.gpr);
        state.rflags = softcpu::state::rflags::RFlags::from_bits_retain(output.rflags);
        state.mxcsr = output.mxcsr;
        for i in [0, 2, 3, 4, 5] {
            state.seg[i].selector = output.selectors[i];
        }
        if mode == Mode::Long {
            state.seg[4].base = output.fs_base;
            state.seg[5].base = output.gs_base;
        }
        if context.landed == 2 {
            state.seg[2].selector = STACK_SELECTOR.load(SeqCst) as u16;
        }
        match context.landed {
            0 => End::Next,
            1 => End::Taken,
            _ if AT.load(SeqCst) != entry => End::Lost(AT.load(SeqCst)),
            _ => End::Fault {
                vector: VECTOR.load(SeqCst) as u8,
                code: ERROR.load(SeqCst) as u32,
                address: ADDRESS.load(SeqCst),
            },
        }
    }

    /// The code at `at` (from [`CODE`]) that goes to where landing there is noted.
    fn pad(&self, mode: Mode, at: u64, number: usize) -> Vec<u8> {
        let to = self.saves[number];
        match mode {
            Mode::Long => {
                let relative = to.wrapping_sub(CODE + at + 5) as u32;
                [&[0xe9], &relative.to_le_bytes()[..]].concat()
            }
            _ => {
                let prefix: &[u8] = if mode == Mode::Bits16 { &[0x66] } else { &[] };
                [prefix, &[0xea], &(to as u32).to_le_bytes(), &USER_CS64.to_le_bytes()].concat()
            }
        }
    }

    /// Writes the harness.
    fn assemble(&mut self) {
        let mut at = HARNESS;
        let mut place = |code: Vec<Result<Instruction, IcedError>>| {
            let start = at;
            let mut encoder = Encoder::new(64);
            for instruction in code {
                let instruction = instruction.expect("a valid instruction");
                at += encoder.encode(&instruction, at).expect("encodable") as u64;
            }
            let bytes = encoder.take_buffer();
            assert!(at <= CONTEXT);
            // SAFETY: within our mapping; nothing runs there yet.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), start as *mut u8, bytes.len()) };
            start
        };
        let save = place(save_registers(self.has_fsgsbase));
        for (number, landing) in self.saves.iter_mut().enumerate() {
            let note =
                Instruction::with2(Code::Mov_rm32_imm32, absolute(context!(landed)), number as u32);
            *landing = place(vec![note, Instruction::with_branch(Code::Jmp_rel32_64, save)]);
        }
        let mut near = load_registers(self.has_fsgsbase);
        near.push(Instruction::with1(Code::Jmp_rm64, absolute(context!(entry))));
        self.enter = place(near);
        let mut far = load_registers(self.has_fsgsbase);
        far.push(Instruction::with1(Code::Jmp_m1632, absolute(context!(far_entry))));
        self.enter_far = place(far);
    }
}

fn absolute(address: u64) -> MemoryOperand {
    MemoryOperand::with_displ(address, 4)
}

const SAVED: [R; 6] = [R::RBX, R::RBP, R::R12, R::R13, R::R14, R::R15];

fn load_registers(fsgsbase: bool) -> Vec<Result<Instruction, IcedError>> {
    let at = absolute;
    let mut code: Vec<_> =
        SAVED.map(|register| Instruction::with1(Code::Push_r64, register)).into();
    code.push(Instruction::with2(Code::Mov_rm64_r64, at(context!(host_rsp)), R::RSP));
    if fsgsbase {
        code.push(Instruction::with1(Code::Rdfsbase_r64, R::RAX));
        code.push(Instruction::with2(Code::Mov_rm64_r64, at(context!(host_fs_base)), R::RAX));
        code.push(Instruction::with1(Code::Rdgsbase_r64, R::RAX));
        code.push(Instruction::with2(Code::Mov_rm64_r64, at(context!(host_gs_base)), R::RAX));
        code.push(Instruction::with2(Code::Mov_r64_rm64, R::RAX, at(input!(fs_base))));
        code.push(Instruction::with1(Code::Wrfsbase_r64, R::RAX));
        code.push(Instruction::with2(Code::Mov_r64_rm64, R::RAX, at(input!(gs_base))));
        code.push(Instruction::with1(Code::Wrgsbase_r64, R::RAX));
    }
    for (i, segment) in [(0, R::ES), (3, R::DS), (2, R::SS)] {
        code.push(Instruction::with2(Code::Mov_Sreg_rm16, segment, at(input!(selectors) + i * 2)));
    }
    code.push(Instruction::with1(Code::Fxrstor64_m512byte, at(input!(fxsave))));
    for i in 0..16_u32 {
        let from = at(input!(vec) + u64::from(i) * 32);
        code.push(if avx() {
            Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, R::YMM0 + i, from)
        } else {
            Instruction::with2(Code::Movups_xmm_xmmm128, R::XMM0 + i, from)
        });
    }
    code.push(Instruction::with1(Code::Ldmxcsr_m32, at(input!(mxcsr))));
    code.push(Instruction::with2(Code::Mov_r64_imm64, R::RSP, FLAGS_STACK));
    code.push(Instruction::with1(Code::Push_rm64, at(input!(rflags))));
    code.push(Ok(Instruction::with(Code::Popfq)));
    for i in 0..16_u32 {
        code.push(Instruction::with2(
            Code::Mov_r64_rm64,
            R::RAX + i,
            at(input!(gpr) + u64::from(i) * 8),
        ));
    }
    code
}

fn save_registers(fsgsbase: bool) -> Vec<Result<Instruction, IcedError>> {
    let at = absolute;
    let mut code = Vec::new();
    for i in 0..16_u32 {
        code.push(Instruction::with2(
            Code::Mov_rm64_r64,
            at(output!(gpr) + u64::from(i) * 8),
            R::RAX + i,
        ));
    }
    for (i, segment) in [(0, R::ES), (2, R::SS), (3, R::DS), (4, R::FS), (5, R::GS)] {
        code.push(Instruction::with2(
            Code::Mov_r32m16_Sreg,
            at(output!(selectors) + i * 2),
            segment,
        ));
    }
    code.push(Instruction::with2(Code::Mov_r64_imm64, R::RSP, FLAGS_STACK));
    code.push(Ok(Instruction::with(Code::Pushfq)));
    code.push(Instruction::with1(Code::Pop_rm64, at(output!(rflags))));
    code.push(Instruction::with1(Code::Pushq_imm8, 2));
    code.push(Ok(Instruction::with(Code::Popfq)));
    // The C world's segments again, and its bases, which loading selectors may have changed.
    code.push(Instruction::with2(Code::Mov_r32_imm32, R::ECX, u32::from(USER_DS)));
    code.push(Instruction::with2(Code::Mov_Sreg_rm16, R::SS, R::CX));
    code.push(Instruction::with2(Code::Xor_r32_rm32, R::ECX, R::ECX));
    for segment in [R::ES, R::DS] {
        code.push(Instruction::with2(Code::Mov_Sreg_rm16, segment, R::CX));
    }
    if fsgsbase {
        code.push(Instruction::with1(Code::Rdfsbase_r64, R::RAX));
        code.push(Instruction::with2(Code::Mov_rm64_r64, at(output!(fs_base)), R::RAX));
        code.push(Instruction::with1(Code::Rdgsbase_r64, R::RAX));
        code.push(Instruction::with2(Code::Mov_rm64_r64, at(output!(gs_base)), R::RAX));
        code.push(Instruction::with2(Code::Mov_Sreg_rm16, R::FS, R::CX));
        code.push(Instruction::with2(Code::Mov_Sreg_rm16, R::GS, R::CX));
        code.push(Instruction::with2(Code::Mov_r64_rm64, R::RAX, at(context!(host_fs_base))));
        code.push(Instruction::with1(Code::Wrfsbase_r64, R::RAX));
        code.push(Instruction::with2(Code::Mov_r64_rm64, R::RAX, at(context!(host_gs_base))));
        code.push(Instruction::with1(Code::Wrgsbase_r64, R::RAX));
    }
    code.push(Instruction::with1(Code::Stmxcsr_m32, at(output!(mxcsr))));
    for i in 0..16_u32 {
        let to = at(output!(vec) + u64::from(i) * 32);
        code.push(if avx() {
            Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, to, R::YMM0 + i)
        } else {
            Instruction::with2(Code::Movups_xmmm128_xmm, to, R::XMM0 + i)
        });
    }
    code.push(Instruction::with1(Code::Fxsave64_m512byte, at(output!(fxsave))));
    code.push(Ok(Instruction::with(Code::Fninit)));
    code.push(Instruction::with1(Code::Ldmxcsr_m32, at(context!(host_mxcsr))));
    if avx() {
        code.push(Ok(Instruction::with(Code::VEX_Vzeroupper)));
    }
    code.push(Instruction::with2(Code::Mov_r64_rm64, R::RSP, at(context!(host_rsp))));
    for register in SAVED.iter().rev() {
        code.push(Instruction::with1(Code::Pop_r64, *register));
    }
    code.push(Ok(Instruction::with(Code::Retnq)));
    code
}

fn avx() -> bool {
    std::arch::is_x86_feature_detected!("avx")
}

/// Makes [`LDT`] this process's local descriptor table; false if the kernel has none.
fn install_ldt() -> bool {
    LDT.iter().enumerate().all(|(number, raw)| {
        let limit = raw & 0xffff | raw >> 32 & 0xf_0000;
        let base = raw >> 16 & 0xff_ffff | raw >> 56 << 24;
        let code = raw >> 43 & 1;
        // `struct user_desc` of asm/ldt.h: contents 2 is code, 0 is data; usable.
        let flags = (raw >> 54 & 1) | code << 2 | (raw >> 55 & 1) << 4 | 1 << 6;
        let description = [number as u32, base as u32, limit as u32, flags as u32];
        // SAFETY: the kernel reads sixteen bytes; segments affect nobody who does not load them.
        unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, &raw const description, 16_usize) == 0 }
    })
}

/// This thread, whatever its FS is.
fn thread() -> i64 {
    // SAFETY: asks for a number.
    unsafe { libc::syscall(libc::SYS_gettid) }
}

/// Faults of the instruction under test go to the end of the harness; others keep
/// their usual effect.
extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, told: *mut libc::c_void) {
    let context: *mut libc::ucontext_t = told.cast();
    // SAFETY: the kernel passes a valid context.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as u64;
    let here = START.load(SeqCst) != 0 && THREAD.load(SeqCst) == thread();
    if here && !CLAIMED.swap(true, SeqCst) {
        AT.store(rip, SeqCst);
        VECTOR.store(registers[libc::REG_TRAPNO as usize] as u64, SeqCst);
        ERROR.store(registers[libc::REG_ERR as usize] as u64, SeqCst);
        ADDRESS.store(registers[libc::REG_CR2 as usize] as u64, SeqCst);
        registers[libc::REG_RIP as usize] = RESUME.load(SeqCst) as i64;
        let (cs, ss) = (u64::from(USER_CS64), u64::from(USER_DS));
        let middle = registers[libc::REG_CSGSFS as usize] as u64 & 0x0000_ffff_ffff_0000;
        STACK_SELECTOR.store(registers[libc::REG_CSGSFS as usize] as u64 >> 48, SeqCst);
        registers[libc::REG_CSGSFS as usize] = (middle | cs | ss << 48) as i64;
    } else {
        let former = if signal == libc::SIGSEGV { FORMER.get() } else { None };
        pass_on_fault(former, signal, info, told);
    }
}

fn catch_faults() {
    for signal in [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGBUS, libc::SIGTRAP] {
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
