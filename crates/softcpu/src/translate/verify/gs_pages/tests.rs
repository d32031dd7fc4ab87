use super::super::tests::{judged, load, store};
use super::*;
use crate::translate::access::Place;
use crate::translate::assembler::Condition;

#[test]
fn a_page_behind_gs_is_reached_where_it_was_found() {
    let with = |condition: Condition, compared: usize, loaded: usize, known: fields::Field, at| {
        judged(|code| {
            let look = code.label();
            code.load(VALUE, known);
            code.compare(VALUE, fields::gs_page_base(compared));
            code.jump_if(condition, look);
            code.load(ADDRESS, fields::gs_page_addend(loaded));
            store(code, Place::at(at)).unwrap();
            load(code, Place::at(at)).unwrap();
            code.bind(look);
        })
    };
    let (unequal, known) = (Condition::NOT_EQUAL, fields::GS_BASE_KNOWN);
    with(unequal, 2, 2, known, 0x2000).unwrap();
    with(unequal, 2, 2, known, 0x2ff8).unwrap();
    with(unequal, 2, 2, known, 0x2ff9).unwrap_err();
    with(unequal, 2, 2, known, 0x1fff).unwrap_err();
    with(unequal, 2, 3, known, 0x2000).unwrap_err();
    with(unequal, 3, 2, known, 0x2000).unwrap_err();
    with(Condition::EQUAL, 2, 2, known, 0x2000).unwrap_err();
    with(unequal, 2, 2, fields::gpr(3), 0x2000).unwrap_err();
    let base = fields::segment_base(5);
    with(unequal, 2, 2, base, 0x2000).unwrap_err();
    // Behind something else it is not known any more.
    judged(|code| {
        let look = code.label();
        code.load(VALUE, known);
        code.compare(VALUE, fields::gs_page_base(2));
        code.jump_if(unequal, look);
        code.load(VALUE, fields::gpr(3));
        code.load(ADDRESS, fields::gs_page_addend(2));
        load(code, Place::at(0x2000)).unwrap();
        code.bind(look);
    })
    .unwrap_err();
    // The table is the run loop's, and what is the base is what GS is exchanged with.
    judged(|code| code.store(fields::gs_page_base(2), VALUE)).unwrap_err();
    judged(|code| code.store(fields::gs_page_addend(2), ADDRESS)).unwrap_err();
    judged(|code| code.store(known, ADDRESS)).unwrap_err();
    judged(|code| code.store_constant(known, 2)).unwrap_err();
    judged(|code| code.store_constant(known, 1)).unwrap();
    judged(|code| {
        code.load(ADDRESS, fields::KERNEL_GS_BASE);
        code.store(known, ADDRESS);
    })
    .unwrap();
}
