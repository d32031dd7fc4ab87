//! Crossing privilege levels and back.

use super::*;
use crate::state::rflags::RFlags;

/// `iretq` in 64-bit code, `iret` in 32-bit code.
fn iret(long: bool) -> Vec<u8> {
    if long { vec![0x48, 0xcf] } else { vec![0xcf] }
}

#[test]
fn a_software_interrupt_goes_to_ring_0_and_iret_comes_back() {
    for long in [false, true] {
        let mut guest = Guest::new(long);
        guest.gate(0x80, 3, 0);
        // inc ebx would be a prefix in 64-bit code; use its long form.
        guest.handler(0x80, &[vec![0xff, 0xc3], iret(long)].concat());
        guest.set(Gpr::Rbx, 0);
        // int 0x80; int 0x80; ud2
        assert_eq!(guest.run_user(&[0xcd, 0x80, 0xcd, 0x80, 0x0f, 0x0b]), UD, "long={long}");
        assert_eq!(guest.reg(Gpr::Rbx), 2);
        // The frame of the #UD: RIP, CS, RFLAGS, RSP, SS.
        assert_eq!(guest.stack(0), USER + 4);
        assert_eq!(
            guest.stack(1),
            u64::from(if long { sel::USER_CODE64 } else { sel::USER_CODE32 })
        );
        assert_ne!(guest.stack(2) & RFlags::RF.bits(), 0, "a fault's frame has RF set");
        assert_eq!(guest.stack(3), USER_STACK);
        assert_eq!(guest.stack(4), u64::from(sel::USER_DATA));
        assert_eq!(guest.machine.vcpu.state.cpl(), 0);
        let words = if long { 40 } else { 20 };
        assert_eq!(guest.reg(Gpr::Rsp), RING0_STACK - words);
    }
}

#[test]
fn gates_are_guarded_against_ring_3() {
    for long in [false, true] {
        let mut guest = Guest::new(long);
        assert_eq!(guest.run_user(&[0xcd, 0x21]), gp(0x21 << 3 | 2), "DPL 0");
        let mut guest = Guest::new(long);
        guest.gate_type(0x21, 0x6e);
        assert_eq!(guest.run_user(&[0xcd, 0x21]), np(0x21 << 3 | 2), "not present");
        let mut guest = Guest::new(long);
        guest.gate_type(0x21, 0xe2);
        assert_eq!(guest.run_user(&[0xcd, 0x21]), gp(0x21 << 3 | 2), "an LDT is no gate");
        // Beyond the IDT, and int1, which no DPL guards.
        let mut guest = Guest::new(long);
        guest.machine.vcpu.state.idtr.limit = 0x20f;
        assert_eq!(guest.run_user(&[0xcd, 0x80]), gp(0x80 << 3 | 2));
        assert_eq!(Guest::new(long).run_user(&[0xf1]), End::Vector(1, None));
    }
}

#[test]
fn trap_gates_leave_interrupts_on() {
    for (byte, on) in [(0x8e, false), (0x8f, true)] {
        let mut guest = Guest::long();
        guest.gate_type(0x21, byte);
        let flags = guest.machine.vcpu.state.rflags | RFlags::IF | RFlags::NT;
        guest.machine.vcpu.state.rflags = flags;
        assert_eq!(guest.run(&[0xcd, 0x21]), End::Vector(0x21, None));
        let after = guest.machine.vcpu.state.rflags;
        assert_eq!(after.contains(RFlags::IF), on);
        assert!(!after.contains(RFlags::NT));
    }
}

