//! Flags that the manuals leave undefined (after multiplications and shifts, for instance):
//! leader and follower may have them differently, each what its host instruction left.
//!
//! Known is which flags an instruction writes, reads and leaves undefined, so the follower
//! carries along which are undefined now. They do not count as a difference, until an
//! instruction reads one: from then on what differs may come of that.

use iced_x86::{Code, Instruction, RflagsBits};

use crate::decode::op::{Op, OpFlags};
use crate::state::rflags::RFlags;

/// What is undefined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Undefined {
    /// iced-x86's [`RflagsBits`].
    bits: u32,
    /// An undefined flag has been read.
    read: bool,
    /// They did differ somewhere.
    differed: bool,
}

/// How iced-x86 and the architecture call the status flags.
const NAMES: [(u32, RFlags); 6] = [
    (RflagsBits::OF, RFlags::OF),
    (RflagsBits::SF, RFlags::SF),
    (RflagsBits::ZF, RFlags::ZF),
    (RflagsBits::AF, RFlags::AF),
    (RflagsBits::CF, RFlags::CF),
    (RflagsBits::PF, RFlags::PF),
];

/// Whether `code` puts all flags where the guest can see them, without iced-x86 saying so.
fn keeps_flags(code: Code) -> bool {
    use Code::{Int_imm8, Int1, Int3, Into, Syscall};
    matches!(code, Int1 | Int3 | Int_imm8 | Into | Syscall)
}

impl Undefined {
    /// `op` has been run.
    pub(super) fn run(&mut self, op: &Op) {
        let Ok(code) = Code::try_from(usize::from(op.code)) else { return };
        if op.len == 0 {
            return;
        }
        let mut instruction = Instruction::new();
        instruction.set_code(code);
        // A count of one is the most defined there is.
        instruction.set_immediate8(if op.imm & 0x3f == 1 { 1 } else { 2 });
        let reads = if keeps_flags(code) { u32::MAX } else { instruction.rflags_read() };
        self.read |= reads & self.bits != 0;
        // Shifts by nothing and repetitions of nothing leave all flags as they are.
        let repeats = op.flags.intersects(OpFlags::REP | OpFlags::REPNE);
        let may_do_nothing = repeats || instruction.rflags_undefined() != 0;
        if !may_do_nothing {
            self.bits &= !instruction.rflags_modified();
        }
        self.bits |= instruction.rflags_undefined();
    }

    /// The flags.
    pub(super) fn flags(self) -> RFlags {
        let undefined = NAMES.iter().filter(|(bit, _)| self.bits & bit != 0);
        undefined.fold(RFlags::empty(), |all, (_, flag)| all | *flag)
    }

    /// They differ here.
    pub(super) fn note_difference(&mut self) {
        self.differed = true;
    }

    /// Whether they differed anywhere.
    pub(super) fn differed(self) -> bool {
        self.differed
    }

    /// Whether anything may come of them by now.
    pub(super) fn was_read(self) -> bool {
        self.read
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestMachine;

    /// What is undefined behind `code`.
    fn behind(code: &[u8]) -> Undefined {
        let mut machine = TestMachine::long_mode();
        machine.put(0x1000, code);
        let mut undefined = Undefined::default();
        machine.vcpu.with_blocks(|vcpu, blocks| {
            let (_, ops) = vcpu.find_block(blocks).unwrap();
            ops.iter().for_each(|op| undefined.run(op));
        });
        undefined
    }

    #[test]
    fn undefined_flags_last_until_they_are_written() {
        let multiply = [0x0f, 0xaf, 0xc1];
        let all_but = RFlags::SF | RFlags::ZF | RFlags::AF | RFlags::PF;
        assert_eq!(behind(&[&multiply[..], &[0xf4]].concat()).flags(), all_but);
        // add eax, ecx
        let written = behind(&[&multiply[..], &[0x01, 0xc8, 0xf4]].concat());
        assert_eq!((written.flags(), written.was_read()), (RFlags::empty(), false));
        // shl eax, 1; shl eax, 5; shl eax, cl
        assert_eq!(behind(&[0xd1, 0xe0, 0xf4]).flags(), RFlags::AF);
        assert_eq!(behind(&[0xc1, 0xe0, 5, 0xf4]).flags(), RFlags::AF | RFlags::OF);
        let by_cl = behind(&[&multiply[..], &[0xd3, 0xe0, 0xf4]].concat());
        assert_eq!(by_cl.flags(), all_but | RFlags::OF, "the count may be zero");
    }

    #[test]
    fn reading_one_is_noticed() {
        // setz al; setc al; pushfq; int 80h; syscall
        for (code, read) in [
            (&[0x0f, 0x94, 0xc0][..], true),
            (&[0x0f, 0x92, 0xc0], false),
            (&[0x9c], true),
            (&[0xcd, 0x80], true),
            (&[0x0f, 0x05], true),
        ] {
            let undefined = behind(&[&[0x0f, 0xaf, 0xc1], code, &[0xf4]].concat());
            assert_eq!(undefined.was_read(), read, "{code:x?}");
        }
    }
}
