//! puppy's tests, which run in the kernel: `cargo puppy test`.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::hint::black_box;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lguest_guest::hypercall::{self, Call};
use lguest_guest::paging::{self, Access, AddressSpace};
use lguest_guest::{
    InterruptOps, Platform, frames, irq, kernel_test, platform, println, set_interrupt_ops, time,
};

use crate::file::{self, FileError};
use crate::programs::{self, KILLED};
use crate::threads;

const MILLISECOND: u64 = 1_000_000;

kernel_test!(memory_is_given_once_and_zeroed, || {
    let pages: Vec<u64> = (0..100).filter_map(|_| frames::take()).collect();
    assert_eq!(pages.len(), 100);
    for page in &pages {
        let bytes = lguest_guest::boot::direct(*page);
        // SAFETY: a page of our own.
        let all = unsafe { core::slice::from_raw_parts_mut(bytes, frames::PAGE) };
        assert!(all.iter().all(|byte| *byte == 0));
        all.fill(0xa5);
    }
    // SAFETY: nobody uses them any more.
    pages.iter().for_each(|page| unsafe { frames::give(*page) });
});

// The compiler calls the kernel's own functions for these.
kernel_test!(bytes_are_moved_and_compared, || {
    let mut bytes: Vec<u8> = (0..200).collect();
    bytes.copy_within(0..100, 50);
    assert!(bytes[50..150].iter().copied().eq(0..100), "upwards, over itself");
    bytes.copy_within(50..150, 10);
    assert!(bytes[10..110].iter().copied().eq(0..100), "downwards");
    let (low, high) = (black_box(b"kernel \x01 low".to_vec()), black_box(b"kernel \xf0".to_vec()));
    let same = black_box(low.clone());
    assert!(low < high && low == same);
    assert_eq!(high.cmp(&low), core::cmp::Ordering::Greater);
    assert!(low[..7] < low[..] && low[..7] == high[..7]);
});

kernel_test!(the_heap_keeps_things_apart, || {
    let boxes: Vec<Box<[u64; 9]>> = (0..1000).map(|n| Box::new([n; 9])).collect();
    let large: Vec<u8> = alloc::vec![7; 100_000];
    assert!(boxes.iter().zip(0..).all(|(it, n)| **it == [n; 9]));
    assert!(large.iter().all(|byte| *byte == 7));
});

kernel_test!(interrupts_nest, || {
    assert!(irq::enabled());
    irq::without(|| {
        assert!(!irq::enabled());
        irq::without(|| assert!(!irq::enabled()));
        assert!(!irq::enabled());
    });
    assert!(irq::enabled());
});

kernel_test!(interrupts_work_in_each_form, || {
    for form in [InterruptOps::Called, InterruptOps::Patched] {
        irq::without(|| set_interrupt_ops(form));
        assert!(irq::enabled(), "{form:?}");
        let before = time::tick_count();
        // What became due while interrupts were off comes when they are on again.
        irq::without(|| {
            let start = time::now();
            while time::now() < start + 30 * MILLISECOND {}
            assert_eq!(time::tick_count(), before, "{form:?}");
        });
        assert!(time::tick_count() > before, "{form:?}");
    }
});

kernel_test!(time_goes_on, || {
    let (start, ticks) = (time::now(), time::tick_count());
    let mut last = start;
    while time::tick_count() < ticks + 3 {
        let now = time::now();
        assert!(now >= last);
        last = now;
        irq::wait();
    }
    assert!(time::now() - start >= 10 * MILLISECOND);
});

kernel_test!(threads_are_preempted, || {
    static STOP: AtomicBool = AtomicBool::new(false);
    let counters: Vec<Arc<AtomicU64>> = (0..3).map(|_| Arc::default()).collect();
    let spin = |counter: &Arc<AtomicU64>| {
        let counter = Arc::clone(counter);
        threads::spawn("spin", None, move || {
            while !STOP.load(Ordering::Relaxed) {
                counter.fetch_add(1, Ordering::Relaxed);
            }
            42
        })
    };
    let ids: Vec<_> = counters.iter().map(spin).collect();
    // None of them ever yields, yet all of them get on, and this thread, too.
    while counters.iter().any(|counter| counter.load(Ordering::Relaxed) == 0) {
        threads::sleep(5 * MILLISECOND);
    }
    STOP.store(true, Ordering::Relaxed);
    assert!(ids.into_iter().all(|id| threads::join(id) == 42));
});

/// Computes in floating point, so that registers are in use that nobody saves by hand.
fn harmonic(seed: u32) -> f64 {
    (1..200_000).map(|n| 1.0 / f64::from(n + seed)).sum()
}

kernel_test!(registers_survive_preemption, || {
    let expected: Vec<f64> = (0..3).map(harmonic).collect();
    let run = |seed: u32| {
        let expected = expected[seed as usize];
        threads::spawn("sum", None, move || {
            i64::from((0..5).all(|_| core::hint::black_box(harmonic(seed)) == expected))
        })
    };
    let ids: Vec<_> = (0..3).map(run).collect();
    assert!(ids.into_iter().all(|id| threads::join(id) == 1));
});

