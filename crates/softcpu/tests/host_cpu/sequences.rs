//! Runs of instructions in one block: the translator against the interpreter.
//!
//! One instruction at a time shows that each is copied rightly; what goes on between them
//! (flags that are kept, lost and brought back, registers on their way through scratch
//! registers, faults in the middle) shows only in a row. Undefined flags are left out by not
//! taking instructions that have some.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic as M, OpKind, RflagsBits};
use softcpu::state::VcpuState;

use crate::encode::{Encoded, encode};
use crate::guest::Guest;
use crate::layout::{DATA_LEN, Mode};
use crate::prepare::prepare;
use crate::random::{self, Random};

/// Most instructions in a row.
const LONGEST: u64 = 14;

/// What kernels and compilers use most.
const COMMON: &[M] = &[
    M::Mov,
    M::Add,
    M::Sub,
    M::Cmp,
    M::Test,
    M::Lea,
    M::Push,
    M::Pop,
    M::Xor,
    M::And,
    M::Or,
    M::Inc,
    M::Dec,
    M::Adc,
    M::Sbb,
    M::Neg,
    M::Not,
    M::Movzx,
    M::Movsx,
    M::Movsxd,
    M::Xchg,
    M::Xadd,
    M::Cmpxchg,
    M::Cdqe,
    M::Cqo,
    M::Leave,
    M::Bt,
    M::Movups,
    M::Pxor,
    M::Movd,
    M::Movq,
    M::Lahf,
    M::Sahf,
    M::Cmove,
    M::Cmovb,
    M::Cmovle,
    M::Sete,
    M::Setb,
    M::Seto,
    M::Setle,
    M::Stc,
    M::Clc,
    M::Cmc,
    M::Mulx,
    M::Rorx,
    M::Shlx,
    M::Addsd,
    M::Cvtsi2sd,
    M::Comisd,
];

fn wanted(code: Code) -> bool {
    let op_code = code.op_code();
    let mut it = Instruction::new();
    it.set_code(code);
    op_code.is_instruction()
        && op_code.mode64()
        && it.flow_control() == FlowControl::Next
        && !it.is_privileged()
        && !op_code.is_input_output()
        && it.rflags_undefined() & !RflagsBits::AF == 0
        // How far a repetition had come when it faulted is told by its registers.
        && !it.is_string_instruction()
        && !matches!(it.mnemonic(), M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Rdpmc)
        // What masked and gathering accesses have done before they fault is up to them.
        && !matches!(it.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)
}

/// Codes to choose from: all, and those of [`COMMON`].
pub(crate) struct Codes {
    all: Vec<Code>,
    common: Vec<Code>,
}

impl Codes {
    pub(crate) fn new() -> Self {
        let all: Vec<Code> = Code::values().filter(|code| wanted(*code)).collect();
        let common = all.iter().copied().filter(|code| COMMON.contains(&code.mnemonic()));
        Self { common: common.collect(), all }
    }

    fn pick(&self, random: &mut Random) -> Code {
        let from = if random.one_in(8) { &self.all } else { &self.common };
        random.pick(from)
    }
}

/// One random row on both; `Err` says what differed.
pub(crate) fn compare(
    codes: &Codes,
    interpreter: &mut Guest,
    translator: &mut Guest,
    random: &mut Random,
) -> Result<(), String> {
    let seed = random.0;
    let mut row: Vec<Encoded> = Vec::new();
    let len = 1 + random.below(LONGEST);
    while (row.len() as u64) < len {
        if let Ok(it) = encode(codes.pick(random), Mode::Long, random)
            // Where it lies shall not matter.
            && !it.instruction.is_ip_rel_memory_operand()
        {
            row.push(it);
        }
    }
    let mut data = Box::new([0; DATA_LEN]);
    random::memory(&mut data[..], random);
    let mut before = interpreter.state(Mode::Long);
    prepare(&row[0], false, &mut before, &mut data, random);
    for (register, value, mask) in row.iter().rev().flat_map(|it| &it.pins) {
        if row[0].pins.iter().all(|(pinned, ..)| pinned != register) {
            before.gpr[*register] = before.gpr[*register] & !mask | value & mask;
        }
    }
    let bytes: Vec<u8> = row.iter().flat_map(|it| it.bytes.iter().copied()).collect();
    let offset = 0x400 + random.below(0x800);
    let mut ends: Vec<(VcpuState, Option<u8>, Vec<u8>)> = Vec::new();
    for guest in [&mut *interpreter, translator] {
        guest.put_data(&data);
        let mut state = before.clone();
        let fault = guest.run_row(offset, &bytes, &mut state);
        ends.push((state, fault, guest.data().to_vec()));
    }
    let [(ours, our_fault, our_data), (theirs, their_fault, their_data)] = &ends[..] else {
        unreachable!("there were two")
    };
    let what = if our_fault != their_fault || ours.rip != theirs.rip {
        "end"
    } else if ours.gpr != theirs.gpr {
        "registers"
    } else if ours.rflags != theirs.rflags {
        "flags"
    } else if ours.vec != theirs.vec || ours.mxcsr != theirs.mxcsr {
        "vector registers"
    } else if ours.fpu.fxsave != theirs.fpu.fxsave {
        "x87"
    } else if our_data != their_data {
        "memory"
    } else {
        return Ok(());
    };
    let listing: Vec<String> =
        row.iter().map(|it| format!("    {} {}", it.instruction, kinds(&it.instruction))).collect();
    Err(format!(
        "{what} differ, seed {seed}, at {offset:#x}:\n{}\n  before      {:x?} {:?}\n  interpreted {:x?} {:?} {our_fault:?} rip {:x}\n  translated  {:x?} {:?} {their_fault:?} rip {:x}",
        listing.join("\n"),
        &before.gpr[..16],
        before.rflags,
        &ours.gpr[..16],
        ours.rflags,
        ours.rip,
        &theirs.gpr[..16],
        theirs.rflags,
        theirs.rip
    ))
}

fn kinds(it: &Instruction) -> &'static str {
    if it.op_kinds().any(|kind| kind == OpKind::Memory) { "(memory)" } else { "" }
}
