use super::super::access::{Access, Place};
use super::super::assembler::{Assembler, Condition, NotCopied};
use super::super::sharing::{Group, Origin};
use super::super::thunks;
use super::*;
use crate::decode::op::{Op, OpFlags};
use crate::mmu::mirror::SPAN_SHIFT;
use crate::state::GPR_ZERO;
use crate::translate::context::X87;

const BASE: u64 = 0x10_0000;

/// An operand at `[rbx + 8]`.
fn operand() -> Op {
    Op { disp: 8, base: 3, len: 4, size: 8, ..Op::idle(0) }
}

/// What the verifier says of code that `write` makes, ended by a way out.
pub(super) fn judged(write: impl FnOnce(&mut Assembler)) -> Result<(), Violation> {
    let (code, thunks) = thunks::make(BASE).unwrap();
    let base = BASE + code.len() as u64;
    let mut code = Assembler::new(base);
    write(&mut code);
    code.jump_to(thunks.leave_at);
    verify(&code.finish().unwrap().0, base, &thunks, &[])
}

/// A check of `access` to `operand`, and what `then` makes where it has held.
fn behind_a_check(
    operand: &Op,
    access: Access,
    then: impl FnOnce(&mut Assembler, Place) -> Result<(), NotCopied>,
) -> Result<(), Violation> {
    let (_, thunks) = thunks::make(BASE).unwrap();
    judged(|code| {
        let slow = code.label();
        let place = code.check(operand, access, slow).unwrap();
        then(code, place).unwrap();
        code.bind(slow);
        code.jump_to(thunks.leave_at);
    })
}

pub(super) fn load(code: &mut Assembler, place: Place) -> Result<(), NotCopied> {
    code.load_at(VALUE, place)
}

pub(super) fn store(code: &mut Assembler, place: Place) -> Result<(), NotCopied> {
    code.store_at(place, VALUE)
}

/// `[rbx + 8]`, `[rbx + rcx + 8]`, two fixed addresses, and `[ebx + ecx + 8]` in a segment that
/// is flat and in one that is not, and the same with addresses of 16 bits.
fn operands() -> [Op; 8] {
    let fixed = |disp| Op { base: GPR_ZERO, disp, ..operand() };
    let narrow = narrow();
    let small = Op { addr_mask: 0xffff, ..narrow };
    [
        operand(),
        Op { index: 1, ..operand() },
        fixed(0xffff_ffff_8123_4568),
        fixed(0x7fff_0123_4568),
        narrow,
        Op { seg: 3, ..narrow },
        small,
        Op { seg: 3, ..small },
    ]
}

/// `[ebx + ecx + 8]` in 32-bit code.
fn narrow() -> Op {
    Op { index: 1, addr_mask: 0xffff_ffff, flags: OpFlags::LEGACY, ..operand() }
}

/// A check of the words from RBX on to 32 bytes further, and what `then` makes behind it.
fn behind_a_shared_check(
    stores: bool,
    then: impl FnOnce(&mut Assembler) -> Result<(), NotCopied>,
) -> Result<(), Violation> {
    let group = Group::of(Origin::register(3), 3, 0, 31, stores);
    let (_, thunks) = thunks::make(BASE).unwrap();
    judged(|code| {
        let slow = code.label();
        code.check_group(&group, slow).unwrap();
        then(code).unwrap();
        code.bind(slow);
        code.jump_to(thunks.leave_at);
    })
}

