//! Registers and memory that make a given instruction interesting: counts that end,
//! addresses that exist, divisions that mostly fit, stacks with somewhere to return to.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register as R};
use softcpu::state::VcpuState;
use softcpu::state::rflags::RFlags;

use crate::encode::{Encoded, somewhere};
use crate::layout::{
    CODE, DATA, DATA_LEN, LDT_CS32, LDT_DS16, LDT_DS32, Mode, USER_CS32, USER_CS64, USER_DS,
};
use crate::random::{self, Random};

/// Flags that must not get into the host's register: single steps and alignment checks
/// would hit the harness. (The others above the status flags are not for user mode to set.)
const FORBIDDEN: u64 = 1 << 8 | 1 << 18 | 0xffff_ffff << 32;

/// Fills in `state` and `data` for one run.
pub(crate) fn prepare(
    it: &Encoded,
    ldt: bool,
    state: &mut VcpuState,
    data: &mut [u8; DATA_LEN],
    random: &mut Random,
) {
    let Encoded { instruction, placed, operand, .. } = it;
    let mode = placed.mode;
    random::registers(state, mode.register_mask(), random);
    let near = (operand.clamp(&DATA, &(DATA + DATA_LEN as u64 - 256)) - DATA) as usize;
    random::memory(&mut data[near & !63..][..256], random);
    let stack = if random.one_in(12) {
        somewhere(random)
    } else {
        (DATA + 0x1800 + random.below(0x1000)) & !7
    };
    for register in [4, 5] {
        let at = stack.wrapping_add(random.below(4) * 8).wrapping_sub(mode.base());
        set(&mut state.gpr[register], at, mode.stack_mask());
    }
    if mode == Mode::Long {
        state.seg[4].base = it.gs_base;
        state.seg[5].base = it.gs_base;
    }
    integers(it, state, random);
    let target = CODE - mode.base() + placed.target;
    let mut poke = Poke { data, random };
    match instruction.mnemonic() {
        M::Jmp | M::Call if instruction.op0_kind() == OpKind::Register => {
            state.gpr[instruction.op0_register().number()] = target;
        }
        M::Jmp | M::Call if instruction.op0_kind() == OpKind::Memory => {
            poke.far_pointer(*operand, target, mode.selectors()[1], instruction);
        }
        M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs => {
            let selector = selector(instruction, ldt, poke.random);
            let at = operand + instruction.memory_size().size() as u64 - 2;
            poke.write(at, u64::from(selector), 2);
        }
        _ => {}
    }
    if selects(instruction) {
        let chosen = u64::from(selector(instruction, ldt, poke.random));
        match instruction
            .op_kinds()
            .enumerate()
            .find(|(n, kind)| *n > 0 && *kind == OpKind::Register)
        {
            Some((n, _)) => state.gpr[instruction.op_register(n as u32).number()] = chosen,
            None if instruction.op_count() == 1 && instruction.op0_kind() == OpKind::Register => {
                state.gpr[instruction.op0_register().number()] = chosen;
            }
            None => poke.write(*operand, chosen, 2),
        }
    }
    if matches!(instruction.mnemonic(), M::Ldmxcsr | M::Vldmxcsr) && !poke.random.one_in(4) {
        let value = poke.random.next() & 0xe07f | 0x1f80;
        poke.write(*operand, value, 4);
    }
    for (register, value, mask) in &it.pins {
        set(&mut state.gpr[*register], *value, *mask);
    }
    state.gpr.iter_mut().for_each(|register| *register &= mode.register_mask());
    poke.accumulator(it, state);
    poke.stack(it, ldt, state, target);
}

fn set(register: &mut u64, value: u64, mask: u64) {
    *register = *register & !mask | value & mask;
}

/// What integer instructions like to find in their implicit registers.
fn integers(it: &Encoded, state: &mut VcpuState, random: &mut Random) {
    let instruction = &it.instruction;
    match instruction.mnemonic() {
        M::Div | M::Idiv if !random.one_in(3) => {
            let high = random.pick(&[0, 0, 1, u64::MAX]);
            state.gpr[2] = high;
            set(&mut state.gpr[0], high << 8, 0xff00);
        }
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
            state.gpr[1] =
                random.pick(&[0, 1, 2, 0x1_0000, 1 << 32, 0x1_0001, u64::MAX, state.gpr[1]]);
        }
        // Its exception is for a handler that neither side has.
        M::Into => state.rflags -= RFlags::OF,
        M::Bt | M::Bts | M::Btr | M::Btc if instruction.op1_kind() == OpKind::Register => {
            let offset = (random.below(0xe000) as i64 - 0x7000) as u64;
            let register = instruction.op1_register();
            set(&mut state.gpr[register.number()], offset, u64::MAX >> (64 - register.size() * 8));
        }
        M::Wrfsbase | M::Wrgsbase if !random.one_in(4) => {
            state.gpr[instruction.op0_register().number()] &= 0x7fff_ffff_ffff;
        }
        _ => {}
    }
    if instruction.is_string_instruction() {
        let count = random.pick(&[0, 1, 2, 3]) + random.below(3) * random.below(24);
        let mask = match instruction.op_kinds().next() {
            Some(OpKind::MemorySegSI | OpKind::MemoryESDI) => 0xffff,
            Some(OpKind::MemorySegESI | OpKind::MemoryESEDI) => 0xffff_ffff,
            Some(OpKind::MemorySegRSI | OpKind::MemoryESRDI) => u64::MAX,
            _ => string_mask(instruction),
        };
        set(&mut state.gpr[1], count, mask);
    }
    if instruction.memory_index().is_vector_register() {
        let narrow = matches!(
            instruction.mnemonic(),
            M::Vpgatherdd | M::Vgatherdps | M::Vpgatherdq | M::Vgatherdpd
        );
        for word in &mut state.vec[instruction.memory_index().number()].0 {
            let mut small = || random.below(256) as i64 - 128;
            *word = if narrow {
                small() as u64 & 0xffff_ffff | (small() as u64) << 32
            } else {
                small() as u64
            };
        }
    }
}