#[test]
fn syscall_and_sysret() {
    let mut guest = Guest::long();
    let msr = &mut guest.machine.vcpu.state.msr;
    msr.star = u64::from(sel::CODE64) << 32 | 0x20 << 48;
    msr.lstar = CODE;
    msr.fmask = RFlags::IF.bits();
    guest.machine.vcpu.state.rflags |= RFlags::IF | RFlags::CF;
    // Ring 0: mov rdx, r11; sysretq
    guest.machine.put(CODE, &[0x4c, 0x89, 0xda, 0x48, 0x0f, 0x07]);
    // Ring 3: syscall; ud2
    assert_eq!(guest.run_user(&[0x0f, 0x05, 0x0f, 0x0b]), UD);
    assert_eq!(guest.stack(0), USER + 2);
    assert_eq!(guest.stack(1), u64::from(sel::USER_CODE64));
    assert_eq!(guest.stack(4), u64::from(sel::USER_DATA));
    assert_eq!(guest.reg(Gpr::Rcx), USER + 2);
    assert_ne!(guest.reg(Gpr::Rdx) & (RFlags::IF | RFlags::CF).bits(), 0);
    assert_ne!(guest.stack(2) & RFlags::IF.bits(), 0, "sysret restored IF");

    let mut guest = Guest::long();
    guest.machine.vcpu.state.efer -= Efer::SCE;
    assert_eq!(guest.run_user(&[0x0f, 0x05]), UD);
    // sysretq to a non-canonical address faults in ring 0.
    let mut guest = Guest::long();
    guest.set(Gpr::Rcx, 1 << 47);
    assert_eq!(guest.run(&[0x48, 0x0f, 0x07]), gp(0));
    assert_eq!(Guest::long().run_user(&[0x48, 0x0f, 0x07]), gp(0));
}

#[test]
fn sysret_steps_by_the_flags_it_restores() {
    let mut guest = Guest::long();
    guest.machine.vcpu.state.msr.star = 0x20 << 48;
    guest.machine.put(USER, &[0x90, 0x90]);
    guest.set(Gpr::Rcx, USER);
    guest.set(Gpr::R11, (RFlags::TF | RFlags::FIXED).bits());
    assert_eq!(guest.run(&[0x48, 0x0f, 0x07]), End::Vector(1, None));
    assert_eq!(guest.stack(0), USER, "before anything ran in ring 3");
    assert_eq!(guest.machine.vcpu.state.dr6 & 1 << 14, 1 << 14);
}

#[test]
fn segments_lost_on_the_way_out_keep_their_bases() {
    let mut guest = Guest::long();
    let mut gs = Segment::from_descriptor(sel::DATA, DATA_SEGMENT);
    gs.base = DATA;
    *guest.machine.vcpu.state.segment_mut(SegReg::Gs) = gs;
    guest.machine.put(DATA + 8, &0x1234_5678_u64.to_le_bytes());
    let frame = [USER, sel::USER_CODE64.into(), 2, USER_STACK, sel::USER_DATA.into()];
    let bytes: Vec<u8> = frame.iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
    guest.set(Gpr::Rsp, STACK - 0x100);
    guest.machine.put(STACK - 0x100, &bytes);
    // Ring 3: mov rax, gs:[8]; ud2
    let user = [0x65, 0x48, 0x8b, 0x04, 0x25, 8, 0, 0, 0, 0x0f, 0x0b];
    guest.machine.put(USER, &user);
    assert_eq!(guest.run(&[0x48, 0xcf]), UD);
    assert_eq!((guest.selector(SegReg::Gs), guest.reg(Gpr::Rax)), (0, 0x1234_5678));
}

#[test]
fn sysenter_and_sysexit() {
    let mut guest = Guest::protected();
    // The four segments in a row that SYSENTER wants do not exist here, but it reads none.
    let msr = &mut guest.machine.vcpu.state.msr;
    (msr.sysenter_cs, msr.sysenter_esp, msr.sysenter_eip) = (0x08, RING0_STACK, CODE);
    // Ring 0: mov edx, USER+2; mov ecx, USER_STACK; sysexit
    guest.machine.put(CODE, &[0xba, 0x02, 0x18, 0, 0, 0xb9, 0, 0, 3, 0, 0x0f, 0x35]);
    // Ring 3: sysenter; int 0x80
    guest.gate(0x80, 3, 0);
    assert_eq!(guest.run_user(&[0x0f, 0x34, 0xcd, 0x80]), End::Vector(0x80, None));
    assert_eq!((guest.stack(1), guest.stack(4)), (0x1b, 0x23));
    let mut guest = Guest::protected();
    assert_eq!(guest.run_user(&[0x0f, 0x34]), gp(0), "IA32_SYSENTER_CS is null");
}