#[test]
fn what_was_checked_together_is_allowed_until_the_way_is_another() {
    let later = |code: &mut Assembler| {
        // mov rbx, rax: where RBX points to now does not matter.
        code.bytes(&[0x48, 0x89, 0xc3]);
        code.load(ADDRESS, fields::shared(3));
    };
    for at in [0, 24] {
        behind_a_shared_check(false, |code| load(code, Place::at(at))).unwrap();
        behind_a_shared_check(true, |code| {
            later(code);
            store(code, Place::at(at))
        })
        .unwrap();
    }
    for at in [-1, 25, 32] {
        behind_a_shared_check(false, |code| load(code, Place::at(at))).unwrap_err();
    }
    behind_a_shared_check(false, |code| store(code, Place::at(0))).unwrap_err();
    // Another register's was never checked.
    behind_a_shared_check(false, |code| {
        code.load(ADDRESS, fields::shared(5));
        load(code, Place::at(0))
    })
    .unwrap_err();
    // Come to from where nothing was checked: before, or after.
    judged(|code| {
        let [slow, joined] = [code.label(), code.label()];
        code.jump_if(Condition::EQUAL, joined);
        code.check_group(&Group::of(Origin::register(3), 3, 0, 31, false), slow).unwrap();
        code.bind(joined);
        code.load(ADDRESS, fields::shared(3));
        load(code, Place::at(0)).unwrap();
        code.bind(slow);
    })
    .unwrap_err();
    let (_, thunks) = thunks::make(BASE).unwrap();
    judged(|code| {
        let [slow, joined, other] = [code.label(), code.label(), code.label()];
        code.jump_if(Condition::EQUAL, other);
        code.check_group(&Group::of(Origin::register(3), 3, 0, 31, false), slow).unwrap();
        code.bind(joined);
        code.load(ADDRESS, fields::shared(3));
        load(code, Place::at(0)).unwrap();
        code.jump_to(thunks.leave_at);
        code.bind(other);
        code.jump(joined);
        code.bind(slow);
    })
    .unwrap_err();
    // Nothing else is kept there.
    behind_a_shared_check(false, |code| {
        code.store(fields::shared(3), R::RBX);
        Ok(())
    })
    .unwrap_err();
}

/// A stream of the word at RBX: emptied if so, filled by `fill` and used by `then`.
fn with_a_stream(
    stream: u8,
    emptied: bool,
    fill: impl FnOnce(&mut Assembler),
    then: impl FnOnce(&mut Assembler) -> Result<(), NotCopied>,
) -> Result<(), Violation> {
    let (_, thunks) = thunks::make(BASE).unwrap();
    judged(|code| {
        if emptied {
            limit(code, stream, 0);
        }
        let [again, away] = [code.label(), code.label()];
        code.bind(again);
        code.copy(VALUE, R::RBX);
        code.subtract(VALUE, fields::stream_page(stream));
        code.compare(VALUE, fields::stream_limit(stream));
        code.jump_if(Condition::BELOW.negated(), away);
        code.load(ADDRESS, fields::stream_host(stream));
        then(code).unwrap();
        code.jump_to(thunks.leave_at);
        code.bind(away);
        fill(code);
        code.jump(again);
    })
}

fn limit(code: &mut Assembler, stream: u8, limit: u32) {
    code.bytes(&[0x65, 0x48, 0xc7, 0x04, 0x25]);
    code.bytes(&fields::stream_limit(stream).0.to_le_bytes());
    code.bytes(&limit.to_le_bytes());
}

/// Fills it as it ought to be, but for what is said.
fn fill(code: &mut Assembler, stream: u8, stores: bool, page_of: R, farthest: u32) {
    let (_, thunks) = thunks::make(BASE).unwrap();
    let [slow, found] = [code.label(), code.label()];
    code.find_group(&Group::of(Origin::register(3), 0, 0, 7, stores), slow).unwrap();
    code.copy(VALUE, page_of);
    code.bytes(&[0x48, 0x25, 0x00, 0xf0, 0xff, 0xff]);
    code.store(fields::stream_page(stream), VALUE);
    code.lea(ADDRESS, ADDRESS, VALUE, 1, 0).unwrap();
    code.store(fields::stream_host(stream), ADDRESS);
    limit(code, stream, farthest);
    code.jump(found);
    code.bind(slow);
    code.jump_to(thunks.leave_at);
    code.bind(found);
}

