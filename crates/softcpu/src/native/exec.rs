//! Handlers that run stubs: mode checks, memory operand, exceptions.
//!
//! Called by the run loop through [`Op::run`]. The common case is a compare of mode
//! bits, a TLB hit and a call; everything else is out of line.

use std::sync::Mutex;

use super::Stub;
use super::classify::Traits;
use crate::addr::PAGE_OFFSET;
use crate::decode::op::{Handler, Op};
use crate::exception::Exception;
use crate::mmu::Access;
use crate::state::VcpuState;
use crate::state::control::{Cr0, Cr4};
use crate::state::fpu::{
    FpuState, MXCSR_FLAGS, MXCSR_FTZ, MXCSR_MASKS, MXCSR_UE, Pointers, VectorRegister, XCR0_AVX,
    XCR0_SSE,
};
use crate::state::rflags::RFlags;
use crate::sync::lock;
use crate::vcpu::{Abort, Step, Vcpu};

/// The largest memory operand of a stub, bytes.
pub(super) const LARGEST: usize = 64;

/// Locked accesses that cannot be done in place (they cross a page, or go to a device)
/// exclude one another. As on hardware with split locks, this is slow and rare.
static BUS: Mutex<()> = Mutex::new(());

/// A copy of a memory operand that cannot be worked on in place.
#[repr(C, align(64))]
struct Bounce([u8; LARGEST]);

/// The handler for `stub`.
pub(super) fn handler(stub: &Stub) -> Handler {
    if stub.traits.contains(Traits::X87) {
        exec_x87
    } else if stub.traits.contains(Traits::MEMORY) {
        exec_native
    } else {
        exec_native_reg
    }
}

/// Runs a stub without memory operand.
pub(super) fn exec_native_reg(cpu: &mut Vcpu, op: &Op) -> Step {
    let stub = prepare(cpu, op)?;
    if unmasked(cpu, &stub) {
        return exec_unmasked(cpu, op, &stub);
    }
    call(&stub, &mut cpu.state, std::ptr::null_mut());
    Ok(())
}

/// Runs a stub with a memory operand.
pub(super) fn exec_native(cpu: &mut Vcpu, op: &Op) -> Step {
    let stub = prepare(cpu, op)?;
    if unmasked(cpu, &stub) {
        return exec_unmasked(cpu, op, &stub);
    }
    exec_on_memory(cpu, op, &stub)
}

/// Runs a stub that uses x87 or MMX registers.
pub(super) fn exec_x87(cpu: &mut Vcpu, op: &Op) -> Step {
    let stub = prepare(cpu, op)?;
    if stub.traits.contains(Traits::WAITS) && cpu.state.fpu.pending() {
        return Err(x87_error(cpu));
    }
    let mut pointers = cpu.state.fpu.pointers();
    if stub.traits.contains(Traits::POINTERS) {
        pointers.opcode = (op.imm >> 32) as u16 & 0x7ff;
        pointers.instruction = op.rip;
    } else if stub.traits.contains(Traits::RESETS_POINTERS) {
        pointers = Pointers::default();
    }
    let data = stub.traits.contains(Traits::MEMORY).then(|| op.effective(&cpu.state));
    let done = if unmasked(cpu, &stub) {
        exec_unmasked(cpu, op, &stub)
    } else if stub.traits.contains(Traits::MEMORY) {
        exec_on_memory(cpu, op, &stub)
    } else {
        call(&stub, &mut cpu.state, std::ptr::null_mut());
        Ok(())
    };
    if done.is_ok() {
        // FDP is only updated for exceptions that are not masked, as CPUID announces.
        if let Some(data) = data
            && stub.traits.contains(Traits::POINTERS)
            && cpu.state.fpu.pending()
        {
            pointers.data = data;
        }
        // What the host saved are its own addresses, which are none of the guest's business.
        cpu.state.fpu.set_pointers(pointers);
    }
    done
}

/// `#MF`. With CR0.NE clear, hardware would instead signal IRQ 13 through the FERR#
/// pin, which no 32- or 64-bit Linux on this platform wires up: `#MF` it is, too.
#[cold]
pub(super) fn x87_error(cpu: &mut Vcpu) -> Abort {
    cpu.raise(Exception::x87())
}

/// Finds the op's stub and checks the mode bits it needs.
#[inline(always)]
fn prepare(cpu: &mut Vcpu, op: &Op) -> Result<Stub, Abort> {
    let Some(stub) = cpu.native.stub(op.imm as u32, op.flags) else { return Err(cpu.ud()) };
    let (state, needs) = (&cpu.state, &stub.needs);
    let wrong = (state.cr0.bits() & needs.cr0_mask ^ needs.cr0_value)
        | (!state.cr4.bits() & needs.cr4)
        | (!state.xcr0 & needs.xcr0);
    if wrong == 0 {
        return Ok(*stub);
    }
    let traits = stub.traits;
    Err(unavailable(cpu, traits))
}

