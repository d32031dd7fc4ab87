//! A family of its own: called through its table, patched, re-bound, undone, also while
//! other threads are calling.

use pvops::user::{DualMapping, Threads};
use pvops::{Binding, Bindings, CalleeSave, Family, Form, Patched, Sites, callee_save};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

pvops::family! {
    /// Arithmetic, for want of hardware.
    mod sums {
        use super::{add, add_one, twice, waits};
        /// a + b
        callee_save fn plus(a: u64, b: u64) -> u64 = pvops::Binding::call(add::CALLEE_SAVE);
        /// a + 1, by default.
        callee_save fn step(a: u64) -> u64 = pvops::Binding::call(add_one::CALLEE_SAVE);
        /// Through the whole convention.
        plain fn scale(a: u64) -> u64 = pvops::Binding::call(pvops::Plain::new(twice));
        /// May do nothing.
        callee_save fn note(a: u64) = pvops::Binding::<pvops::CalleeSave<_>>::nop();
        /// Takes its time, at sites with more room than a call needs.
        callee_save(room = 13) fn wait() -> u64 = pvops::Binding::call(waits::CALLEE_SAVE);
        /// Never patched.
        direct fn slow(a: u64) -> u64 = pvops::Binding::call(pvops::Plain::new(twice));
    }
}

#[callee_save]
fn add(a: u64, b: u64) -> u64 {
    a.wrapping_add(b)
}

#[callee_save]
fn add_one(a: u64) -> u64 {
    a.wrapping_add(1)
}

#[callee_save]
fn add_two(a: u64) -> u64 {
    a.wrapping_add(2)
}

extern "sysv64" fn twice(a: u64) -> u64 {
    a.wrapping_mul(2)
}

static NOTED: AtomicU64 = AtomicU64::new(0);

#[callee_save]
fn noted(a: u64) {
    NOTED.store(a, Ordering::SeqCst);
}

#[inline(never)]
fn compute(n: u64) -> u64 {
    let a = black_box(n);
    let b = sums::plus(a, 3);
    sums::note(b);
    let c = sums::step(b);
    sums::scale(c) + a + b + sums::slow(1)
}

fn expected(n: u64, step: u64) -> u64 {
    (n + 3 + step) * 2 + n + n + 3 + 2
}

/// The family is one for the whole program: tests take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

const SIGNAL: i32 = 40;

/// a + 5 without a call.
fn inline_five() -> Binding<CalleeSave<extern "sysv64" fn(u64) -> u64>> {
    #[unsafe(naked)]
    extern "sysv64" fn five(a: u64) -> u64 {
        core::arch::naked_asm!("lea rax, [rdi + 5]", "ret")
    }
    let code = pvops::Code {
        bytes: &[0x48, 0x8d, 0x47, 0x05],
        clobbers: pvops::RegSet::of(&[pvops::Gpr::Rax]),
        fixups: &[],
    };
    // SAFETY: the same instruction as the function's, which changes RAX only.
    unsafe { Binding::inline(CalleeSave::promise(five), code) }
}

#[test]
fn apply_rebind_undo() {
    let _turn = turn();
    let sites = Sites::of_program();
    let mut text = DualMapping::around(sites, Threads::stop(SIGNAL)).expect("a window");
    let mut family = sums::Family::claim().expect("nobody has it");
    assert!(sums::Family::claim().is_err());
    assert_eq!(compute(10), expected(10, 1));

    // Bound but not patched: the sites read the table.
    let mut bindings = Bindings::new("two");
    bindings.bind(sums::op::Step, Binding::call(add_two::CALLEE_SAVE)).expect("once");
    bindings.bind(sums::op::Note, Binding::call(noted::CALLEE_SAVE)).expect("once");
    family.bind(&bindings).expect("complete");
    assert_eq!(compute(10), expected(10, 2));
    assert_eq!(NOTED.swap(0, Ordering::SeqCst), 13);

    let mut left = vec![];
    let (mut patched, report) = family
        .apply(sites, &mut text, |o| {
            if matches!(o.form, Form::Indirect(_)) {
                left.push(*o);
            }
        })
        .expect("patched");
    println!("{report}");
    assert_eq!((report.indirect, left.len()), (0, 0), "{left:?}");
    assert_eq!(report.direct, report.sites());
    assert!(report.sites() >= 4);
    assert_eq!(compute(10), expected(10, 2));

    // Back to the defaults, which do nothing for `note`, with one op in line.
    let mut bindings = Bindings::new("five");
    bindings.bind(sums::op::Step, inline_five()).expect("once");
    let report = patched.rebind(&bindings, sites, &mut text, |_| ()).expect("patched");
    assert!(report.nop >= 1 && report.inline >= 1, "{report}");
    assert_eq!(report.indirect, 0);
    NOTED.store(0, Ordering::SeqCst);
    assert_eq!(compute(10), expected(10, 5));
    assert_eq!(NOTED.load(Ordering::SeqCst), 0);

    let family = patched.undo(sites, &mut text).expect("undone");
    assert_eq!(compute(10), expected(10, 5));
    let (patched, again) = family.apply(sites, &mut text, |_| ()).expect("again");
    assert_eq!(again.inline, report.inline);
    let mut family = patched.undo(sites, &mut text).expect("undone again");
    family.bind(&Bindings::new("default")).expect("all have defaults");
    family.release();
    assert_eq!(compute(10), expected(10, 1));
}

