//! Returns that no call was noted for, and calls that nobody returns from: as the interpreter
//! has them.

use std::num::NonZeroU32;

use super::DEPTH;
use crate::testing::TestMachine;
use crate::translate::{Config, Invalidate};
use crate::vcpu::Exit;

/// Calls that go deeper than is noted, and one by way of a register, whose return takes an
/// argument along.
const DEEP: &[u8] = &[
    0xb9, 0x28, 0x00, 0x00, 0x00, // mov ecx,0x28
    0xbf, 0x90, 0x01, 0x00, 0x00, // again: mov edi,0x190
    0xe8, 0x11, 0x00, 0x00, 0x00, // call deep
    0x48, 0x8d, 0x1d, 0x18, 0x00, 0x00, 0x00, // lea rbx, [argument]
    0x6a, 0x07, // push 0x7
    0xff, 0xd3, // call rbx
    0x83, 0xe9, 0x01, // sub ecx,0x1
    0x75, 0xe6, // jne again
    0xf4, // hlt
    0x83, 0xef, 0x01, // deep: sub edi,0x1
    0x74, 0x08, // je out
    0xe8, 0xf6, 0xff, 0xff, 0xff, // call deep
    0x48, 0xff, 0xc0, // inc rax
    0xc3, // out: ret
    0x48, 0x03, 0x44, 0x24, 0x08, // argument: add rax,[rsp+0x8]
    0xc2, 0x08, 0x00, // ret 0x8
];

/// A return to where nothing was called, a call that is not returned from, and a return to
/// somewhere else than the call was.
const ASTRAY: &[u8] = &[
    0xb9, 0xc8, 0x00, 0x00, 0x00, // mov ecx,0xc8
    0x48, 0x8d, 0x05, 0x02, 0x00, 0x00, 0x00, // again: lea rax, [target]
    0x50, // push rax
    0xc3, // ret
    0x48, 0xff, 0xc3, // target: inc rbx
    0xe8, 0x00, 0x00, 0x00, 0x00, // call here
    0x5a, // here: pop rdx
    0x48, 0x01, 0xd6, // add rsi,rdx
    0xe8, 0x09, 0x00, 0x00, 0x00, // call elsewhere
    0x49, 0xff, 0xc0, // inc r8
    0x83, 0xe9, 0x01, // back: sub ecx,0x1
    0x75, 0xde, // jne again
    0xf4, // hlt
    0x48, 0x8d, 0x05, 0xf3, 0xff, 0xff, 0xff, // elsewhere: lea rax, [back]
    0x48, 0x89, 0x04, 0x24, // mov [rsp],rax
    0x48, 0xff, 0xc7, // inc rdi
    0xc3, // ret
];

/// Two stacks that take turns, one of which has R12 to begin with.
const TWO_STACKS: &[u8] = &[
    0xb9, 0x64, 0x00, 0x00, 0x00, // mov ecx,0x64
    0x48, 0x8d, 0x05, 0x12, 0x00, 0x00, 0x00, // lea rax, [other]
    0x49, 0x89, 0x04, 0x24, // mov [r12],rax
    0xe8, 0x1c, 0x00, 0x00, 0x00, // again: call switch
    0x48, 0xff, 0xc3, // inc rbx
    0x83, 0xe9, 0x01, // sub ecx,0x1
    0x75, 0xf3, // jne again
    0xf4, // hlt
    0xe8, 0x05, 0x00, 0x00, 0x00, // other: call through
    0x48, 0xff, 0xc6, // inc rsi
    0xeb, 0xf6, // jmp other
    0xe8, 0x04, 0x00, 0x00, 0x00, // through: call switch
    0x48, 0xff, 0xc7, // inc rdi
    0xc3, // ret
    0x4c, 0x87, 0xe4, // switch: xchg rsp,r12
    0xc3, // ret
];

/// Runs `code` and says what is in registers and in memory then.
fn outcome(code: &[u8], translated: Option<Config>) -> ([u64; 16], Vec<u8>) {
    let mut machine = TestMachine::long_mode();
    if let Some(config) = translated {
        machine = machine.translating_as(3, config);
    }
    machine.put(0x1000, code);
    let state = &mut machine.vcpu.state;
    state.gpr.fill(0);
    (state.gpr[4], state.gpr[12], state.rip) = (0x9000, 0x5000, 0x1000);
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    let state = &machine.vcpu.state;
    (std::array::from_fn(|number| state.gpr[number]), machine.get(0x4000, 0x5000))
}

#[test]
fn whatever_is_returned_to_is_where_the_guest_goes_on() {
    const { assert!(DEPTH < 400) };
    let config = Config { verify: true, ..Config::default() };
    for (what, code, counted) in [
        ("deep", DEEP, (0, 40 * 399 + 40 * 7)),
        ("astray", ASTRAY, (3, 200)),
        ("two stacks", TWO_STACKS, (3, 100)),
    ] {
        let interpreted = outcome(code, None);
        assert_eq!(interpreted.0[counted.0], counted.1, "{what}");
        assert!(outcome(code, Some(config)) == interpreted, "{what}");
        let invalidated = Config {
            invalidate: Some(Invalidate { every: NonZeroU32::new(7).unwrap(), seed: 1 }),
            ..config
        };
        assert!(outcome(code, Some(invalidated)) == interpreted, "{what}");
    }
}
