//! Runs of instructions, straight and with jumps: the translator against the interpreter.
//!
//! One instruction at a time shows that each is copied rightly; what goes on between them
//! (flags that are kept, lost and brought back, registers on their way through scratch
//! registers, faults in the middle) shows only in a row. Undefined flags are left out by not
//! taking instructions that have some.

use iced_x86::{
    Code, Encoder, FlowControl, Instruction, MemoryOperand, Mnemonic as M, OpCodeOperandKind,
    OpKind, Register as R, RflagsBits,
};
use softcpu::state::VcpuState;

use crate::encode::{Encoded, encode};
use crate::guest::{Guest, RowEnd, elsewhere};
use crate::layout::{CODE, DATA, DATA_LEN, Mode};
use crate::prepare::prepare;
use crate::random::{self, Random};
use crate::segments;

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
    M::Movsb,
    M::Movsw,
    M::Movsq,
    M::Stosb,
    M::Stosd,
    M::Stosq,
    M::Lodsb,
    M::Lodsd,
    M::Scasb,
    M::Cmpsb,
    M::Cld,
];

/// Of the x87 unit and MMX, what compilers use and what is special about it.
const X87: &[M] = &[
    M::Fld,
    M::Fst,
    M::Fstp,
    M::Fild,
    M::Fistp,
    M::Fisttp,
    M::Fldz,
    M::Fld1,
    M::Fxch,
    M::Fadd,
    M::Faddp,
    M::Fsub,
    M::Fsubrp,
    M::Fmul,
    M::Fmulp,
    M::Fiadd,
    M::Fdiv,
    M::Fdivrp,
    M::Fchs,
    M::Fabs,
    M::Fsqrt,
    M::Fcomi,
    M::Fucomip,
    M::Fucompp,
    M::Fcmovbe,
    M::Fnstsw,
    M::Fnstcw,
    M::Fldcw,
    M::Fnclex,
    M::Fninit,
    M::Fnstenv,
    M::Ffree,
    M::Fincstp,
    M::Wait,
    M::Sahf,
    M::Emms,
    M::Paddb,
    M::Movq,
    M::Movd,
    M::Cvtpi2ps,
    M::Movq2dq,
];

fn wanted(code: Code, mode: Mode) -> bool {
    let op_code = code.op_code();
    let mut it = Instruction::new();
    it.set_code(code);
    op_code.is_instruction()
        && match mode {
            Mode::Long => op_code.mode64(),
            Mode::Flat32 | Mode::Based32 => op_code.mode32(),
            Mode::Bits16 => op_code.mode16(),
        }
        && it.flow_control() == FlowControl::Next
        && !it.is_privileged()
        && !op_code.is_input_output()
        && it.rflags_undefined() & !RflagsBits::AF == 0
        && !rotates_by_constant(code)
        && !matches!(it.mnemonic(), M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Rdpmc)
        // What masked and gathering accesses have done before they fault is up to them.
        && !matches!(it.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)
}

/// Whether `code` rotates by a constant: by any but one, what CPUs make of OF depends on whether
/// the count is in the instruction or in CL.
fn rotates_by_constant(code: Code) -> bool {
    let op_code = code.op_code();
    let constant = op_code.op_kinds().contains(&OpCodeOperandKind::imm8);
    constant && matches!(code.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr)
}

/// Codes to choose from: all that there are in a mode, and those of [`COMMON`] and [`X87`].
pub(crate) struct Codes {
    mode: Mode,
    /// How many of eight are of [`X87`].
    floating: u64,
    all: Vec<Code>,
    common: Vec<Code>,
    x87: Vec<Code>,
}

impl Codes {
    pub(crate) fn new(mode: Mode) -> Self {
        let all: Vec<Code> = Code::values().filter(|code| wanted(*code, mode)).collect();
        let of = |these: &[M]| {
            all.iter().copied().filter(|code| these.contains(&code.mnemonic())).collect()
        };
        Self { mode, floating: 1, common: of(COMMON), x87: of(X87), all }
    }

    /// Mostly those of [`X87`].
    pub(crate) fn floating(mode: Mode) -> Self {
        Self { floating: 5, ..Self::new(mode) }
    }

    fn pick(&self, random: &mut Random) -> Code {
        let from = match random.below(8) {
            0 => &self.all,
            n if n <= self.floating => &self.x87,
            _ => &self.common,
        };
        random.pick(from)
    }
}