#[test]
fn a_stream_is_used_for_no_more_than_it_was_filled_for() {
    const LOADS: u8 = 0;
    const STORES: u8 = 15;
    let rightly = |stream| move |code: &mut Assembler| fill(code, stream, true, R::RBX, 4089);
    let at = |displacement| Place::from(VALUE, 1, displacement);
    with_a_stream(LOADS, true, rightly(LOADS), |code| load(code, at(0))).unwrap();
    // By a pointer, which is not for what lies before.
    let by_a_pointer = |displacement| {
        move |code: &mut Assembler| {
            code.lea(ADDRESS, ADDRESS, VALUE, 1, -8)?;
            load(code, Place::at(displacement))
        }
    };
    with_a_stream(LOADS, true, rightly(LOADS), by_a_pointer(8)).unwrap();
    with_a_stream(LOADS, true, rightly(LOADS), by_a_pointer(7)).unwrap_err();
    with_a_stream(STORES, true, rightly(STORES), |code| store(code, at(0))).unwrap();
    // Stores where loads were looked up, bytes that were not, and what nobody has emptied.
    with_a_stream(LOADS, true, rightly(LOADS), |code| store(code, at(0))).unwrap_err();
    with_a_stream(LOADS, true, rightly(LOADS), |code| load(code, at(1))).unwrap_err();
    with_a_stream(LOADS, true, rightly(LOADS), |code| load(code, at(-1))).unwrap_err();
    with_a_stream(LOADS, true, rightly(LOADS), |code| load(code, Place::at(0))).unwrap_err();
    with_a_stream(LOADS, true, rightly(LOADS), |code| {
        code.copy(VALUE, R::RBX);
        load(code, at(0))
    })
    .unwrap_err();
    with_a_stream(LOADS, false, rightly(LOADS), |code| load(code, at(0))).unwrap_err();
    // Filled from a check of loads, with another page, too far, and in part.
    let wrongly: [fn(&mut Assembler); 4] = [
        |code| fill(code, STORES, false, R::RBX, 4089),
        |code| fill(code, STORES, true, R::RCX, 4089),
        |code| fill(code, STORES, true, R::RBX, 4090),
        |code| code.store(fields::stream_host(STORES), R::RBX),
    ];
    for fill in wrongly {
        with_a_stream(STORES, true, fill, |code| load(code, at(0))).unwrap_err();
    }
    let in_part = |code: &mut Assembler| {
        let slow = code.label();
        code.find_group(&Group::of(Origin::register(3), 0, 0, 7, false), slow).unwrap();
        code.copy(VALUE, R::RBX);
        code.bytes(&[0x48, 0x25, 0x00, 0xf0, 0xff, 0xff]);
        code.store(fields::stream_page(LOADS), VALUE);
        code.bind(slow);
    };
    with_a_stream(LOADS, true, in_part, |code| load(code, at(0))).unwrap_err();
    // Nobody fills it at all.
    with_a_stream(LOADS, true, |_| {}, |code| load(code, at(0))).unwrap_err();
}

#[test]
fn what_a_check_allows_is_allowed() {
    for operand in operands() {
        behind_a_check(&operand, Access::load(8), load).unwrap();
        behind_a_check(&operand, Access::store(8), store).unwrap();
        behind_a_check(&operand, Access::store(8), load).unwrap();
    }
}

#[test]
fn what_it_does_not_is_found() {
    let byte = Access::load(1);
    for operand in operands() {
        let refused = behind_a_check(&operand, Access::load(8), store);
        assert!(refused.is_err(), "a store after a load's");
        let moved = behind_a_check(&operand, Access::load(8), |code, place| {
            // inc r13
            code.bytes(&[0x49, 0xff, 0xc5]);
            load(code, place)
        });
        assert!(moved.is_err(), "after the address has changed");
    }
    for operand in &operands()[..2] {
        assert!(behind_a_check(operand, byte, load).is_err(), "more than was checked");
        let beside = behind_a_check(operand, Access::load(8), |code, place| {
            let mut load =
                Instruction::with2(iced_x86::Code::Mov_r64_rm64, VALUE, place.operand()).unwrap();
            load.set_memory_displacement64(load.memory_displacement64() + 8);
            load.set_memory_displ_size(1);
            code.emit(&load)
        });
        assert!(beside.is_err(), "beside it");
    }
    let page = Op { disp: 0x4ff8, base: GPR_ZERO, ..operand() };
    let beside = behind_a_check(&page, Access::load(8), |code, place| {
        let mut load =
            Instruction::with2(iced_x86::Code::Mov_r64_rm64, VALUE, place.operand()).unwrap();
        load.set_memory_displacement64(0x4ff9);
        code.emit(&load)
    });
    assert!(beside.is_err(), "into the next page");
    let unchecked = judged(|code| code.bytes(&[0x49, 0x8b, 0x45, 0x00]));
    assert!(unchecked.is_err(), "no check at all");
    // Jumped to from where nothing was checked.
    let into = judged(|code| {
        let (middle, slow) = (code.label(), code.label());
        code.jump(middle);
        let place = code.check(&operand(), Access::load(8), slow).unwrap();
        code.bind(middle);
        load(code, place).unwrap();
        code.bind(slow);
    });
    assert!(into.is_err());
}

