//! Every encoding, on the host and through its stub, from the same random states.

use std::collections::BTreeMap;

use iced_x86::{
    Code, CpuidFeature as F, Decoder, EncodingKind, Instruction, Mnemonic as M, OpKind,
};

use super::oracle::Oracle;
use super::{Random, generate, lower, op};
use crate::exception::Vector;
use crate::state::VcpuState;
use crate::state::fpu::Pointers;
use crate::testing::TestMachine;
use crate::vcpu::Abort;

/// Where the guest's operand is; the host's is at the same offset of its page.
const GUEST: u64 = 0x8000;
/// Bytes of memory compared.
const SPAN: usize = 256;
/// Operands of one instruction; states for each.
const VARIANTS: usize = 12;
const STATES: usize = 12;

/// The operand's place within the compared memory.
const MIDDLE: u64 = 128;

#[derive(Debug, Default)]
struct Tally {
    covered: BTreeMap<String, usize>,
    refused: BTreeMap<String, usize>,
    faults: BTreeMap<String, usize>,
    runs: usize,
}

impl Tally {
    fn print(&self) {
        println!("{:>8}  instructions compared with the host", self.runs);
        for (what, map) in [
            ("encodings covered", &self.covered),
            ("encodings refused", &self.refused),
            ("host faults matched", &self.faults),
        ] {
            println!("{:>8}  {what}", map.values().sum::<usize>());
            for (name, count) in map {
                println!("{count:>8}    {name}");
            }
        }
    }
}

/// What the tables call the unit of `code`.
fn family(code: Code) -> String {
    let features: Vec<String> = code.cpuid_features().iter().map(|f| format!("{f:?}")).collect();
    features.join("+")
}

/// Done in Rust on whole memory images: [`super::save`] has them.
fn is_image(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64
            | M::Fnsave
            | M::Frstor
            | M::Fnstenv
            | M::Fldenv
            | M::Ldmxcsr
            | M::Vldmxcsr
    )
}

/// Instructions whose result is not a function of their operands.
fn is_random(mnemonic: M) -> bool {
    matches!(mnemonic, M::Rdrand | M::Rdseed)
}

/// No-operations on one vendor's CPUs and undefined on the other's.
fn differs_by_vendor(mnemonic: M) -> bool {
    matches!(mnemonic, M::Reservednop)
}

/// The same bytes in 32-bit code, if they mean the same there, must share the stub.
fn differs_in_32_bit_code(machine: &mut TestMachine, bytes: &[u8]) -> bool {
    let wide = Decoder::with_ip(64, bytes, 0, 0).decode();
    // The prefix that makes addresses 32-bit here makes them 16-bit there.
    let prefixes =
        bytes.iter().take_while(|byte| matches!(byte, 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3)).count();
    let mut bytes = bytes.to_vec();
    if let Some(at) = bytes.iter().take(prefixes).position(|byte| *byte == 0x67) {
        bytes.remove(at);
    }
    let narrow = Decoder::with_ip(32, &bytes, 0, 0).decode();
    let registers =
        |it: &Instruction| (0..it.op_count()).map(|i| it.op_register(i)).collect::<Vec<_>>();
    if narrow.code() != wide.code()
        || registers(&narrow) != registers(&wide)
        || narrow.memory_index() != wide.memory_index()
    {
        return false;
    }
    lower(machine, &narrow, &bytes).map(|it| it.imm)
        != lower(machine, &wide, &bytes).map(|it| it.imm)
}