/// What a row is made of.
enum Piece {
    Instruction(Encoded),
    /// To the start of another piece: always, or on a condition as Jcc's opcode has it.
    Jump {
        condition: Option<u8>,
        to: usize,
    },
    /// A call of another piece, which does not return.
    Call(usize),
    /// The start of another piece is pushed and returned to. Only in code below 2 GiB.
    Return(usize),
}

impl Piece {
    /// Bytes of a distance or an address.
    fn word(mode: Mode) -> usize {
        if mode == Mode::Bits16 { 2 } else { 4 }
    }

    fn len(&self, mode: Mode) -> usize {
        let word = Self::word(mode);
        match self {
            Self::Instruction(it) => it.bytes.len(),
            Self::Jump { condition: None, .. } | Self::Call(_) => 1 + word,
            Self::Jump { condition: Some(_), .. } | Self::Return(_) => 2 + word,
        }
    }
}

/// The bytes of a row that begins at `address`.
fn assemble(row: &[Piece], mode: Mode, address: u64) -> Vec<u8> {
    let starts: Vec<usize> =
        (0..=row.len()).map(|n| row[..n].iter().map(|piece| piece.len(mode)).sum()).collect();
    let word = Piece::word(mode);
    let mut bytes = Vec::new();
    for (n, piece) in row.iter().enumerate() {
        match piece {
            Piece::Instruction(it) => bytes.extend(&it.bytes),
            Piece::Jump { to, .. } | Piece::Call(to) => {
                match piece {
                    Piece::Jump { condition: Some(condition), .. } => {
                        bytes.extend([0x0f, 0x80 | condition]);
                    }
                    Piece::Call(_) => bytes.push(0xe8),
                    _ => bytes.push(0xe9),
                }
                let distance = starts[*to] as i32 - starts[n + 1] as i32;
                bytes.extend(&distance.to_le_bytes()[..word]);
            }
            Piece::Return(to) => {
                bytes.push(0x68);
                bytes.extend(&(address as u32 + starts[*to] as u32).to_le_bytes()[..word]);
                bytes.push(0xc3);
            }
        }
    }
    bytes
}

fn instruction(codes: &Codes, random: &mut Random) -> Encoded {
    loop {
        if let Ok(mut it) = encode(codes.pick(random), codes.mode, random)
            // Where it lies shall not matter.
            && !it.instruction.is_ip_rel_memory_operand()
        {
            let memory = it.instruction.op_kinds().any(|kind| kind == OpKind::Memory);
            if codes.mode != Mode::Long && memory && random.one_in(6) {
                let mut made = it.instruction;
                made.set_segment_prefix(random.pick(&[R::FS, R::GS]));
                become_other(&mut it, made);
            }
            if it.instruction.is_string_instruction() {
                let most = if random.one_in(4) { 0x800 } else { 24 };
                let count = random.below(most);
                it.pins.push((1, count, u64::MAX));
            }
            return it;
        }
    }
}

/// Makes `made` of `it`, if that can be encoded.
fn become_other(it: &mut Encoded, made: Instruction) {
    let mut encoder = Encoder::new(it.placed.mode.bitness());
    if encoder.encode(&made, it.instruction.ip()).is_ok() {
        it.bytes = encoder.take_buffer();
        it.instruction = made;
    }
}

/// A straight row.
fn straight(codes: &Codes, random: &mut Random) -> Vec<Piece> {
    let len = 1 + random.below(LONGEST);
    (0..len).map(|_| Piece::Instruction(instruction(codes, random))).collect()
}

