//! Loading segment registers and asking about descriptors.

use super::*;
use crate::state::segment::Access;

#[test]
fn data_segments_are_checked_for_type_privilege_and_presence() {
    let cases = [
        (sel::DATA, End::Done),
        (sel::READ_ONLY, End::Done),
        (sel::CONFORMING, End::Done),
        (sel::EXECUTE_ONLY, gp(u64::from(sel::EXECUTE_ONLY))),
        (sel::DATA | 3, gp(u64::from(sel::DATA))),
        (sel::ABSENT, np(u64::from(sel::ABSENT))),
        (sel::TASK_GATE, gp(u64::from(sel::TASK_GATE))),
        (0xa0, gp(0xa0)),
        (0xffff, gp(0xfffc)),
        // There is no LDT.
        (0x0c, gp(0x0c)),
        (0, End::Done),
        (3, End::Done),
    ];
    for long in [false, true] {
        for (selector, end) in &cases {
            let mut guest = Guest::new(long);
            assert_eq!(
                guest.run(&load_segment(SegReg::Ds, *selector)),
                *end,
                "{selector:#x} long={long}"
            );
            if *end == End::Done {
                assert_eq!(guest.selector(SegReg::Ds), *selector);
            }
        }
    }
}

#[test]
fn a_failed_load_leaves_the_register_alone() {
    let mut guest = Guest::protected();
    guest.machine.vcpu.state.segment_mut(SegReg::Es).base = 0x1234;
    assert_eq!(guest.run(&load_segment(SegReg::Es, sel::ABSENT)), np(u64::from(sel::ABSENT)));
    assert_eq!(guest.machine.vcpu.state.segment(SegReg::Es).base, 0x1234);
}

#[test]
fn stack_segments_must_be_exactly_at_the_cpl() {
    let cases = [
        (sel::DATA, End::Done),
        (sel::DATA | 3, gp(u64::from(sel::DATA))),
        (sel::USER_DATA, gp(u64::from(sel::USER_DATA & !3))),
        (sel::READ_ONLY, gp(u64::from(sel::READ_ONLY))),
        (sel::ABSENT, ss(u64::from(sel::ABSENT))),
    ];
    for long in [false, true] {
        for (selector, end) in &cases {
            let mut guest = Guest::new(long);
            assert_eq!(
                guest.run(&load_segment(SegReg::Ss, *selector)),
                *end,
                "{selector:#x} long={long}"
            );
        }
    }
    assert_eq!(Guest::protected().run(&load_segment(SegReg::Ss, 0)), gp(0));
    assert_eq!(Guest::long().run(&load_segment(SegReg::Ss, 0)), End::Done);
    assert_eq!(Guest::long().run(&load_segment(SegReg::Ss, 3)), gp(0));
    // mov cs, eax
    assert_eq!(Guest::protected().run(&[0x8e, 0xc8]), UD);
}

#[test]
fn the_accessed_bit_is_set_in_memory() {
    let mut guest = Guest::protected();
    assert_eq!(guest.descriptor_at(sel::FRESH) >> 40 & 1, 0);
    assert_eq!(guest.run(&load_segment(SegReg::Fs, sel::FRESH)), End::Done);
    assert_eq!(guest.descriptor_at(sel::FRESH) >> 40 & 0xff, 0x93);
    assert!(guest.machine.vcpu.state.segment(SegReg::Fs).access.contains(Access::ACCESSED));
}

#[test]
fn limits_and_null_segments_fault_on_use() {
    // mov al, [ds:0x1000] with a byte limit of 0xfff; then a null DS.
    let mut guest = Guest::protected();
    guest.descriptor(sel::FRESH, 0x0040_9300_0000_0fff);
    let load = [0xa0, 0x00, 0x10, 0, 0];
    let code = [load_segment(SegReg::Ds, sel::FRESH), load.to_vec()].concat();
    assert_eq!(guest.run(&code), gp(0));
    let code = [load_segment(SegReg::Ds, 0), load.to_vec()].concat();
    assert_eq!(Guest::protected().run(&code), gp(0));
}

#[test]
fn expand_down_limits_are_floors() {
    let mut guest = Guest::protected();
    // Expand-down, 32-bit, limit 0xfff: offsets from 0x1000 up are inside.
    guest.descriptor(sel::FRESH, 0x0040_9700_0000_0fff);
    let load = |offset: u32| {
        let mut code = load_segment(SegReg::Ds, sel::FRESH);
        code.push(0xa0);
        code.extend(offset.to_le_bytes());
        code
    };
    assert_eq!(guest.run(&load(0x1000)), End::Done);
    assert_eq!(guest.run(&load(0xfff)), gp(0));
}

#[test]
fn real_mode_segments_are_the_selector_times_sixteen() {
    let mut machine = TestMachine::new();
    let vcpu = &mut machine.vcpu;
    vcpu.load_segment(SegReg::Ds, 0x1234).unwrap();
    let ds = *vcpu.state.segment(SegReg::Ds);
    assert_eq!((ds.base, ds.limit, ds.selector), (0x1_2340, 0xffff, 0x1234));
    // A limit that protected mode left behind stays.
    vcpu.state.segment_mut(SegReg::Ds).limit = u32::MAX;
    vcpu.load_segment(SegReg::Ds, 0x10).unwrap();
    assert_eq!(vcpu.state.segment(SegReg::Ds).limit, u32::MAX);
}