/// A call gate at `sel::GATE` to `CODE`, for ring 3.
fn call_gate(guest: &mut Guest, parameters: u64) {
    let code = u64::from(if guest.long { sel::CODE64 } else { sel::CODE32 });
    guest.descriptor(sel::GATE, CODE | code << 16 | parameters << 32 | 0xec << 40);
    guest.descriptor(sel::GATE + 8, 0);
}

#[test]
fn call_gates_lead_in_and_far_returns_lead_out() {
    let mut guest = Guest::long();
    call_gate(&mut guest, 0);
    // Ring 0: inc ebx; retfq
    guest.machine.put(CODE, &[0xff, 0xc3, 0x48, 0xcb]);
    // Ring 3: call far [DATA]; ud2. The offset is ignored.
    guest.machine.put(DATA, &[&[0xff; 4], &(sel::GATE | 3).to_le_bytes()[..]].concat());
    guest.set(Gpr::Rbx, 0);
    *guest.machine.vcpu.state.segment_mut(SegReg::Fs) =
        Segment::from_descriptor(sel::DATA, DATA_SEGMENT);
    assert_eq!(guest.run_user(&[0xff, 0x1c, 0x25, 0x00, 0xc0, 0, 0, 0x0f, 0x0b]), UD);
    assert_eq!(guest.reg(Gpr::Rbx), 1);
    assert_eq!(guest.stack(0), USER + 7);
    assert_eq!(guest.stack(3), USER_STACK);
    assert_eq!(guest.selector(SegReg::Fs), 0, "ring 0's data segment is taken away");
}

#[test]
fn call_gates_copy_parameters() {
    let mut guest = Guest::protected();
    call_gate(&mut guest, 2);
    // Ring 0: hlt, to look at the stack.
    guest.machine.put(CODE, &[0xf4]);
    // Ring 3: push 11; push 22; call far GATE:0
    let code = [0x6a, 11, 0x6a, 22, 0x9a, 0, 0, 0, 0, (sel::GATE | 3) as u8, 0];
    assert_eq!(guest.run_user(&code), End::Done);
    let words: Vec<u64> = (0..6).map(|index| guest.stack(index)).collect();
    let expected =
        [USER + 11, u64::from(sel::USER_CODE32), 22, 11, USER_STACK - 8, u64::from(sel::USER_DATA)];
    assert_eq!(words, expected);
    // retf 8 drops them from both stacks.
    guest.machine.put(CODE, &[0xca, 8, 0]);
    guest.machine.put(USER + 11, &[0x0f, 0x0b]);
    assert_eq!(guest.run_user(&code), UD);
    assert_eq!(guest.stack(3), USER_STACK);
}

#[test]
fn what_is_wrong_with_the_inner_stack_is_an_invalid_tss() {
    let run = |tss: &dyn Fn(&mut Guest)| {
        let mut guest = Guest::protected();
        guest.gate(0x80, 3, 0);
        // #TS itself needs a stack: a conforming handler runs on ring 3's.
        tss(&mut guest);
        guest.run_user(&[0xcd, 0x80])
    };
    // A broken ring-0 stack breaks every handler: double fault, then shutdown.
    assert_eq!(run(&|guest| guest.machine.put(TSS + 8, &[0, 0])), End::Shutdown);
    // Through a call gate to ring 1 the rest of the machine stays usable.
    let far_call = |selector: u16, limit: u32| {
        let mut guest = Guest::protected();
        guest.descriptor(sel::FRESH, 0x00cf_bb00_0000_ffff);
        guest.descriptor(sel::GATE, CODE | u64::from(sel::FRESH) << 16 | 0xec << 40);
        guest.machine.put(TSS + 12, &0x2_6000_u32.to_le_bytes());
        guest.machine.put(TSS + 16, &selector.to_le_bytes());
        guest.machine.vcpu.state.tr.limit = limit;
        guest.run_user(&[0x9a, 0, 0, 0, 0, (sel::GATE | 3) as u8, 0])
    };
    assert_eq!(far_call(sel::DATA | 1, 0x67), ts(u64::from(sel::DATA)), "DPL 0 stack for ring 1");
    assert_eq!(far_call(0, 0x67), ts(0));
    assert_eq!(far_call(0xa1, 0x67), ts(0xa0));
    assert_eq!(far_call(sel::DATA, 0x0f), ts(u64::from(sel::TSS)), "the TSS is too short");
}

