//! Classic BPF as the kernel runs it on a system call: enough of it for what `seccompiler`
//! makes (Documentation/networking/filter.rst), so that tests can ask without making calls.

use seccompiler::{BpfProgram, SeccompAction};

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
pub(super) const X86_64: u32 = 0xc000_003e;

/// One word of `struct seccomp_data` (linux/seccomp.h).
fn word(offset: u32, number: u32, architecture: u32, arguments: [u64; 6]) -> u32 {
    match offset {
        0 => number,
        4 => architecture,
        16..64 => {
            let argument = arguments[(offset as usize - 16) / 8];
            if offset.is_multiple_of(8) { argument as u32 } else { (argument >> 32) as u32 }
        }
        _ => panic!("nothing looks at byte {offset}"),
    }
}

/// What `program` has the kernel do with a call.
pub(super) fn verdict(
    program: &BpfProgram,
    number: u32,
    architecture: u32,
    arguments: [u64; 6],
) -> u32 {
    let (mut at, mut a) = (0, 0);
    loop {
        let step = &program[at];
        at += 1;
        let jump = |taken: bool| usize::from(if taken { step.jt } else { step.jf });
        match step.code {
            0x20 => a = word(step.k, number, architecture, arguments), // ld [k]
            0x54 => a &= step.k,                                       // and k
            0x05 => at += step.k as usize,                             // ja k
            0x15 => at += jump(a == step.k),                           // jeq
            0x25 => at += jump(a > step.k),                            // jgt
            0x35 => at += jump(a >= step.k),                           // jge
            0x06 => return step.k,                                     // ret k
            code => panic!("instruction {code:#x}"),
        }
    }
}

/// Whether a call of ours passes.
pub(super) fn passes(program: &BpfProgram, number: u32, arguments: [u64; 6]) -> bool {
    verdict(program, number, X86_64, arguments) == u32::from(SeccompAction::Allow)
}