/// The exception for an instruction of a unit that is switched off: `#UD` when the
/// operating system never switched it on, `#NM` when it only wants to be asked.
#[cold]
fn unavailable(cpu: &mut Vcpu, traits: Traits) -> Abort {
    let state = &cpu.state;
    let emulated = state.cr0.contains(Cr0::EM);
    let invalid = if traits.contains(Traits::VEX) {
        let off = !state.cr4.contains(Cr4::OSXSAVE) || !state.xcr0 & (XCR0_SSE | XCR0_AVX) != 0;
        !state.cr0.contains(Cr0::PE) || traits.contains(Traits::AVX) && off
    } else if traits.contains(Traits::SSE) {
        emulated || !state.cr4.contains(Cr4::OSFXSR)
    } else {
        emulated && traits.contains(Traits::MMX)
    };
    if invalid { cpu.ud() } else { cpu.raise(Exception::device_not_available()) }
}

/// Checks that `traits`' units are switched on: for handlers without a stub.
#[inline]
pub(crate) fn require(cpu: &mut Vcpu, traits: Traits) -> Step {
    let needs = super::Needs::of(traits);
    let state = &cpu.state;
    let wrong = (state.cr0.bits() & needs.cr0_mask ^ needs.cr0_value)
        | (!state.cr4.bits() & needs.cr4)
        | (!state.xcr0 & needs.xcr0);
    if wrong == 0 { Ok(()) } else { Err(unavailable(cpu, traits)) }
}

#[inline(always)]
fn call(stub: &Stub, state: &mut VcpuState, memory: *mut u8) {
    // SAFETY: the stub is alive (it was just looked up in what the vCPU has; those that are
    // shared are never forgotten, and the arena of its own is only cleared together with
    // their numbers, while none runs), was generated from an instruction that cannot
    // fault on its operands, and accesses the state, which is borrowed here, and `size`
    // bytes at `memory`, which every caller has made sure of. The image it may load
    // with FXRSTOR, and MXCSR, only ever hold values those instructions accept.
    unsafe { (stub.entry)(state, memory) }
}

#[inline(always)]
fn exec_on_memory(cpu: &mut Vcpu, op: &Op, stub: &Stub) -> Step {
    let size = u64::from(stub.size);
    let addr = operand(cpu, op, stub)?;
    match cpu.in_place(addr, size, stub.access())? {
        Some(host) => {
            call(stub, &mut cpu.state, host);
            Ok(())
        }
        None => exec_elsewhere(cpu, stub, addr),
    }
}

/// The linear address of the memory operand, checked for alignment.
#[inline(always)]
fn operand(cpu: &mut Vcpu, op: &Op, stub: &Stub) -> Result<u64, Abort> {
    let addr = cpu.linear(op, u64::from(stub.size), stub.access())?;
    if addr & u64::from(stub.align_mask) != 0 { Err(cpu.gp(0)) } else { Ok(addr) }
}

/// Runs a stub whose operand crosses a page, is not RAM, or shares a page with code.
#[cold]
#[inline(never)]
fn exec_elsewhere(cpu: &mut Vcpu, stub: &Stub, addr: u64) -> Step {
    let (size, stores) = (u64::from(stub.size), stub.traits.contains(Traits::STORES));
    if stores {
        cpu.probe_write(addr, size)?;
        // RAM that stores may go to but must be reported: in place, so that atomic
        // instructions stay atomic.
        let view = cpu.mmu.view;
        if let Some(host) = cpu.mmu.data.lookup(view, addr, size, Access::Read) {
            let frame = cpu.mmu.data.frame(view, addr, Access::Read);
            call(stub, &mut cpu.state, host);
            cpu.stored(frame, addr & PAGE_OFFSET, size);
            return Ok(());
        }
    }
    let locked = stub.traits.contains(Traits::LOCK);
    let _bus = locked.then(|| lock(&BUS));
    let mut bounce = Bounce([0; LARGEST]);
    load(cpu, stub, addr, &mut bounce)?;
    call(stub, &mut cpu.state, bounce.0.as_mut_ptr());
    store(cpu, stub, addr, &bounce)
}

/// Fills `bounce` with the memory operand, if its old value matters. It also does for
/// x87 stores, which an unmasked exception suppresses.
fn load(cpu: &mut Vcpu, stub: &Stub, addr: u64, bounce: &mut Bounce) -> Step {
    let data = bounce.0.get_mut(..usize::from(stub.size)).unwrap_or_default();
    if stub.traits.intersects(Traits::LOADS | Traits::X87) {
        cpu.read_bytes(addr, data)
    } else {
        Ok(())
    }
}