/// Re-patched between all three forms while four threads call without pause.
#[test]
fn live_under_threads() {
    let _turn = turn();
    let sites = Sites::of_program();
    let mut text = DualMapping::around(sites, Threads::stop(SIGNAL)).expect("a window");
    let mut family = sums::Family::claim().expect("nobody has it");
    family.bind(&Bindings::new("default")).expect("defaults");
    let stop = AtomicBool::new(false);
    let calls = AtomicU64::new(0);
    let mut family = std::thread::scope(|scope| {
        for seed in 0..4u64 {
            let (stop, calls) = (&stop, &calls);
            scope.spawn(move || {
                let mut n = seed;
                while !stop.load(Ordering::Relaxed) {
                    let got = compute(n);
                    assert!([1, 2, 5].iter().any(|s| got == expected(n, *s)), "{n}: {got}");
                    n = n.wrapping_add(1) % 1000;
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut two = Bindings::new("two");
        two.bind(sums::op::Step, Binding::call(add_two::CALLEE_SAVE)).expect("once");
        let mut five = Bindings::new("five");
        five.bind(sums::op::Step, inline_five()).expect("once");
        let mut rounds = 0;
        let start = std::time::Instant::now();
        while rounds < 60 && start.elapsed().as_secs() < 20 {
            let (mut patched, _) = family.apply(sites, &mut text, |_| ()).expect("patched");
            for bindings in [&two, &five, &two] {
                let report = patched.rebind(bindings, sites, &mut text, |_| ()).expect("patched");
                assert_eq!(report.indirect, 0);
            }
            family = patched.undo(sites, &mut text).expect("undone");
            rounds += 1;
        }
        assert!(rounds > 3, "only {rounds} rounds");
        stop.store(true, Ordering::Relaxed);
        family
    });
    assert!(calls.load(Ordering::Relaxed) > 100);
    family.bind(&Bindings::new("default")).expect("defaults");
    family.release();
}

static INSIDE: AtomicBool = AtomicBool::new(false);
static GO: AtomicBool = AtomicBool::new(true);

#[callee_save]
fn waits() -> u64 {
    INSIDE.store(true, Ordering::SeqCst);
    while !GO.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    1
}

#[inline(never)]
fn wait_once() -> u64 {
    sums::wait()
}

/// A callee that was called by one form of its site returns to another: from an indirect
/// call and from a direct one to ten bytes of one instruction, and back.
#[test]
fn a_callee_returns_to_a_site_that_changed_meanwhile() {
    // Entered anywhere but at its start this is an undefined instruction.
    const VALUE: u64 = u64::from_le_bytes([0x0f, 0x0b, 0x0f, 0x0b, 0x0f, 0x0b, 0x0f, 0x0b]);
    #[unsafe(naked)]
    extern "sysv64" fn at_once() -> u64 {
        core::arch::naked_asm!("movabs rax, {value}", "ret", value = const VALUE)
    }
    let bytes = &[0x48, 0xb8, 0x0f, 0x0b, 0x0f, 0x0b, 0x0f, 0x0b, 0x0f, 0x0b];
    let clobbers = pvops::RegSet::of(&[pvops::Gpr::Rax]);
    let code = pvops::Code { bytes, clobbers, fixups: &[] };
    // SAFETY: the function's own instruction, which changes RAX only.
    let inline: Binding<CalleeSave<extern "sysv64" fn() -> u64>> =
        unsafe { Binding::inline(CalleeSave::promise(at_once), code) };
    let mut quick = Bindings::new("quick");
    quick.bind(sums::op::Wait, inline).expect("once");

    let _turn = turn();
    let sites = Sites::of_program();
    let mut text = DualMapping::around(sites, Threads::stop(SIGNAL)).expect("a window");
    let mut family = sums::Family::claim().expect("nobody has it");
    let inside = || {
        GO.store(false, Ordering::SeqCst);
        INSIDE.store(false, Ordering::SeqCst);
        let thread = std::thread::spawn(wait_once);
        while !INSIDE.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        thread
    };
    let returns = |thread: std::thread::JoinHandle<u64>| {
        GO.store(true, Ordering::SeqCst);
        assert_eq!(thread.join().expect("no undefined instruction"), 1);
    };
    // Called indirectly.
    let caller = inside();
    family.bind(&quick).expect("complete");
    let (mut patched, report) = family.apply(sites, &mut text, |_| ()).map_err(|e| e.1).unwrap();
    assert!(report.inline > 0);
    assert_eq!(wait_once(), VALUE);
    returns(caller);
    // Called directly.
    let rebind = |patched: &mut Patched<sums::Family>, text: &mut _, bindings: &_| {
        let report = patched.rebind(bindings, sites, text, |_| ()).expect("patched");
        assert_eq!(report.indirect, 0);
    };
    let default = Bindings::new("default");
    rebind(&mut patched, &mut text, &default);
    let caller = inside();
    rebind(&mut patched, &mut text, &quick);
    assert_eq!(wait_once(), VALUE);
    returns(caller);
    // Called directly, and undone.
    rebind(&mut patched, &mut text, &default);
    let caller = inside();
    family = patched.undo(sites, &mut text).map_err(|e| e.1).expect("undone");
    returns(caller);
    family.release();
}

/// A second window takes the text over; the first one notices instead of lying.
#[test]
fn a_window_mapped_over_says_so() {
    let _turn = turn();
    let sites = Sites::of_program();
    let mut first = DualMapping::around(sites, Threads::stop(SIGNAL)).expect("a window");
    let mut second = DualMapping::around(sites, Threads::stop(SIGNAL)).expect("a window");
    let family = sums::Family::claim().expect("nobody has it");
    let (family, error) = family.apply(sites, &mut first, |_| ()).expect_err("cut off");
    assert!(error.to_string().contains("sums."), "{error}");
    assert!(error.to_string().ends_with("somebody else has mapped over it"), "{error}");
    assert_eq!(compute(10), expected(10, 1));
    let (patched, _) = family.apply(sites, &mut second, |_| ()).map_err(|e| e.1).expect("patched");
    assert_eq!(compute(10), expected(10, 1));
    let family = patched.undo(sites, &mut second).map_err(|e| e.1).expect("undone");
    family.release();
}

pvops::family! {
    /// One op has a default, the other must be bound.
    mod partial {
        use super::add_one;
        callee_save fn given(a: u64) -> u64 = pvops::Binding::call(add_one::CALLEE_SAVE);
        callee_save fn wanted(a: u64) -> u64;
    }
}

#[inline(never)]
fn both_partial(a: u64) -> u64 {
    partial::given(a) + partial::wanted(a)
}

/// Nothing bound at all is no excuse for an op without a default; and who claims a family
/// after somebody else finds its defaults, in the table as in what would be patched.
#[test]
fn a_family_starts_from_its_defaults_and_must_be_complete() {
    let _turn = turn();
    let sites = Sites::of_program();
    let mut text = DualMapping::around(sites, Threads::stop(SIGNAL)).expect("a window");
    let family = partial::Family::claim().expect("nobody has it");
    let (mut family, error) = family.apply(sites, &mut text, |_| ()).expect_err("incomplete");
    let text_of_error = error.to_string();
    assert_eq!(text_of_error, "backend default does not bind partial.wanted, which has no default");
    let mut bindings = Bindings::new("mine");
    bindings.bind(partial::op::Given, Binding::call(add_two::CALLEE_SAVE)).expect("once");
    bindings.bind(partial::op::Wanted, Binding::call(add_two::CALLEE_SAVE)).expect("once");
    family.bind(&bindings).expect("complete");
    assert_eq!(both_partial(1), 6);
    family.release();
    assert_eq!(partial::given(1), 2, "the default again");
    let mut family = partial::Family::claim().expect("given back");
    let mut bindings = Bindings::new("other");
    bindings.bind(partial::op::Wanted, Binding::call(add_one::CALLEE_SAVE)).expect("once");
    family.bind(&bindings).expect("complete");
    let (patched, _) = family.apply(sites, &mut text, |_| ()).map_err(|e| e.1).expect("patched");
    assert_eq!(both_partial(1), 4);
    patched.undo(sites, &mut text).map_err(|e| e.1).expect("undone").release();
}
