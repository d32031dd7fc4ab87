//! Xen's frame conversions through call sites: indirect, patched, undone; their meaning, and
//! the registers around the call.

mod module;

use core::sync::atomic::AtomicU64;
use module::{Module, Ops};
use pvops::backend::xen::frames::{self, Frames, INVALID};
use pvops::families::mmu;
use pvops::families::types::{CpuMask, Mm, Pte};
use pvops::user::{DualMapping, Threads};
use pvops::{Binding, Bindings, Family, Form, Plain, Sites};

/// Frames 0 to 3 are machine frames 0x103, 0x102, none, 0x100.
static TO_MACHINE: [AtomicU64; 4] =
    [AtomicU64::new(0x103), AtomicU64::new(0x102), AtomicU64::new(INVALID), AtomicU64::new(0x100)];

/// Of Xen's four frames from 0x100 number 0x101 is another guest's.
static FRAMES: Frames = Frames {
    to_machine: &TO_MACHINE,
    of_machine: |machine| match machine {
        0x103 => Some(0),
        0x102 => Some(1),
        0x101 => Some(1),
        0x100 => Some(3),
        _ => None,
    },
};

unsafe extern "sysv64" fn flush_others(_: *const CpuMask, _: *mut Mm, _: usize) {}
unsafe extern "sysv64" fn set_fixmap(_: u32, _: u64, _: u64) {}

/// Sites of this program's own: each op has one.
#[inline(never)]
fn round_trip(value: u64) -> [u64; 4] {
    [
        mmu::pte_val(mmu::make_pte(value)),
        mmu::pmd_val(mmu::make_pmd(value)),
        mmu::pud_val(mmu::make_pud(value)),
        mmu::pgd_val(mmu::make_pgd(value)),
    ]
}

const FLAGS: u64 = 1 << 63 | 0x67;

fn check(module: &Module) {
    let at = |frame: u64| frame << 12 | FLAGS;
    let made = [
        (at(0), at(0x103)),
        (at(1), at(0x102)),
        (at(2), 0),
        (at(3), at(0x100)),
        (at(0xfee00), at(0xfee00)),
        (0x3000, 0x3000),
        (0, 0),
    ];
    let read = [
        (at(0x103), at(0)),
        (at(0x102), at(1)),
        (at(0x100), at(3)),
        // Xen's table says it is frame 1, ours says otherwise: the machine's own number,
        // beyond our table.
        (at(0x101), at(0x101)),
        // A number within our table that is not ours.
        (at(2), FLAGS & !1),
        (0x10_3000, 0x10_3000),
    ];
    for level in ["pte", "pmd", "pud", "pgd"] {
        for (op, cases) in
            [(format!("make_{level}"), &made[..]), (format!("{level}_val"), &read[..])]
        {
            for (word, expected) in cases {
                // SAFETY: takes any word.
                let result = unsafe { module.call(&op, &[*word as usize]) };
                assert_eq!(result, *expected, "{op} {word:#x}");
            }
        }
    }
}

#[test]
fn entries_are_translated_in_every_form() {
    let sites = Sites::of_program();
    let mut text = DualMapping::around(sites, Threads::stop(41)).expect("a window");
    let mut family = mmu::Family::claim().expect("nobody has it");
    // Native first: the words are the same.
    assert_eq!(mmu::make_pte(0x3067), Pte(0x3067));

    let mut bindings = Bindings::new("xen");
    frames::bind(&mut bindings, &FRAMES).expect("once");
    let twice = frames::bind(&mut bindings, &FRAMES).expect_err("bound already");
    assert_eq!(twice.to_string(), "backend xen binds mmu.make_pte twice");
    bindings
        .bind(mmu::op::FlushTlbOthers, Binding::call(Plain::new(flush_others)))
        .and_then(|b| b.bind(mmu::op::SetFixmap, Binding::call(Plain::new(set_fixmap))))
        .expect("once");
    family.bind(&bindings).expect("complete");

    let ours = FLAGS | 0x3000;
    assert_eq!(round_trip(ours), [ours; 4]);
    let mut ops = Ops::default();
    let (mut patched, report) = family
        .apply(sites, &mut text, |o| {
            if o.op.ends_with("_val") || o.op.starts_with("make_") {
                assert_eq!(o.form, Form::Direct, "{o}");
                ops.note(o);
            }
        })
        .expect("patched");
    assert_eq!(report.indirect, 0, "{report}");
    assert_eq!(round_trip(ours), [ours; 4]);

    let mut module = Module::load(&ops);
    check(&module);
    let records = module.records();
    let report = patched.apply_late(records.sites(), &mut module, |_| ()).expect("patched");
    assert_eq!((report.direct, report.sites()), (8, 8));
    check(&module);

    let family = patched.undo(sites, &mut text).expect("undone");
    assert_eq!(round_trip(ours), [ours; 4]);
    family.release();
}
