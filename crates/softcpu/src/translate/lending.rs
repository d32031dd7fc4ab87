//! Which registers a trace lends: those kept in memory that it uses much get the places of
//! those that it uses less.
//!
//! A register in memory costs an instruction at each use and, worse, the time a store takes
//! to reach the load behind it, which in a loop adds up along the chain of its values.

use super::block::Block;
use super::copy::Copying;
use super::registers::{GprSet, Home, Homes};
use super::shapes::How;
use super::sharing::Origin;
use super::stack::StackUse;
use super::trace::{Step, Trace};
use crate::decode::op::{Op, OpFlags};

/// What a use in a loop counts.
const IN_LOOP: u32 = 8;
/// How much more the borrower must be used than the lender: what lending and giving back cost.
const WORTH: u32 = 5;

/// General registers that an instruction uses.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    /// Those that it uses, but for what its address is made of.
    any: GprSet,
    /// Those among them that it reads and changes.
    twice: GprSet,
    /// What its address is made of.
    address: GprSet,
}

impl Used {
    /// Those of `step`, whose op is `op`.
    fn of(step: &Step, op: &Op) -> Self {
        let first = step.instruction.op0_register();
        let (any, twice) = match &step.shape.how {
            How::String(string) => {
                let pointers = string.writes();
                (pointers, pointers)
            }
            How::Stack(StackUse::Push | StackUse::Pop, 4..) | How::Lea if first.is_gpr() => {
                (GprSet::of(first.number() as u8), GprSet::NONE)
            }
            How::Copied(Copying { loaded, written, .. }) => {
                (loaded.or(*written), loaded.and(*written))
            }
            _ => Default::default(),
        };
        let addresses = op.flags.contains(OpFlags::MEM);
        let address = if addresses { Origin::of(op).registers() } else { GprSet::NONE };
        Self { any, twice, address }
    }
}

impl Block<'_> {
    /// Where guest registers are best for `trace`.
    pub(super) fn homes_for(&self, trace: &Trace) -> Homes {
        let steps = || trace.steps.iter().zip(&trace.ops).map(|(step, op)| Used::of(step, op));
        let all = steps().fold(GprSet::NONE, |all, used| all.or(used.any).or(used.address));
        if !Homes::BORROWERS.into_iter().any(|user| all.has(user)) {
            return Homes::default();
        }
        let mut uses = [0_u32; 16];
        // Without a place that it jumps to there is none.
        let loops: Vec<_> =
            if self.heads.is_empty() { Vec::new() } else { trace.loops().collect() };
        for (n, Used { any, twice, address }) in steps().enumerate() {
            let looped = loops.iter().any(|steps| steps.contains(&n));
            for number in [any, twice, address].into_iter().flat_map(GprSet::iter) {
                if let Some(uses) = uses.get_mut(usize::from(number)) {
                    *uses = uses.saturating_add(if looped { IN_LOOP } else { 1 });
                }
            }
        }
        let mut homes = Homes::default();
        let uses = |number: u8| uses.get(usize::from(number)).copied().unwrap_or(0);
        for user in Homes::BORROWERS.into_iter().filter(|user| uses(*user) >= WORTH) {
            let lenders =
                Homes::LENDERS.into_iter().filter(|owner| homes.of(*owner) != Home::Memory);
            let Some(owner) = lenders.min_by_key(|owner| uses(*owner)) else { break };
            if uses(user) >= uses(owner).saturating_add(WORTH) {
                homes.lend(owner, user, self.writes(user));
            }
        }
        homes
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::TestMachine;
    use crate::translate::Config;
    use crate::vcpu::Exit;

    /// Calls a function a thousand times that keeps R14, calls itself, and jumps to its own
    /// beginning as well; then `hlt`.
    const RECURSION: &[u8] = &[
        0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
        0xbf, 0x14, 0x00, 0x00, 0x00, // again: mov edi, 20
        0xe8, 0x05, 0x00, 0x00, 0x00, // call function
        0xff, 0xc9, // dec ecx
        0x75, 0xf2, // jnz again
        0xf4, // hlt
        0x41, 0x56, // function: push r14
        0x49, 0x89, 0xfe, // mov r14, rdi
        0x83, 0xef, 0x01, // sub edi, 1
        0x7e, 0x12, // jle out
        0x40, 0xf6, 0xc7, 0x01, // test dil, 1
        0x75, 0x04, // jnz deeper
        0x41, 0x5e, // pop r14
        0xeb, 0xec, // jmp function
        0xe8, 0xe7, 0xff, 0xff, 0xff, // deeper: call function
        0x4c, 0x01, 0xf0, // add rax, r14
        0x41, 0x5e, // out: pop r14
        0xc3, // ret
    ];

    #[test]
    fn what_a_trace_calls_and_jumps_to_finds_registers_where_it_looks_for_them() {
        let config = Config { verify: true, turns: 7, ..Config::default() };
        let ends = [false, true].map(|translated| {
            let mut machine = TestMachine::long_mode();
            if translated {
                // Late enough to know the ways of the whole function.
                machine = machine.translating_as(50, config);
            }
            machine.put(0x1000, RECURSION);
            let state = &mut machine.vcpu.state;
            state.gpr = std::array::from_fn(|number| 0x1111 * number as u64);
            (state.rip, state.gpr[0], state.gpr[4]) = (0x1000, 0, 0x9000);
            assert_eq!(machine.vcpu.run(), Exit::Halt);
            if translated {
                assert_ne!(machine.vcpu.translator_counters().unwrap().hot, 0);
            }
            (machine.vcpu.state.gpr, machine.get(0x8000, 0x1000))
        });
        assert_eq!(ends[0].0, ends[1].0);
        assert_eq!(ends[0].1, ends[1].1);
    }
}