/// A row that reaches memory through two registers, which are stepped now and then, as
/// compiled code does; often near the end of a page. With jumps in it, or straight.
fn pointing(codes: &Codes, random: &mut Random, jumps: bool) -> Vec<Piece> {
    let mut row = if jumps { branching(codes, random) } else { straight(codes, random) };
    let long = codes.mode == Mode::Long;
    let bases = if long {
        [random.pick(&[R::RBX, R::RBP, R::RSI, R::R11, R::R14, R::R15]), R::RSP]
    } else {
        [random.pick(&[R::EBX, R::EBP, R::ESI]), R::ESP]
    };
    // It has small numbers.
    let small = if long { R::R9 } else { R::EDX };
    let [add, sub, lea] = if long {
        [Code::Add_rm64_imm8, Code::Sub_rm64_imm8, Code::Lea_r64_m]
    } else {
        [Code::Add_rm32_imm8, Code::Sub_rm32_imm8, Code::Lea_r32_m]
    };
    for piece in &mut row {
        let Piece::Instruction(it) = piece else { continue };
        let base = if random.one_in(3) { bases[1] } else { bases[0] };
        let through = it.instruction.op_kinds().any(|kind| kind == OpKind::Memory)
            && it.instruction.memory_index() == R::None
            && it.instruction.memory_segment() == R::DS;
        let step = if base == bases[1] { 8 } else { 1 + random.below(32) as i32 };
        let made = match random.below(8) {
            0 => Instruction::with2(add, base, step).unwrap(),
            1 => Instruction::with2(sub, base, step).unwrap(),
            2 => {
                let at = MemoryOperand::with_base_displ(base, step.into());
                Instruction::with2(lea, base, at).unwrap()
            }
            _ if through => {
                let mut made = it.instruction;
                made.set_memory_base(base);
                // Seldom in other pages too.
                let far = if random.one_in(6) { 0x400 * random.below(8) } else { 0 };
                made.set_memory_displacement64(8 * random.below(24) + far);
                made.set_memory_displ_size(1);
                if random.one_in(3) {
                    made.set_memory_index(small);
                    made.set_memory_index_scale(1 << random.below(4));
                }
                made
            }
            _ => continue,
        };
        become_other(it, made);
    }
    let page = DATA - codes.mode.base() + 0x1000 * (1 + random.below(3));
    let at = if random.one_in(2) { page - random.below(0x100) } else { page + random.below(0x800) };
    if let Some(first) = row.iter_mut().find_map(|piece| match piece {
        Piece::Instruction(it) => Some(it),
        _ => None,
    }) {
        let [a, b] = bases.map(|base| (base.number(), at & !15, u64::MAX));
        let pins = [a, b, (small.number(), random.below(8), u64::MAX)];
        first.pins.retain(|(register, ..)| pins.iter().all(|(pinned, ..)| pinned != register));
        first.pins.extend(pins);
    }
    row
}

/// A row with jumps forwards and backwards in it.
fn branching(codes: &Codes, random: &mut Random) -> Vec<Piece> {
    let len = 4 + random.below(3 * LONGEST) as usize;
    let mut row: Vec<Piece> = Vec::new();
    while row.len() < len {
        let piece = if row.is_empty() || !random.one_in(3) {
            Piece::Instruction(instruction(codes, random))
        } else if codes.mode != Mode::Long && random.one_in(6) {
            let to = (row.len() + 1 + random.below(4) as usize).min(len);
            if random.one_in(2) { Piece::Call(to) } else { Piece::Return(to) }
        } else if random.one_in(6) {
            Piece::Jump { condition: None, to: (row.len() + 1 + random.below(4) as usize).min(len) }
        } else {
            let condition = Some(random.below(16) as u8);
            let to = if random.one_in(3) {
                row.len() - random.below(row.len().min(8) as u64) as usize
            } else {
                (row.len() + 1 + random.below(6) as usize).min(len)
            };
            Piece::Jump { condition, to }
        };
        row.push(piece);
    }
    row
}

/// One random row on both; `Err` says what differed.
pub(crate) fn compare(
    codes: &Codes,
    interpreter: &mut Guest,
    translator: &mut Guest,
    random: &mut Random,
) -> Result<(), String> {
    // Each time with other segments.
    let places = vec![0; if codes.mode == Mode::Long { 1 } else { 3 }];
    compare_made([interpreter, translator], random, |random| (straight(codes, random), places))
}

/// The same for a row with jumps, a few times on end, so that its blocks are hot.
pub(crate) fn compare_branching(
    codes: &Codes,
    interpreter: &mut Guest,
    translator: &mut Guest,
    random: &mut Random,
) -> Result<(), String> {
    compare_made([interpreter, translator], random, |random| (branching(codes, random), vec![0; 9]))
}

/// The same, hot at one address and then run at others.
pub(crate) fn compare_elsewhere(
    codes: &Codes,
    interpreter: &mut Guest,
    translator: &mut Guest,
    random: &mut Random,
) -> Result<(), String> {
    compare_made([interpreter, translator], random, |random| {
        let row = branching(codes, random);
        let [a, b, c] = [(); 3].map(|()| elsewhere(random.next()));
        (row, vec![a, a, a, a, a, b, b, a, c])
    })
}

/// The same for rows that reach memory through registers.
pub(crate) fn compare_pointing(
    codes: &Codes,
    interpreter: &mut Guest,
    translator: &mut Guest,
    random: &mut Random,
) -> Result<(), String> {
    compare_made([interpreter, translator], random, |random| {
        let jumps = random.one_in(2);
        (pointing(codes, random, jumps), vec![0; 6])
    })
}