// A leaf of the core library's own code: as it was shipped, with a red zone.
kernel_test!(red_zones_survive_interrupts, || {
    let text = "wuff ".repeat(5_000);
    let until = time::tick_count() + 5;
    while time::tick_count() < until {
        assert_eq!(core::str::from_utf8(text.as_bytes()).map(str::len), Ok(25_000));
        let product = core::hint::black_box(u128::MAX) / core::hint::black_box(0x1_0000_0001);
        assert_eq!(product, 0xffff_ffff_0000_0000_ffff_ffff);
    }
});

kernel_test!(sleepers_wake_in_time_and_order, || {
    let start = time::now();
    let sleep = |millis: u64| {
        threads::spawn("sleep", None, move || {
            threads::sleep(millis * MILLISECOND);
            time::now() as i64
        })
    };
    let (late, soon) = (sleep(60), sleep(20));
    let (late, soon) = (threads::join(late) as u64, threads::join(soon) as u64);
    assert!(soon >= start + 20 * MILLISECOND && late >= start + 60 * MILLISECOND);
    // A host that was busy meanwhile has both wake at once.
    assert!(soon < late || soon >= start + 60 * MILLISECOND);
});

fn start(name: &str) -> threads::Id {
    let program = programs::find(name).expect("the program is there");
    program.start(100).expect("there is memory")
}

fn run(name: &str) -> i64 {
    threads::join(start(name))
}

kernel_test!(programs_run_and_end, || {
    assert!(run("hello") > 0);
    assert!(run("dig") > 0);
});

kernel_test!(programs_have_memory_and_registers_of_their_own, || {
    let program = programs::find("fetch").expect("there");
    let ids: Vec<_> = (0..4).filter_map(|_| program.start(0).ok()).collect();
    assert_eq!(ids.len(), 4);
    assert!(ids.into_iter().all(|id| threads::join(id) == 0));
});

kernel_test!(who_is_switched_to_does_not_wait_for_a_batch_of_others, || {
    let (hello, fetch) = (start("hello"), start("fetch"));
    // They begin while it is being made.
    paging::batch(|| {
        assert!(threads::join(hello) > 0);
        assert_eq!(threads::join(fetch), 0);
    });
});

kernel_test!(a_program_that_bites_is_killed_and_nothing_else, || {
    assert_eq!(run("bite"), KILLED);
    assert!(run("hello") > 0);
});

kernel_test!(programs_give_their_memory_back, || {
    run("fetch");
    let before = frames::untouched();
    for _ in 0..20 {
        assert_eq!(run("fetch"), 0);
    }
    assert!(before - frames::untouched() < 64 << 10);
});

kernel_test!(mappings_change_alone_and_in_batches, || {
    let space = AddressSpace::new().expect("there is memory");
    let pages: Vec<u64> = (0..200).filter_map(|_| frames::take()).collect();
    let at = |n: usize| 0x4000_0000 + (n * frames::PAGE) as u64;
    paging::batch(|| {
        for (n, page) in pages.iter().enumerate() {
            space.map(at(n), *page, Access::Write).expect("there is memory");
        }
        // Once more, the other way round: entries that were there, so calls that wait.
        for (n, page) in pages.iter().rev().enumerate() {
            space.map(at(n), *page, Access::Write).expect("there is memory");
        }
    });
    irq::without(|| {
        space.activate();
        for n in 0..pages.len() {
            let pointer: *mut usize = core::ptr::with_exposed_provenance_mut(at(n) as usize);
            // SAFETY: mapped above, in the space that is current.
            unsafe { pointer.write_volatile(n) };
        }
        space.map(at(0), pages[0], Access::Read).expect("there is memory");
        let pointer: *const usize = core::ptr::with_exposed_provenance(at(0) as usize);
        // SAFETY: as above.
        assert_eq!(unsafe { pointer.read_volatile() }, pages.len() - 1, "the last was put there");
        paging::kernel_only();
    });
    for (n, page) in pages.iter().rev().enumerate().skip(1).take(198) {
        // SAFETY: a page of our own.
        assert_eq!(unsafe { lguest_guest::boot::direct(*page).cast::<usize>().read() }, n);
    }
    // The first and the last page are the same one now, and are given back once.
    space.unmap(at(0));
});

kernel_test!(the_ring_holds_more_calls_than_it_has_slots, || {
    if platform() == Platform::Lguest {
        hypercall::begin_batch();
        (0..1000).for_each(|_| hypercall::later(Call::Ts(false)));
        hypercall::end_batch();
    }
});

kernel_test!(a_file_is_what_was_written, || {
    match file::read() {
        Err(FileError::NoDisk) => println!("(no disk: nothing to test)"),
        Err(error) => panic!("{error}"),
        Ok(_) => {
            let long: Vec<u8> = (0..70_000_u32).map(|n| (n % 251) as u8).collect();
            for text in [&b"a bone"[..], b"", &long, b"another bone, buried deeper"] {
                file::write(text).expect("it can be written");
                assert_eq!(file::read().as_deref(), Ok(text));
            }
        }
    }
});
