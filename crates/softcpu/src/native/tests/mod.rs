//! The stubs against the host CPU itself.
//!
//! [`oracle`] runs an instruction on the host with nothing of ours around it but "load
//! every register, run these bytes, save every register"; [`generate`] makes
//! instructions of every encoding and random states to run them on; [`property`]
//! compares. The other modules assert outcomes where the host cannot be asked: mode
//! checks, page crossings, devices, atomicity.

mod atomic;
mod generate;
mod memory;
mod modes;
mod oracle;
mod property;
mod save;
mod stubs;

use iced_x86::{Instruction, OpKind, Register};

use super::features::FeatureSet;
use super::{Lowered, Refused};
use crate::decode::op::{Op, OpFlags};
use crate::state::{GPR_ZERO, SEG_FLAT};
use crate::testing::{Random, TestMachine};
use crate::vcpu::{Abort, Step};

/// Lowers `instruction` for model v3.
fn lower(
    machine: &mut TestMachine,
    instruction: &Instruction,
    bytes: &[u8],
) -> Result<Lowered, Refused> {
    lower_for(machine, instruction, bytes, &FeatureSet::v3())
}

fn lower_for(
    machine: &mut TestMachine,
    instruction: &Instruction,
    bytes: &[u8],
    features: &FeatureSet,
) -> Result<Lowered, Refused> {
    let native = &mut machine.vcpu.native;
    match native.lower(instruction, bytes, features) {
        Err(Refused::Full) => {
            native.reset_own();
            native.lower(instruction, bytes, features)
        }
        other => other,
    }
}

/// The op for `instruction` as the decoder fills it, its memory operand included.
fn op(instruction: &Instruction, lowered: &Lowered) -> Op {
    let slot = |register: Register| {
        if register.is_gpr() { register.full_register().number() as u8 } else { GPR_ZERO }
    };
    let implied = instruction.op_kinds().any(|kind| kind == OpKind::MemorySegRDI);
    let rip_relative = instruction.is_ip_rel_memory_operand();
    Op {
        run: lowered.run,
        rip: 0x1000,
        imm: lowered.imm,
        disp: instruction.memory_displacement64(),
        addr_mask: u64::MAX,
        base: if implied {
            7
        } else if rip_relative {
            GPR_ZERO
        } else {
            slot(instruction.memory_base())
        },
        index: slot(instruction.memory_index()),
        scale: instruction.memory_index_scale().trailing_zeros() as u8,
        seg: SEG_FLAT,
        dst: 0,
        src: 0,
        aux: 0,
        len: 4,
        code: instruction.code() as u16,
        flags: OpFlags::LONG | lowered.flags,
        size: 0,
    }
}

/// Runs one 64-bit instruction given as bytes.
fn run(machine: &mut TestMachine, bytes: &[u8]) -> Step {
    let instruction = iced_x86::Decoder::with_ip(64, bytes, 0x1000, 0).decode();
    let lowered =
        lower(machine, &instruction, bytes).unwrap_or_else(|why| panic!("{instruction:?}: {why}"));
    let op = op(&instruction, &lowered);
    (op.run)(&mut machine.vcpu, &op)
}

/// Asserts that the last step ended in the exception with this vector.
#[track_caller]
fn assert_fault(machine: &TestMachine, step: Step, vector: crate::exception::Vector) {
    assert_eq!(step, Err(Abort::Fault));
    assert_eq!(machine.vcpu.fault.vector, vector);
}

/// What a call costs: `cargo test --release -p softcpu native::tests::cost -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn cost() {
    let mut machine = TestMachine::long_mode();
    machine.vcpu.state.gpr[1] = 0x8000;
    let cases: [(&str, &[u8]); 9] = [
        ("pxor xmm0, xmm1", &[0x66, 0x0f, 0xef, 0xc1]),
        ("movups xmm0, [rcx]", &[0x0f, 0x10, 0x01]),
        ("movups [rcx], xmm0", &[0x0f, 0x11, 0x01]),
        ("movq xmm0, rcx", &[0x66, 0x48, 0x0f, 0x6e, 0xc1]),
        ("cvtsi2sd xmm0, rcx", &[0xf2, 0x48, 0x0f, 0x2a, 0xc1]),
        ("vpaddd ymm0, ymm1, [rcx]", &[0xc5, 0xf5, 0xfe, 0x01]),
        ("popcnt eax, ecx", &[0xf3, 0x0f, 0xb8, 0xc1]),
        ("lock xadd [rcx], rax", &[0xf0, 0x48, 0x0f, 0xc1, 0x01]),
        ("fadd st, st(1)", &[0xd8, 0xc1]),
    ];
    for (name, bytes) in cases {
        let instruction = iced_x86::Decoder::with_ip(64, bytes, 0x1000, 0).decode();
        let lowered = lower(&mut machine, &instruction, bytes).unwrap();
        let op = op(&instruction, &lowered);
        let start = thread_time();
        const CALLS: u32 = 1_000_000;
        for _ in 0..CALLS {
            (std::hint::black_box(op.run))(&mut machine.vcpu, &op).unwrap();
        }
        println!(
            "{:>8.2} ns  {name}",
            (thread_time() - start).as_nanos() as f64 / f64::from(CALLS)
        );
    }
}

/// Time this thread has had a CPU: the machine may be busy with other tests.
fn thread_time() -> std::time::Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills in the structure it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    std::time::Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