/// The address size of string instructions whose first operand is a register.
fn string_mask(instruction: &Instruction) -> u64 {
    match instruction.op1_kind() {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 0xffff,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Whether an operand is a selector that is looked up.
fn selects(instruction: &Instruction) -> bool {
    match instruction.mnemonic() {
        M::Mov => {
            instruction.op0_kind() == OpKind::Register
                && instruction.op0_register().is_segment_register()
        }
        M::Lar | M::Lsl | M::Verr | M::Verw => true,
        _ => false,
    }
}

/// A selector: good, null, or bad in a way that both sides' tables agree on.
fn selector(instruction: &Instruction, ldt: bool, random: &mut Random) -> u16 {
    let ours = random.pick(&[LDT_DS16, LDT_DS32, LDT_CS32, 0x27, 0x1004]);
    match random.below(8) {
        0 => random.pick(&[0, 1, 3]),
        1 => random.pick(&[USER_CS32, USER_CS64, 0x10, 0x18, 0x13, 0x1000]),
        2 | 3 if ldt && instruction.mnemonic() != M::Lss => ours,
        _ => USER_DS,
    }
}

struct Poke<'a> {
    data: &'a mut [u8; DATA_LEN],
    random: &'a mut Random,
}

impl Poke<'_> {
    /// Writes what of `value` lies within the data.
    fn write(&mut self, at: u64, value: u64, size: usize) {
        for (i, byte) in value.to_le_bytes().into_iter().take(size).enumerate() {
            let offset = at.wrapping_add(i as u64).wrapping_sub(DATA) as usize;
            if let Some(place) = self.data.get_mut(offset) {
                *place = byte;
            }
        }
    }

    fn far_pointer(&mut self, at: u64, target: u64, selector: u16, instruction: &Instruction) {
        let size = instruction.memory_size().size();
        if instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect() {
            self.write(at, target, size - 2);
            self.write(at + size as u64 - 2, u64::from(selector), 2);
        } else {
            self.write(at, target, size);
        }
    }

    /// Comparisons that succeed half of the time.
    fn accumulator(&mut self, it: &Encoded, state: &mut VcpuState) {
        if self.random.one_in(2) {
            return;
        }
        let [rax, rdx] = [state.gpr[0], state.gpr[2]];
        match it.instruction.mnemonic() {
            M::Cmpxchg if it.instruction.op0_kind() == OpKind::Memory => {
                self.write(it.operand, rax, 8)
            }
            M::Cmpxchg8b => self.write(it.operand, rax & 0xffff_ffff | rdx << 32, 8),
            M::Cmpxchg16b => {
                self.write(it.operand, rax, 8);
                self.write(it.operand + 8, rdx, 8);
            }
            _ => {}
        }
    }

    /// What `ret`, `iret`, `popf` and `pop` of a segment register find on the stack.
    fn stack(&mut self, it: &Encoded, ldt: bool, state: &VcpuState, target: u64) {
        let mode = it.placed.mode;
        let top = (state.gpr[4] & mode.stack_mask()).wrapping_add(mode.base());
        let size = match it.instruction.stack_pointer_increment() {
            0 => 8,
            n => n.unsigned_abs() as usize,
        };
        let code = format!("{:?}", it.instruction.code());
        let unit = if code.contains("retw") || code.contains("Retnw") || code.contains("Retfw") {
            2
        } else if code.contains("retd") || code.contains("Retnd") || code.contains("Retfd") {
            4
        } else {
            8
        };
        let selector_of_code = u64::from(mode.selectors()[1]);
        let flags = self.random.next() & !FORBIDDEN & !(1 << 14);
        match it.instruction.mnemonic() {
            M::Ret => self.write(top, target, unit),
            M::Retf => {
                self.write(top, target, unit);
                self.write(top + unit as u64, selector_of_code, unit);
            }
            M::Iret | M::Iretd | M::Iretq => {
                let frame =
                    [target, selector_of_code, flags & 0xed5 | 2, state.gpr[4], u64::from(USER_DS)];
                for (i, value) in frame.into_iter().enumerate() {
                    self.write(top + (i * unit) as u64, value, unit);
                }
            }
            M::Popf | M::Popfd | M::Popfq => {
                let flags = self.random.next() & !FORBIDDEN;
                self.write(top, flags, 8);
            }
            M::Pop
                if it.instruction.op0_kind() == OpKind::Register
                    && it.instruction.op0_register().is_segment_register() =>
            {
                let chosen = match it.instruction.op0_register() {
                    R::SS => mode.selectors()[2],
                    _ => selector(&it.instruction, ldt, self.random),
                };
                self.write(top, u64::from(chosen), size);
            }
            _ => {}
        }
    }
}
