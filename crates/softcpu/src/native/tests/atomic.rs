//! Locked instructions of two vCPUs on the same memory, and what hostile bytes do.

use iced_x86::{Decoder, DecoderOptions};

use super::{Random, generate, lower, op, run};
use crate::testing::{RAM, TestMachine};

/// lock xadd [rcx], rax
const XADD: &[u8] = &[0xf0, 0x48, 0x0f, 0xc1, 0x01];

fn count_together(addr: u64, prepare: impl Fn(&TestMachine) + Sync) {
    const EACH: u64 = 20_000;
    let mut machines = {
        let first = TestMachine::long_mode();
        let second = first.sibling();
        [first, second]
    };
    machines[0].put(addr, &0_u64.to_le_bytes());
    std::thread::scope(|scope| {
        for machine in &mut machines {
            let prepare = &prepare;
            scope.spawn(move || {
                for i in 0..EACH {
                    if i % 64 == 0 {
                        prepare(machine);
                    }
                    machine.vcpu.state.gpr[0] = 1;
                    machine.vcpu.state.gpr[1] = addr;
                    run(machine, XADD).unwrap();
                }
            });
        }
    });
    assert_eq!(machines[0].get(addr, 8), (2 * EACH).to_le_bytes());
}

#[test]
fn locked_instructions_are_atomic_in_place() {
    count_together(0x8000, |_| ());
}

#[test]
fn locked_instructions_are_atomic_across_pages() {
    count_together(0x8ffc, |_| ());
}

#[test]
fn locked_instructions_are_atomic_on_pages_with_code() {
    count_together(0x8000, |machine| {
        let (_, frame) = machine.memory.page(crate::GuestPhysAddr(0x8000)).unwrap();
        machine.memory.code().decode(&machine.vcpu.observer, frame, 0x100..0x110, || ());
    });
}

#[test]
fn no_bytes_make_the_host_fault() {
    let mut random = Random(0x0bad_5eed_0bad_5eed);
    let mut machine = TestMachine::long_mode();
    let mut ran = 0;
    for round in 0..200_000 {
        let mut bytes = [0; 15];
        bytes.iter_mut().for_each(|byte| *byte = random.next() as u8);
        // Most of the opcode space is refused: look where the stubs are.
        match random.below(6) {
            0 => bytes[0] = 0xd8 | bytes[0] & 7,
            1 => (bytes[0], bytes[1]) = (random.pick(&[0x66, 0xf2, 0xf3, 0xf0, 0x48]), 0x0f),
            2 => bytes[0] = 0xc5,
            3 => (bytes[0], bytes[1]) = (0xc4, bytes[1] & 0xe0 | (1 + bytes[1] % 3)),
            4 => bytes[0] = 0x0f,
            _ => {}
        }
        let bitness = [16, 32, 64][round % 3];
        let instruction = Decoder::with_ip(bitness, &bytes, 0x1000, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            continue;
        }
        let Ok(lowered) = lower(&mut machine, &instruction, &bytes[..instruction.len()]) else {
            continue;
        };
        let (pristine, unmasked) = (machine.vcpu.state.clone(), random.below(2) == 0);
        generate::state(&mut machine.vcpu.state, unmasked, &mut random);
        let mut op = op(&instruction, &lowered);
        // Anywhere: RAM, its end, devices, not canonical.
        let place =
            random.pick(&[0x8000, 0x8ff9, RAM - 4, RAM + 0x40, 0x8000_0000_0000, u64::MAX - 3]);
        op.disp = place.wrapping_sub(machine.vcpu.state.gpr_slot(op.base));
        op.index = crate::state::GPR_ZERO;
        let _ = (op.run)(&mut machine.vcpu, &op);
        // The page tables are at the end of RAM: put back what may have been stored over.
        machine.vcpu.state = pristine;
        ran += 1;
    }
    assert!(ran > 10_000, "only {ran} of them were run");
}