#[test]
fn a_check_of_another_address_is_none() {
    let changed = behind_a_check(&operand(), Access::load(8), |code, place| {
        // inc rbx
        code.bytes(&[0x48, 0xff, 0xc3]);
        load(code, place)
    });
    assert!(changed.is_err());
    let with_index = Op { index: 1, ..operand() };
    let changed = behind_a_check(&with_index, Access::load(8), |code, place| {
        // The last two instructions of a check once more, after rbx has changed.
        code.bytes(&[0x48, 0xff, 0xc3]);
        code.linear(ADDRESS, &with_index, 0)?;
        code.bytes(&[0x4c, 0x03, 0x68, 8]);
        load(code, place)
    });
    assert!(changed.is_err());
    let other_table = behind_a_check(&with_index, Access::load(8), |code, place| {
        // add r13, [rax + the addend for stores]
        code.linear(ADDRESS, &with_index, 0)?;
        code.bytes(&[0x4c, 0x03, 0xa8]);
        code.bytes(&(TLB_STORES + TLB_ADDEND).to_le_bytes());
        load(code, place)
    });
    assert!(other_table.is_err());
}

#[test]
fn an_address_that_wraps_is_not_one_that_does_not() {
    let wide = Op { addr_mask: u64::MAX, flags: OpFlags::LONG, ..narrow() };
    for (checked, made) in
        [(narrow(), wide), (wide, narrow()), (Op { seg: 3, ..narrow() }, narrow())]
    {
        let other = behind_a_check(&checked, Access::load(8), |code, place| {
            // The last two instructions of a check once more, for another address.
            code.linear(ADDRESS, &made, 0)?;
            code.bytes(&[0x4c, 0x03, 0x68, 8]);
            load(code, place)
        });
        assert!(other.is_err(), "{made:?}");
    }
    let origin = Origin { narrow: true, ..Origin::register(3) };
    let (_, thunks) = thunks::make(BASE).unwrap();
    let group = |moved, at| {
        judged(|code| {
            let slow = code.label();
            let group = Group::of(origin, 3, 8, 31, false).seen_from(moved);
            code.check_group(&group, slow).unwrap();
            load(code, Place::at(at)).unwrap();
            code.bind(slow);
            code.jump_to(thunks.leave_at);
        })
    };
    for moved in [0, 100, -100] {
        for at in [8, 24] {
            group(moved, at).unwrap();
        }
        for at in [7, 25] {
            group(moved, at).unwrap_err();
        }
    }
}