#[test]
fn every_encoding_does_what_the_host_does() {
    let mut tally = Tally::default();
    let mut oracle = Oracle::new();
    let mut machine = TestMachine::long_mode();
    let mut random = Random(0x1234_5678_9abc_def1);
    for code in Code::values() {
        let op_code = code.op_code();
        if !op_code.is_instruction() || !op_code.mode64() || op_code.fwait() {
            continue;
        }
        if !matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
            *tally
                .refused
                .entry(format!("an encoding no model offers: {:?}", code.encoding()))
                .or_default() += 1;
            continue;
        }
        let mut outcome = Err("operands of no use in user mode: segment, control, mask or tile registers, branch targets, strings".to_owned());
        for _ in 0..VARIANTS {
            let host = oracle.data_address() + MIDDLE;
            let Some((instruction, bytes)) = generate::instruction(code, host, &mut random) else {
                break;
            };
            match lower(&mut machine, &instruction, &bytes) {
                Err(why) => outcome = outcome.or(Err(why.to_string())),
                Ok(_) if differs_in_32_bit_code(&mut machine, &bytes) => {
                    panic!("{instruction:?} {bytes:02x?}: another stub for 32-bit code")
                }
                Ok(_)
                    if is_image(instruction.mnemonic())
                        || differs_by_vendor(instruction.mnemonic()) =>
                {
                    outcome = Ok(());
                }
                Ok(_) => {
                    for _ in 0..STATES {
                        compare(
                            &mut oracle,
                            &mut machine,
                            &instruction,
                            &bytes,
                            &mut random,
                            &mut tally,
                        );
                    }
                    outcome = Ok(());
                }
            }
        }
        match outcome {
            Ok(()) => *tally.covered.entry(family(code)).or_default() += 1,
            Err(why) => *tally.refused.entry(why).or_default() += 1,
        }
    }
    only_32_bit(&mut machine, &mut random, &mut tally);
    tally.print();
    let covered: usize = tally.covered.values().sum();
    assert!(
        covered >= if super::FeatureSet::host_has_v3() { 1600 } else { 800 },
        "only {covered} encodings"
    );
    assert!(tally.faults.keys().any(|name| name.contains("Simd")), "no #XM was compared");
    assert!(
        tally.faults.keys().any(|name| name.contains("GeneralProtection")),
        "no misalignment was compared"
    );
}

/// Encodings that 64-bit code does not have: the few with a twin there get its stub.
fn only_32_bit(machine: &mut TestMachine, random: &mut Random, tally: &mut Tally) {
    for code in Code::values() {
        let op_code = code.op_code();
        if !op_code.is_instruction() || op_code.mode64() || !op_code.mode32() {
            continue;
        }
        // Half of the registers made up do not exist there: try again.
        let lowered = (0..32)
            .find_map(|_| generate::instruction(code, 0x8000, random))
            .map(|(instruction, bytes)| lower(machine, &instruction, &bytes).map(|_| ()));
        match lowered {
            Some(Ok(())) => *tally.covered.entry("32-bit code only".to_owned()).or_default() += 1,
            Some(Err(why)) => {
                *tally.refused.entry(format!("32-bit code only: {why}")).or_default() += 1
            }
            None => {
                *tally
                    .refused
                    .entry("32-bit code only: operands of no use in user mode".to_owned())
                    .or_default() += 1
            }
        }
    }
}

