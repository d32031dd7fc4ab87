//! State images against the host's: FXSAVE, XSAVE, FNSAVE and their counterparts.

use std::ops::Range;

use super::oracle::Oracle;
use super::property::assert_same;
use super::{Random, assert_fault, generate, run};
use crate::exception::Vector;
use crate::state::VcpuState;
use crate::state::fpu::VectorRegister;
use crate::testing::TestMachine;

const GUEST: u64 = 0x8000;
const SIZE: usize = 1024;

// All with the operand at [rcx].
const FXSAVE: &[u8] = &[0x0f, 0xae, 0x01];
const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x01];
const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x09];
const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x09];
const XSAVE: &[u8] = &[0x0f, 0xae, 0x21];
const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x21];
const XSAVEOPT64: &[u8] = &[0x48, 0x0f, 0xae, 0x31];
const XSAVEC64: &[u8] = &[0x48, 0x0f, 0xc7, 0x21];
const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x29];
const FNSTENV: &[u8] = &[0xd9, 0x31];
const FNSTENV16: &[u8] = &[0x66, 0xd9, 0x31];
const FLDENV: &[u8] = &[0xd9, 0x21];
const FLDENV16: &[u8] = &[0x66, 0xd9, 0x21];
const FNSAVE: &[u8] = &[0xdd, 0x31];
const FNSAVE16: &[u8] = &[0x66, 0xdd, 0x31];
const FRSTOR: &[u8] = &[0xdd, 0x21];
const FRSTOR16: &[u8] = &[0x66, 0xdd, 0x21];
const STMXCSR: &[u8] = &[0x0f, 0xae, 0x19];
const LDMXCSR: &[u8] = &[0x0f, 0xae, 0x11];

struct Pair {
    oracle: Oracle,
    machine: TestMachine,
    random: Random,
}

impl Pair {
    fn new() -> Self {
        Self {
            oracle: Oracle::new(),
            machine: TestMachine::long_mode(),
            random: Random(0xfeed_5eed),
        }
    }

    fn random_state(&mut self) -> VcpuState {
        let mut state = self.machine.vcpu.state.clone();
        let unmasked = self.random.below(2) == 0;
        generate::state(&mut state, unmasked, &mut self.random);
        state
    }

    /// Runs `bytes` on `state` and `memory` here and on the host, and compares all but
    /// the bytes `apart` (pointers, which are the host's own), which become zero.
    fn run(
        &mut self,
        bytes: &[u8],
        mut state: VcpuState,
        memory: &mut Vec<u8>,
        apart: &[Range<usize>],
    ) -> VcpuState {
        let what = format!("{bytes:02x?}");
        self.oracle.data()[..SIZE].copy_from_slice(memory);
        self.machine.put(GUEST, memory);
        state.gpr[1] = GUEST;
        self.machine.vcpu.state = state.clone();
        run(&mut self.machine, bytes)
            .unwrap_or_else(|_| panic!("{what}: {:?}", self.machine.vcpu.fault));
        state.gpr[1] = self.oracle.data_address();
        self.oracle.run(bytes, &mut state).unwrap();
        state.gpr[1] = GUEST;
        assert_same(&self.machine.vcpu.state, &state, &what);
        let mut ours = self.machine.get(GUEST, SIZE);
        let mut theirs = self.oracle.data()[..SIZE].to_vec();
        memory.clone_from(&ours);
        for range in apart {
            ours[range.clone()].fill(0);
            theirs[range.clone()].fill(0);
        }
        let first = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        assert_eq!(first, None, "{what}: first byte that differs");
        self.machine.vcpu.state.clone()
    }