#[test]
fn nothing_of_the_hosts_is_touched() {
    for (what, bytes) in [
        ("syscall", &[0x0f, 0x05][..]),
        ("int3", &[0xcc]),
        ("push rax", &[0x50]),
        ("mov rsp, rax", &[0x48, 0x89, 0xc4]),
        ("wrgsbase rax", &[0xf3, 0x48, 0x0f, 0xae, 0xd8]),
        ("mov [rbx], rax", &[0x48, 0x89, 0x03]),
        ("jmp rax", &[0xff, 0xe0]),
        ("ret", &[0xc3]),
        ("ret 16", &[0xc2, 16, 0]),
        ("pop rax", &[0x58]),
        ("push rbx; jmp on", &[0x53, 0xe9, 0, 0, 0, 0]),
        ("push rax; jmp on", &[0x50, 0xe9, 0, 0, 0, 0]),
        ("push rax; push rax", &[0x50, 0x50]),
        ("call on", &[0xe8, 0, 0, 0, 0]),
        ("push rax; call far away", &[0x50, 0xe8, 0, 0, 0, 0x10]),
        ("push rax; call rax", &[0x50, 0xff, 0xd0]),
        ("mov rax, [rsp]", &[0x48, 0x8b, 0x04, 0x24]),
        ("mov rbx, [rsp + 8]", &[0x48, 0x8b, 0x5c, 0x24, 8]),
        ("mov [rsp + 8], rax", &[0x48, 0x89, 0x44, 0x24, 8]),
        ("rep movsb", &[0xf3, 0xa4]),
        ("jmp far away", &[0xe9, 0, 0, 0, 0x10]),
        ("in al, dx", &[0xec]),
    ] {
        assert!(judged(|code| code.bytes(bytes)).is_err(), "{what}");
    }
    assert!(judged(|code| code.store(fields::VCPU, VALUE)).is_err(), "the vCPU's pointer");
    judged(|code| code.store(fields::gpr(13), VALUE)).unwrap();
}

#[test]
fn calls_are_noted_in_pairs_and_know_nothing_behind_them() {
    // fadd st, st(1)
    const FADD: &[u8] = &[0xd8, 0xc1];
    let call = |behind: &[u8]| {
        judged(|code| {
            let (callee, resume, vectors) = (code.label(), code.label(), code.label());
            code.load(VALUE, fields::VECTORS);
            // and eax, X87; cmp eax, X87
            code.bytes(&[0x83, 0xe0, X87, 0x83, 0xf8, X87]);
            code.jump_if(Condition::NOT_EQUAL, vectors);
            code.push_value();
            code.call_label(callee);
            code.bytes(behind);
            code.jump(resume);
            code.bind(callee);
            code.bytes(FADD);
            code.bind(resume);
            code.bind(vectors);
            // ret 8
            code.bytes(&[0xc2, 8, 0]);
        })
    };
    call(&[]).unwrap();
    assert!(call(FADD).is_err(), "the unit may not be loaded");
    // mov [r13], rax: nobody knows where that is.
    assert!(call(&[0x49, 0x89, 0x45, 0]).is_err());
    judged(|code| {
        code.last_call();
        code.forget_calls();
    })
    .unwrap();
}

#[test]
fn what_privileged_instructions_change_is_changed_in_their_way_only() {
    let masked = |bits: u32| {
        judged(|code| {
            // and dword [event_mask], bits
            code.bytes(&[0x65, 0x81, 0x24, 0x25]);
            code.bytes(&fields::EVENT_MASK.0.to_le_bytes());
            code.bytes(&bits.to_le_bytes());
        })
    };
    masked(!1).unwrap();
    assert!(masked(!3).is_err() && masked(0).is_err(), "more than interrupts");
    judged(|code| code.and_field(fields::RFLAGS, !0x200)).unwrap();
    judged(|code| code.and_field(fields::CR4, !0x200)).unwrap_err();
    judged(|code| code.store(fields::RFLAGS, VALUE)).unwrap_err();
    judged(|code| code.store(fields::KERNEL_GS_BASE, VALUE)).unwrap();
    judged(|code| code.store(fields::EVENTS, VALUE)).unwrap_err();
    let moved = |from, to| {
        judged(|code| {
            code.load(VALUE, from);
            code.store(to, VALUE);
        })
    };
    for (tables, space) in
        [(fields::TLB_PLAIN, fields::SPACE_PLAIN), (fields::TLB_OVER, fields::SPACE_OVER)]
    {
        moved(tables, fields::TLB).unwrap();
        moved(space, fields::SPACE).unwrap();
        moved(tables, fields::SPACE).unwrap_err();
        moved(space, fields::TLB).unwrap_err();
    }
    moved(fields::gpr(3), fields::TLB).unwrap_err();
}

#[test]
fn what_was_shown_of_one_view_is_not_of_another() {
    let change = |code: &mut Assembler| {
        code.load(VALUE, fields::TLB_OVER);
        code.store(fields::TLB, VALUE);
    };
    behind_a_check(&operand(), Access::load(8), |code, place| {
        change(code);
        load(code, place)
    })
    .unwrap_err();
    behind_a_shared_check(false, |code| {
        change(code);
        code.load(ADDRESS, fields::shared(3));
        load(code, Place::at(0))
    })
    .unwrap_err();
}