fn compare(
    oracle: &mut Oracle,
    machine: &mut TestMachine,
    instruction: &Instruction,
    bytes: &[u8],
    random: &mut Random,
    tally: &mut Tally,
) {
    tally.runs += 1;
    let mut expected = machine.vcpu.state.clone();
    let unmasked = random.below(4) == 0;
    generate::state(&mut expected, unmasked, random);
    let mut memory = [0; SPAN];
    generate::memory(&mut memory, random);
    // One run in four is misaligned, which some instructions refuse.
    let has_memory = instruction.op_kinds().any(|kind| kind == OpKind::Memory);
    let shift = if random.below(4) == 0 && has_memory { random.below(16) } else { 0 };

    let mut instruction = *instruction;
    let mut bytes = bytes.to_vec();
    let host = oracle.data_address() + MIDDLE + shift;
    if has_memory {
        instruction.set_memory_displacement64(host);
        let mut encoder = iced_x86::Encoder::new(64);
        encoder.encode(&instruction, 0).unwrap();
        bytes = encoder.take_buffer();
    }
    if instruction.memory_index().is_vector_register() {
        // Indices that stay within the memory at hand.
        let narrow = matches!(
            instruction.mnemonic(),
            M::Vpgatherdd | M::Vgatherdps | M::Vpgatherdq | M::Vgatherdpd
        );
        let index = &mut expected.vec[instruction.memory_index().number()].0;
        for word in index {
            let small = || random_index(random.0);
            *word = if narrow {
                u64::from(small() as u32) * 0x1_0000_0001
            } else {
                i64::from(small()) as u64
            };
            random.next();
        }
    }
    let implied = instruction.op_kinds().any(|kind| kind == OpKind::MemorySegRDI);
    if implied {
        expected.gpr[7] = host;
    }
    oracle.data()[..SPAN].copy_from_slice(&memory);
    machine.put(GUEST, &memory);
    machine.vcpu.state = expected.clone();

    let lowered = lower(machine, &instruction, &bytes).unwrap();
    let mut op = op(&instruction, &lowered);
    op.disp = GUEST + MIDDLE + shift;
    if implied {
        machine.vcpu.state.gpr[7] = op.disp;
        op.disp = 0;
    }
    let ours = (op.run)(&mut machine.vcpu, &op);
    let theirs = oracle.run(&bytes, &mut expected);

    let what = format!("{instruction:?} {bytes:02x?}");
    match (ours, theirs) {
        (Ok(()), Ok(())) => {}
        (Err(Abort::Fault), Err(signal)) => {
            let vector = machine.vcpu.fault.vector;
            let same = match vector {
                Vector::Simd => signal == libc::SIGFPE,
                Vector::GeneralProtection => signal == libc::SIGSEGV,
                _ => false,
            };
            assert!(same, "{what}: {vector:?} here, signal {signal} on the host");
            *tally.faults.entry(format!("{vector:?}")).or_default() += 1;
            // CPUs differ in whether a conversion to MMX registers that faults has made
            // them MMX registers already.
            expected.fpu = machine.vcpu.state.fpu.clone();
            // See `exec_unmasked` for what it cannot know of the precision flag.
            let range = expected.mxcsr & !(expected.mxcsr >> 7) & 0b11000;
            if matches!(instruction.mnemonic(), M::Dpps | M::Dppd | M::Vdpps | M::Vdppd) {
                expected.mxcsr = machine.vcpu.state.mxcsr;
            } else if range != 0 {
                expected.mxcsr = expected.mxcsr & !0x20 | machine.vcpu.state.mxcsr & 0x20;
            }
        }
        // AMD's SHA instructions take misaligned operands, Intel's do not; so ours do not.
        (Err(Abort::Fault), Ok(()))
            if instruction.cpuid_features() == [F::SHA] && shift % 16 != 0 =>
        {
            return;
        }
        _ => {
            panic!("{what}: {ours:?} {:?} here, signal {theirs:?} on the host", machine.vcpu.fault)
        }
    }
    assert_eq!(machine.get(GUEST, SPAN), oracle.data()[..SPAN], "{what}: memory was {memory:02x?}");
    if implied {
        expected.gpr[7] = machine.vcpu.state.gpr[7];
    }
    if !is_random(instruction.mnemonic()) {
        assert_same(&machine.vcpu.state, &expected, &what);
    }
}

fn random_index(seed: u64) -> i32 {
    (seed >> 33) as i32 % 64
}

/// Asserts that all that instructions can change is alike, x87 pointers apart (the
/// host's are its own).
#[track_caller]
pub(super) fn assert_same(ours: &VcpuState, theirs: &VcpuState, what: &str) {
    for i in 0..16 {
        assert_eq!(
            ours.gpr[i], theirs.gpr[i],
            "{what}: general register {i}: {:#x}, should be {:#x}",
            ours.gpr[i], theirs.gpr[i]
        );
        assert_eq!(ours.vec[i], theirs.vec[i], "{what}: vector register {i}");
    }
    assert_eq!(ours.rflags, theirs.rflags, "{what}: flags");
    assert_eq!(
        ours.mxcsr, theirs.mxcsr,
        "{what}: MXCSR: {:#x}, should be {:#x}",
        ours.mxcsr, theirs.mxcsr
    );
    let (mut ours, mut theirs) = (ours.fpu.clone(), theirs.fpu.clone());
    ours.set_pointers(Pointers::default());
    theirs.set_pointers(Pointers::default());
    assert_eq!(ours.fxsave[..24], theirs.fxsave[..24], "{what}: x87 control and status");
    for i in 0..8 {
        assert_eq!(ours.st(i), theirs.st(i), "{what}: ST{i}");
    }
}
