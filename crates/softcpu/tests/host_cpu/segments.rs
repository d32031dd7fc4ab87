//! Segments for rows of 32-bit code: flat ones, such that are added, and such that refuse.

use softcpu::state::VcpuState;
use softcpu::state::segment::{Access, SegReg, Segment};

use crate::layout::{AREA, AREA_LEN, DATA, DATA_END, Mode, USER_DS, segment};
use crate::random::Random;

const DATA_SEGMENTS: [SegReg; 5] = [SegReg::Es, SegReg::Ss, SegReg::Ds, SegReg::Fs, SegReg::Gs];

/// Gives `state`, which is ready for flat 32-bit code, segments of some kind or other.
pub(crate) fn vary(state: &mut VcpuState, random: &mut Random) {
    for register in [SegReg::Fs, SegReg::Gs] {
        *state.segment_mut(register) = segment(USER_DS);
    }
    match random.below(4) {
        0 => {}
        1 => all_at(state, DATA + 0x2000 + random.below(0x100)),
        2 => small_stack(state),
        _ => each_its_own(state, random),
    }
    if random.one_in(4) {
        // As 64-bit code may have left them.
        for register in &mut state.gpr[..16] {
            if random.one_in(3) {
                *register |= random.next() << 32;
            }
        }
    }
}

/// All begin at `base`, and what points to memory is as far from there: much of it wraps.
fn all_at(state: &mut VcpuState, base: u64) {
    for register in DATA_SEGMENTS {
        state.segment_mut(register).base = base;
    }
    for register in &mut state.gpr[..8] {
        if (AREA..AREA + AREA_LEN as u64).contains(&(*register & !0xfff)) {
            *register = register.wrapping_sub(base) & Mode::Flat32.register_mask();
        }
    }
}

/// The stack pointer has 16 bits.
fn small_stack(state: &mut VcpuState) {
    let stack = state.segment_mut(SegReg::Ss);
    stack.base = AREA;
    stack.access -= Access::BIG;
}

fn each_its_own(state: &mut VcpuState, random: &mut Random) {
    for register in DATA_SEGMENTS {
        let stack = register == SegReg::Ss;
        let segment = state.segment_mut(register);
        match random.below(8) {
            0 | 1 => segment.base = random.below(0x400),
            2 => segment.base = (random.below(0x100) as u32).wrapping_neg().into(),
            3 => segment.limit = (DATA_END - random.below(0x3000)) as u32,
            4 if !stack => segment.access -= Access::WRITE_OR_READ,
            4 | 5 => {
                segment.access |= Access::DOWN_OR_CONFORMING;
                segment.limit = (DATA + random.below(0x3000)) as u32;
            }
            6 if !stack => *segment = Segment::null(0),
            _ => {}
        }
    }
}