/// A row that `make` makes, and the distances at which it is run in turn.
fn compare_made(
    guests: [&mut Guest; 2],
    random: &mut Random,
    make: impl FnOnce(&mut Random) -> (Vec<Piece>, Vec<u64>),
) -> Result<(), String> {
    let seed = random.0;
    let (row, places) = make(random);
    compare_row(&row, guests, &places, random).map_err(|what| format!("seed {seed}: {what}"))
}

fn compare_row(
    row: &[Piece],
    mut guests: [&mut Guest; 2],
    distances: &[u64],
    random: &mut Random,
) -> Result<(), String> {
    let offset = 0x400 + random.below(0x800);
    let encoded: Vec<&Encoded> = row
        .iter()
        .filter_map(|piece| match piece {
            Piece::Instruction(it) => Some(it),
            _ => None,
        })
        .collect();
    let mode = encoded[0].placed.mode;
    let bytes = assemble(row, mode, CODE - mode.base() + offset);
    for guest in &mut guests {
        guest.put_row(offset, &bytes);
    }
    for distance in distances {
        let mut data = Box::new([0; DATA_LEN]);
        random::memory(&mut data[..], random);
        let mut before = guests[0].state(mode);
        prepare(encoded[0], false, &mut before, &mut data, random);
        for (register, value, mask) in encoded.iter().rev().flat_map(|it| &it.pins) {
            if encoded[0].pins.iter().all(|(pinned, ..)| pinned != register) {
                before.gpr[*register] = before.gpr[*register] & !mask | value & mask;
            }
        }
        if mode != Mode::Long {
            if random.one_in(2) {
                Guest::legacy(&mut before);
            }
            if mode == Mode::Flat32 {
                segments::vary(&mut before, random);
            }
        }
        let mut ends: Vec<(VcpuState, RowEnd, Vec<u8>)> = Vec::new();
        // Translated code may look for events more often than blocks end.
        for (guest, most) in guests.iter_mut().zip([64, 256]) {
            guest.put_data(&data);
            let mut state = before.clone();
            let end = guest.run_row(
                CODE - mode.base() + *distance + offset,
                bytes.len(),
                &mut state,
                most,
            );
            ends.push((state, end, guest.data().to_vec()));
        }
        let [(ours, our_end, our_data), (theirs, their_end, their_data)] = &ends[..] else {
            unreachable!("there were two")
        };
        if *our_end == RowEnd::Runs || !guests[0].has_row(offset, &bytes) {
            // A loop without an end: the two stopped in different turns of it, and what they
            // stored among the code is not compared. Or a row that has changed itself, into
            // what nobody has looked at: it may leave flags undefined.
            guests.iter_mut().for_each(|guest| guest.clear_code());
            return Ok(());
        }
        let what = if our_end != their_end || ours.rip != theirs.rip {
            "end"
        } else if ours.gpr != theirs.gpr {
            "registers"
        } else if ours.rflags != theirs.rflags {
            "flags"
        } else if ours.vec != theirs.vec || ours.mxcsr != theirs.mxcsr {
            "vector registers"
        } else if ours.fpu != theirs.fpu {
            "x87"
        } else if our_data != their_data {
            "memory"
        } else {
            continue;
        };
        let listing: Vec<String> = row.iter().enumerate().map(listed).collect();
        return Err(format!(
            "{what} differ at {offset:#x}:\n{}\n  bytes       {bytes:02x?}\n  before      {:x?} {:?}\n  interpreted {:x?} {:?} {our_end:?} rip {:x}\n  translated  {:x?} {:?} {their_end:?} rip {:x}",
            listing.join("\n"),
            &before.gpr[..16],
            before.rflags,
            &ours.gpr[..16],
            ours.rflags,
            ours.rip,
            &theirs.gpr[..16],
            theirs.rflags,
            theirs.rip
        ));
    }
    Ok(())
}

fn listed((n, piece): (usize, &Piece)) -> String {
    match piece {
        Piece::Instruction(it) => {
            let memory = it.instruction.op_kinds().any(|kind| kind == OpKind::Memory);
            let kind = if memory { "(memory)" } else { "" };
            format!("    {n}: {} {kind}", it.instruction)
        }
        Piece::Jump { condition: None, to } => format!("    {n}: to {to}"),
        Piece::Call(to) => format!("    {n}: calls {to}"),
        Piece::Return(to) => format!("    {n}: pushes and returns to {to}"),
        Piece::Jump { condition: Some(condition), to } => {
            format!("    {n}: if {condition:#x} to {to}")
        }
    }
}