#[test]
fn the_x87_unit_is_used_where_it_is_loaded_and_never_raises_an_exception() {
    const FLD1: &[u8] = &[0xd9, 0xe8];
    let behind = |need: u8, then: &dyn Fn(&mut Assembler)| {
        let (_, thunks) = thunks::make(BASE).unwrap();
        judged(|code| {
            let slow = code.label();
            code.load(VALUE, fields::VECTORS);
            super::super::cold::require(code, need);
            code.jump_if(Condition::NOT_EQUAL, slow);
            then(code);
            code.bind(slow);
            code.jump_to(thunks.leave_at);
        })
    };
    let field = |code: &mut Assembler, bytes: &[u8]| {
        code.bytes(bytes);
        code.bytes(&fields::SPARE.0.to_le_bytes());
    };
    let fldcw = |code: &mut Assembler| field(code, &[0x65, 0xd9, 0x2c, 0x25]);
    judged(|code| code.bytes(FLD1)).unwrap_err();
    behind(3, &|code| code.bytes(FLD1)).unwrap_err();
    for used in [FLD1, &[0x0f, 0xfc, 0xc1], &[0x0f, 0x77], &[0xdf, 0xe0]] {
        behind(4, &|code| code.bytes(used)).unwrap();
        behind(7, &|code| code.bytes(used)).unwrap();
    }
    behind(4, &|code| {
        code.or_field(fields::SPARE, 0x3f);
        fldcw(code);
    })
    .unwrap();
    behind(4, &fldcw).unwrap_err();
    for (masks, then) in [(0x1f, 0), (0x3f, 1)] {
        behind(4, &|code| {
            code.or_field(fields::SPARE, masks);
            if then == 1 {
                code.store(fields::SPARE, VALUE);
            }
            fldcw(code);
        })
        .unwrap_err();
    }
    // fldenv, fnstenv, frstor, fnsave; fxsave, fxrstor, xsave, xrstor.
    for (opcode, middle) in [(0xd9, 4), (0xd9, 6), (0xdd, 4), (0xdd, 6)] {
        behind(4, &|code| field(code, &[0x65, opcode, 0x04 | middle << 3, 0x25])).unwrap_err();
    }
    for middle in [0, 1, 4, 5] {
        behind(7, &|code| field(code, &[0x65, 0x0f, 0xae, 0x04 | middle << 3, 0x25])).unwrap_err();
    }
    // What is noted of the last instruction is the address of an op, and nothing else.
    let noted = |write: &dyn Fn(&mut Assembler)| {
        judged(|code| {
            write(code);
            code.store(fields::X87_OP, VALUE);
        })
    };
    noted(&|code| code.constant(VALUE, 0x7f12_3456_7890)).unwrap();
    noted(&|code| code.fetch(VALUE, 3)).unwrap_err();
    noted(&|code| code.load(VALUE, fields::SPARE)).unwrap_err();
}

/// A look into the mirror for `[rbx + 8]`, and what `then` makes of where that is.
fn behind_a_mirrored_check(
    then: impl FnOnce(&mut Assembler) -> Result<(), NotCopied>,
) -> Result<(), Violation> {
    let group = Group::alone(Origin::register(3), 8, Access::store(8));
    let (_, thunks) = thunks::make(BASE).unwrap();
    judged(|code| {
        let look = code.label();
        code.in_mirror(&group, look).unwrap();
        then(code).unwrap();
        code.bind(look);
        code.jump_to(thunks.leave_at);
    })
}