#[test]
fn descriptors_can_be_asked_about() {
    // mov eax, selector; verr ax; setz bl; verw ax; setz bh; lar ecx, ax; lsl edx, ax
    let ask = |guest: &mut Guest, selector: u16| {
        let mut code = mov_eax(u32::from(selector));
        code.extend([0x31, 0xdb, 0x31, 0xc9, 0x31, 0xd2]);
        code.extend([0x0f, 0x00, 0xe0, 0x0f, 0x94, 0xc3, 0x0f, 0x00, 0xe8, 0x0f, 0x94, 0xc7]);
        code.extend([0x0f, 0x02, 0xc8, 0x0f, 0x03, 0xd0]);
        assert_eq!(guest.run(&code), End::Done);
        let bx = guest.reg(Gpr::Rbx);
        (bx & 1 != 0, bx >> 8 & 1 != 0, guest.reg(Gpr::Rcx), guest.reg(Gpr::Rdx))
    };
    let mut guest = Guest::protected();
    assert_eq!(ask(&mut guest, sel::DATA), (true, true, 0x00cf_9300, 0xffff_ffff));
    assert_eq!(ask(&mut guest, sel::READ_ONLY), (true, false, 0x00cf_9100, 0xffff_ffff));
    assert_eq!(ask(&mut guest, sel::EXECUTE_ONLY), (false, false, 0x00cf_9900, 0xffff_ffff));
    assert_eq!(ask(&mut guest, sel::DATA | 3), (false, false, 0, 0));
    assert_eq!(ask(&mut guest, 0), (false, false, 0, 0));
    assert_eq!(ask(&mut guest, sel::TSS2), (false, false, 0x8900, 0x67));
    // A task gate has rights but no limit; in long mode it does not exist.
    assert_eq!(ask(&mut guest, sel::TASK_GATE).2, 0x8500);
    assert_eq!(ask(&mut Guest::long(), sel::TASK_GATE).2, 0);
}

#[test]
fn arpl_raises_the_rpl() {
    // mov eax, 0x10; mov ecx, 3; arpl ax, cx; setz bl
    let mut guest = Guest::protected();
    let code = [mov_eax(0x10), vec![0xb9, 3, 0, 0, 0, 0x63, 0xc8, 0x0f, 0x94, 0xc3]].concat();
    assert_eq!(guest.run(&code), End::Done);
    assert_eq!((guest.reg(Gpr::Rax), guest.reg(Gpr::Rbx) & 1), (0x13, 1));
}

#[test]
fn task_register_loads_mark_the_tss_busy() {
    let ltr = |selector| [mov_eax(selector), vec![0x0f, 0x00, 0xd8]].concat();
    let mut guest = Guest::long();
    assert_eq!(guest.run(&ltr(u32::from(sel::TSS2))), End::Done);
    assert_eq!(guest.descriptor_at(sel::TSS2) >> 40 & 0xf, 11);
    assert_eq!(guest.machine.vcpu.state.tr.base, 0x6000);
    assert_eq!(guest.run(&ltr(u32::from(sel::TSS2))), gp(u64::from(sel::TSS2)), "busy");
    assert_eq!(guest.run(&ltr(0)), gp(0));
    assert_eq!(guest.run(&ltr(u32::from(sel::DATA))), gp(u64::from(sel::DATA)));
}

#[test]
fn local_descriptors_come_from_the_ldt() {
    let mut guest = Guest::protected();
    // LDT of one entry at DATA, described at FRESH's place.
    guest.descriptor(sel::FRESH, 0x0000_8200_0000_0007 | DATA << 16);
    guest.machine.put(DATA, &DATA_SEGMENT.to_le_bytes());
    let lldt = [mov_eax(u32::from(sel::FRESH)), vec![0x0f, 0x00, 0xd0]].concat();
    let code = [lldt, load_segment(SegReg::Es, 0x04)].concat();
    assert_eq!(guest.run(&code), End::Done);
    assert_eq!(guest.selector(SegReg::Es), 4);
    assert_eq!(guest.run(&load_segment(SegReg::Es, 0x0c)), gp(0x0c), "beyond the LDT");
}

#[test]
fn table_registers_go_to_ring_0_and_with_umip_stay_there() {
    // sgdt [DATA]
    let store = [0x0f, 0x01, 0x04, 0x25, 0x00, 0xc0, 0, 0];
    let mut guest = Guest::long();
    assert_eq!(guest.run(&store), End::Done);
    assert_eq!(guest.machine.get(DATA, 2), sel::LIMIT.to_le_bytes());
    assert_eq!(guest.word(DATA + 2), GDT);
    // lgdt [DATA]
    let load = [0x0f, 0x01, 0x14, 0x25, 0x00, 0xc0, 0, 0];
    assert_eq!(guest.run(&load), End::Done);
    assert_eq!(Guest::long().run_user(&load), gp(0));
    let mut guest = Guest::long();
    guest.machine.vcpu.state.cr4 |= crate::state::control::Cr4::UMIP;
    assert_eq!(guest.run_user(&store), gp(0));
}