    /// Saves a random state with `save`, restores it over another with `restore`.
    fn round_trip(&mut self, save: &[u8], restore: &[u8], apart: &[Range<usize>], mask: u64) {
        for _ in 0..40 {
            let mut memory = vec![0; SIZE];
            let mut state = self.random_state();
            (state.gpr[0], state.gpr[2]) = (mask, 0);
            if self.random.below(3) == 0 {
                // Initial states, which some variants leave out.
                state.vec.iter_mut().for_each(VectorRegister::clear_upper);
            }
            self.run(save, state, &mut memory, apart);
            let mut other = self.random_state();
            other.fpu.set_status(0);
            (other.gpr[0], other.gpr[2]) = (7 & self.random.next() | 1, 0);
            self.run(restore, other, &mut memory, apart);
        }
    }
}

/// FOP, FIP, FDP and the tail of FXSAVE's image.
const POINTERS: Range<usize> = 6..24;

/// Reserved halves and pointers of the 28-byte and the 14-byte environment.
const ENVIRONMENT: [Range<usize>; 2] = [10..12, 12..28];
const POINTERS16: Range<usize> = 6..14;
const ENVIRONMENT16: [Range<usize>; 1] = [POINTERS16];

#[test]
fn fxsave_and_fxrstor() {
    let mut pair = Pair::new();
    pair.round_trip(FXSAVE, FXRSTOR, &[POINTERS, 28..32], 7);
    pair.round_trip(FXSAVE64, FXRSTOR64, &[POINTERS, 28..32], 7);
}

#[test]
fn fnsave_and_fnstenv() {
    let mut pair = Pair::new();
    pair.round_trip(FNSTENV, FLDENV, &ENVIRONMENT, 0);
    pair.round_trip(FNSTENV16, FLDENV16, &ENVIRONMENT16, 0);
    pair.round_trip(FNSAVE, FRSTOR, &ENVIRONMENT, 0);
    pair.round_trip(FNSAVE16, FRSTOR16, &ENVIRONMENT16, 0);
    pair.round_trip(STMXCSR, LDMXCSR, &[], 0);
}

#[test]
fn xsave_and_xrstor() {
    if !std::arch::is_x86_feature_detected!("xsavec") {
        return;
    }
    let mut pair = Pair::new();
    for mask in [1, 2, 3, 4, 6, 7] {
        // A CPU may take any component for in use.
        let apart = [POINTERS, 28..32, 512..513];
        for save in [XSAVE, XSAVE64, XSAVEOPT64, XSAVEC64] {
            pair.round_trip(save, XRSTOR64, &apart, mask);
        }
    }
}

#[test]
fn restoring_refuses_reserved_bits() {
    let mut machine = TestMachine::long_mode();
    machine.vcpu.state.gpr[1] = GUEST;
    machine.vcpu.state.gpr[0] = 7;
    let gp = |machine: &mut TestMachine, bytes: &[u8]| {
        let before = machine.vcpu.state.vec;
        let step = run(machine, bytes);
        assert_fault(machine, step, Vector::GeneralProtection);
        assert_eq!(machine.vcpu.state.vec, before);
    };
    machine.put(GUEST, &0x1_0000_u32.to_le_bytes());
    gp(&mut machine, LDMXCSR);
    machine.put(GUEST, &vec![0; SIZE]);
    machine.put(GUEST + 24, &0x1_0000_u32.to_le_bytes());
    gp(&mut machine, FXRSTOR64);
    gp(&mut machine, XRSTOR64);
    machine.put(GUEST + 24, &0x1f80_u32.to_le_bytes());
    run(&mut machine, XRSTOR64).unwrap();
    for (at, value) in [(512, 1_u64 << 9), (520, 7), (528, 1), (520, 1 << 63 | 1 << 9)] {
        machine.put(GUEST + at, &value.to_le_bytes());
        gp(&mut machine, XRSTOR64);
        machine.put(GUEST + at, &0_u64.to_le_bytes());
    }
    machine.vcpu.state.gpr[1] = GUEST + 16;
    gp(&mut machine, XSAVE64);
    gp(&mut machine, XRSTOR64);
    run(&mut machine, FXSAVE64).unwrap();
    machine.vcpu.state.gpr[1] = GUEST + 8;
    gp(&mut machine, FXSAVE64);
}