#[test]
fn what_the_mirror_has_is_reached_from_the_register_that_was_looked_at() {
    let at = |index, displacement| Place::from(index, 1, displacement);
    for distance in [8, 0, 0x100, -0x100, 0x7000, -0x7000] {
        behind_a_mirrored_check(|code| store(code, at(R::RBX, distance))).unwrap();
    }
    for (index, distance) in [(R::RBX, 0x9000), (R::RBX, -0x9000), (R::RCX, 8), (R::None, 8)] {
        behind_a_mirrored_check(|code| load(code, at(index, distance))).unwrap_err();
    }
    let twice = Place::from(R::RBX, 2, 8);
    behind_a_mirrored_check(|code| load(code, twice)).unwrap_err();
    // add rbx, 8 is followed; mov rbx, rcx and xchg rcx, rbx are not.
    behind_a_mirrored_check(|code| {
        code.bytes(&[0x48, 0x83, 0xc3, 0x08]);
        load(code, at(R::RBX, 0))
    })
    .unwrap();
    for bytes in [&[0x48, 0x89, 0xcb][..], &[0x48, 0x87, 0xd9], &[0x48, 0x87, 0xcb]] {
        behind_a_mirrored_check(|code| {
            code.bytes(bytes);
            load(code, at(R::RBX, 8))
        })
        .unwrap_err();
    }
    // Kept, and used again; another place was not.
    for (place, right) in [(3, true), (5, false)] {
        let judged = behind_a_mirrored_check(|code| {
            code.store(fields::shared(3), ADDRESS);
            code.constant(ADDRESS, 0);
            code.load(ADDRESS, fields::shared(place));
            load(code, at(R::RBX, 8))
        });
        assert_eq!(judged.is_ok(), right, "{place}");
    }
}

#[test]
fn the_mirror_is_used_only_where_its_table_says_so() {
    let group = Group::alone(Origin::register(3), 8, Access::load(8));
    let place = Place::from(R::RBX, 1, 8);
    // Not looked at, or with the opposite outcome.
    judged(|code| {
        code.load(ADDRESS, fields::MIRROR_DISTANCE);
        load(code, place).unwrap();
    })
    .unwrap_err();
    let with = |condition, field, shift: u8| {
        judged(|code| {
            let look = code.label();
            code.sum(VALUE, group.origin, group.first).unwrap();
            code.bytes(&[0x48, 0xc1, 0xe8, shift]);
            code.add(VALUE, field);
            code.bytes(&[0x80, 0x38, 0x00]);
            code.jump_if(condition, look);
            code.load(ADDRESS, fields::MIRROR_DISTANCE);
            load(code, place).unwrap();
            code.bind(look);
        })
    };
    with(Condition::EQUAL, fields::MIRROR, SPAN_SHIFT as u8).unwrap();
    with(Condition::NOT_EQUAL, fields::MIRROR, SPAN_SHIFT as u8).unwrap_err();
    with(Condition::BELOW, fields::MIRROR, SPAN_SHIFT as u8).unwrap_err();
    with(Condition::EQUAL, fields::TLB, SPAN_SHIFT as u8).unwrap_err();
    with(Condition::EQUAL, fields::MIRROR, 39).unwrap_err();
    // What it is for is nobody's to change.
    judged(|code| code.store(fields::MIRROR, VALUE)).unwrap_err();
    judged(|code| code.store(fields::MIRROR_DISTANCE, VALUE)).unwrap_err();
}

#[test]
fn a_fault_is_followed_to_where_it_lands() {
    let (made, thunks) = thunks::make(BASE).unwrap();
    let base = BASE + made.len() as u64;
    let verdict = |to: u16| {
        let mut code = Assembler::new(base);
        let look = code.label();
        let group = Group::alone(Origin::register(3), 8, Access::load(8));
        code.in_mirror(&group, look).unwrap();
        let at = code.len() as u16;
        load(&mut code, Place::from(R::RBX, 1, 8)).unwrap();
        code.jump_to(thunks.leave_at);
        let landing = code.len() as u16;
        // What is known where it has faulted is known here.
        load(&mut code, Place::from(R::RBX, 1, 16)).unwrap();
        code.bind(look);
        code.jump_to(thunks.leave_at);
        let code = code.finish().unwrap().0;
        let to = if to == 0 { landing } else { to };
        verify(&code, base, &thunks, &[Landing { at, to }])
    };
    verdict(0).unwrap();
    verdict(1).unwrap_err();
    verdict(4000).unwrap_err();
}