#[test]
fn call_gate_privilege_is_checked() {
    let far_call = |gate: &dyn Fn(&mut Guest)| {
        let mut guest = Guest::protected();
        call_gate(&mut guest, 0);
        gate(&mut guest);
        guest.run_user(&[0x9a, 0, 0, 0, 0, (sel::GATE | 3) as u8, 0])
    };
    let gate = u64::from(sel::GATE);
    let raw = CODE | u64::from(sel::CODE32) << 16;
    assert_eq!(far_call(&|guest| guest.descriptor(sel::GATE, raw | 0x8c << 40)), gp(gate), "DPL 0");
    assert_eq!(
        far_call(&|guest| guest.descriptor(sel::GATE, raw | 0x6c << 40)),
        np(gate),
        "not present"
    );
    let data = CODE | u64::from(sel::DATA) << 16 | 0xec << 40;
    assert_eq!(far_call(&|guest| guest.descriptor(sel::GATE, data)), gp(u64::from(sel::DATA)));
    assert_eq!(
        far_call(&|guest| guest.descriptor(sel::GATE, CODE | 0xec << 40)),
        gp(0),
        "null target"
    );
}

#[test]
fn direct_far_jumps_keep_the_privilege() {
    let jump = |selector: u16| [&[0xea, 0x00, 0x18, 0, 0][..], &selector.to_le_bytes()].concat();
    let mut guest = Guest::protected();
    guest.machine.put(USER, &[0xf4]);
    assert_eq!(guest.run(&jump(sel::CODE32)), End::Done);
    assert_eq!(guest.run(&jump(sel::CONFORMING)), End::Done);
    assert_eq!(guest.selector(SegReg::Cs), sel::CONFORMING);
    assert_eq!(guest.run(&jump(sel::USER_CODE32)), gp(0x20));
    assert_eq!(guest.run(&jump(sel::DATA)), gp(u64::from(sel::DATA)));
    assert_eq!(guest.run(&jump(0)), gp(0));
    // From ring 3 a conforming segment is entered without becoming ring 0.
    let mut guest = Guest::protected();
    let mut code = [&[0xea, 0x07, 0x18, 0, 0][..], &sel::CONFORMING.to_le_bytes()].concat();
    code.extend([0x0f, 0x0b]);
    assert_eq!(guest.run_user(&code), UD);
    assert_eq!(guest.stack(1), u64::from(sel::CONFORMING | 3));
    assert_eq!(guest.run_user(&jump(sel::CODE32)), gp(u64::from(sel::CODE32)));
}

#[test]
fn task_switches_are_refused_and_counted() {
    for target in [sel::TASK_GATE, sel::TSS2] {
        let mut guest = Guest::protected();
        let code = [&[0x9a, 0, 0, 0, 0][..], &target.to_le_bytes()].concat();
        assert_eq!(guest.run(&code), gp(u64::from(target)));
        assert_eq!(guest.machine.vcpu.refused().task_switches, 1);
    }
    let mut guest = Guest::protected();
    guest.gate_type(0x21, 0x85);
    assert_eq!(guest.run(&[0xcd, 0x21]), gp(0x21 << 3 | 2));
    assert_eq!(guest.machine.vcpu.refused().task_switches, 1);
    // Nested-task returns as well.
    let mut guest = Guest::protected();
    guest.machine.vcpu.state.rflags |= RFlags::NT;
    assert_eq!(guest.run(&[0xcf]), gp(0));
}