fn store(cpu: &mut Vcpu, stub: &Stub, addr: u64, bounce: &Bounce) -> Step {
    let data = bounce.0.get(..usize::from(stub.size)).unwrap_or_default();
    if stub.traits.contains(Traits::STORES) { cpu.write_bytes(addr, data) } else { Ok(()) }
}

/// Whether the guest wants `#XM` of an instruction that may raise it.
#[inline(always)]
fn unmasked(cpu: &Vcpu, stub: &Stub) -> bool {
    stub.traits.contains(Traits::SIMD_FP) && cpu.state.mxcsr & MXCSR_MASKS != MXCSR_MASKS
}

/// Registers an instruction may have changed.
struct Before {
    gpr: [u64; crate::state::GPR_SLOTS],
    rflags: RFlags,
    vec: [VectorRegister; 16],
    fpu: FpuState,
}

impl Before {
    fn of(state: &VcpuState) -> Self {
        Self { gpr: state.gpr, rflags: state.rflags, vec: state.vec, fpu: state.fpu.clone() }
    }

    fn restore(&self, state: &mut VcpuState) {
        state.gpr = self.gpr;
        state.rflags = self.rflags;
        state.vec = self.vec;
        state.fpu.clone_from(&self.fpu);
    }
}

/// Runs a stub for a guest that has unmasked SIMD floating-point exceptions. The host
/// runs it masked, on copies; if a flag comes up that the guest has unmasked,
/// everything is taken back and `#XM` raised (SDM vol. 1, 11.5).
///
/// Sticky flags may differ from hardware in two corners. Together with an unmasked
/// overflow or underflow, the precision flag tells here whether the *masked* result was
/// inexact, there whether one with unbounded exponent would have been. And DPPS and
/// DPPD, which compute in several steps, run all of them here; hardware stops after the
/// one that faults.
#[cold]
#[inline(never)]
fn exec_unmasked(cpu: &mut Vcpu, op: &Op, stub: &Stub) -> Step {
    let mut bounce = Bounce([0; LARGEST]);
    let mut addr = 0;
    if stub.traits.contains(Traits::MEMORY) {
        addr = operand(cpu, op, stub)?;
        if stub.traits.contains(Traits::STORES) {
            cpu.probe_write(addr, u64::from(stub.size))?;
        }
        load(cpu, stub, addr, &mut bounce)?;
    }
    let before = Before::of(&cpu.state);
    let guest = cpu.state.mxcsr;
    let wanted = !(guest >> 7) & MXCSR_FLAGS;
    let quiet = guest & !MXCSR_FLAGS | MXCSR_MASKS;
    let underflow = wanted & MXCSR_UE != 0;
    let original = bounce.0;

    // A masked underflow is only reported when the result is inexact too; an unmasked
    // one whenever it is tiny. Flushing to zero tells: it reports every tiny result.
    // (Unmasked, the guest's own FTZ has no effect: SDM vol. 1, 10.2.3.3.)
    cpu.state.mxcsr = if underflow { quiet | MXCSR_FTZ } else { quiet };
    call(stub, &mut cpu.state, bounce.0.as_mut_ptr());
    let mut raised = cpu.state.mxcsr & MXCSR_FLAGS;
    if underflow && raised & MXCSR_UE != 0 {
        before.restore(&mut cpu.state);
        bounce.0 = original;
        cpu.state.mxcsr = quiet & !MXCSR_FTZ;
        call(stub, &mut cpu.state, bounce.0.as_mut_ptr());
        raised = cpu.state.mxcsr & MXCSR_FLAGS | MXCSR_UE;
    }
    if raised & wanted == 0 {
        cpu.state.mxcsr = guest | raised;
        return if stub.traits.contains(Traits::MEMORY) {
            store(cpu, stub, addr, &bounce)
        } else {
            Ok(())
        };
    }
    before.restore(&mut cpu.state);
    // Invalid, denormal and divide-by-zero are found before anything is computed; then
    // the others are not even looked for.
    const BEFORE_COMPUTING: u32 = 0b111;
    let reported =
        if raised & wanted & BEFORE_COMPUTING != 0 { raised & BEFORE_COMPUTING } else { raised };
    cpu.state.mxcsr = guest | reported;
    if cpu.state.cr4.contains(Cr4::OSXMMEXCPT) {
        Err(cpu.raise(Exception::simd()))
    } else {
        Err(cpu.ud())
    }
}