#[test]
fn iret_checks_what_it_returns_to() {
    // Pushes SS, RSP, RFLAGS, CS, RIP and returns.
    let back = |cs: u16, ss: u16, rip: u64| {
        let mut guest = Guest::long();
        let frame = [rip, u64::from(cs), 2, USER_STACK, u64::from(ss)];
        let bytes: Vec<u8> = frame.iter().flat_map(|word| word.to_le_bytes()).collect();
        guest.machine.put(STACK, &bytes);
        guest.machine.put(USER, &[0x0f, 0x0b]);
        guest.run(&[0x48, 0xcf])
    };
    assert_eq!(back(sel::USER_CODE64, sel::USER_DATA, USER), UD);
    assert_eq!(back(sel::USER_CODE32, sel::USER_DATA, USER), UD, "compatibility mode");
    assert_eq!(back(sel::CODE64, 0, USER), UD, "ring 0 needs no stack segment");
    assert_eq!(back(sel::USER_CODE64, 0, USER), gp(0), "ring 3 does");
    assert_eq!(back(sel::USER_CODE64, sel::DATA, USER), gp(u64::from(sel::DATA)));
    assert_eq!(back(sel::CODE64 | 3, sel::USER_DATA, USER), gp(u64::from(sel::CODE64)));
    assert_eq!(back(sel::DATA, sel::DATA, USER), gp(u64::from(sel::DATA)));
    assert_eq!(back(sel::USER_CODE64, sel::USER_DATA, 1 << 50), gp(0));
    assert_eq!(back(0, sel::DATA, USER), gp(0));
}

#[test]
fn flags_change_only_as_far_as_privilege_allows() {
    // push value; popf; pushf; pop rax; then ud2 to get out of ring 3.
    let set = |value: u32, user: bool, iopl: u64| {
        let mut guest = Guest::long();
        guest.machine.vcpu.state.rflags |= RFlags::from_bits_retain(iopl << 12);
        let mut code = vec![0x68];
        code.extend(value.to_le_bytes());
        code.extend([0x9d, 0x9c, 0x58, 0x0f, 0x0b]);
        assert_eq!(if user { guest.run_user(&code) } else { guest.run(&code) }, UD);
        guest.reg(Gpr::Rax)
    };
    let wish = (RFlags::IF | RFlags::IOPL | RFlags::CF | RFlags::ID).bits() as u32;
    assert_eq!(set(wish, false, 0), u64::from(wish) | 2);
    assert_eq!(set(wish, true, 0), (RFlags::CF | RFlags::ID).bits() | 2);
    assert_eq!(
        set(wish, true, 3),
        (RFlags::CF | RFlags::ID | RFlags::IF | RFlags::IOPL).bits() | 2
    );
    // VM, VIF and reserved bits never.
    assert_eq!(set(0x001a_8028 | 2, false, 0), 2);
    // cli and sti are for those whom IOPL allows.
    assert_eq!(Guest::long().run_user(&[0xfa]), gp(0));
    assert_eq!(Guest::long().run_user(&[0xfb]), gp(0));
    assert_eq!(Guest::long().run_user(&[0xf4]), gp(0));
}

#[test]
fn swapgs_and_the_base_instructions() {
    let mut guest = Guest::long();
    guest.machine.vcpu.state.msr.kernel_gs_base = 0x1234_5678;
    assert_eq!(guest.run(&[0x0f, 0x01, 0xf8]), End::Done);
    assert_eq!(guest.machine.vcpu.state.segment(SegReg::Gs).base, 0x1234_5678);
    assert_eq!(Guest::long().run_user(&[0x0f, 0x01, 0xf8]), gp(0));
    // rdgsbase rax without and with CR4.FSGSBASE; wrfsbase of a non-canonical address.
    let rdgsbase = [0xf3, 0x48, 0x0f, 0xae, 0xc8];
    assert_eq!(guest.run(&rdgsbase), UD);
    let mut guest = Guest::long();
    guest.machine.vcpu.state.cr4 |= crate::state::control::Cr4::FSGSBASE;
    guest.machine.vcpu.state.segment_mut(SegReg::Gs).base = 77;
    assert_eq!(guest.run(&rdgsbase), End::Done);
    assert_eq!(guest.reg(Gpr::Rax), 77);
    guest.set(Gpr::Rax, 1 << 63);
    assert_eq!(guest.run(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), gp(0));
}
