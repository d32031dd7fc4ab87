//! Ticks by the time-stamp counter, instructions by single steps.

use super::styles::Caller;
use core::arch::x86_64::{__rdtscp, _mm_lfence};
use std::sync::atomic::{AtomicU64, Ordering};

/// The counter, after everything before it and before everything after it.
pub(crate) fn now() -> u64 {
    let mut aux = 0;
    // SAFETY: every x86-64 CPU of this decade has both.
    unsafe {
        let ticks = __rdtscp(&mut aux);
        _mm_lfence();
        ticks
    }
}

/// Best and median of several runs, in ticks a round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticks {
    pub(crate) best: f64,
    pub(crate) median: f64,
}

/// Runs all callers in turn, so that a slow moment of the machine hits all of them.
pub(crate) fn ticks(callers: &[Caller], rounds: u64, runs: usize) -> Vec<Ticks> {
    let mut times = vec![vec![]; callers.len()];
    for _ in 0..runs {
        for (caller, times) in callers.iter().zip(&mut times) {
            let mut p = [7; 16];
            p[15] = rounds;
            let start = now();
            caller(&mut p);
            times.push((now() - start) as f64 / rounds as f64);
        }
    }
    times
        .into_iter()
        .map(|mut times| {
            times.sort_by(f64::total_cmp);
            Ticks { best: times[0], median: times[times.len() / 2] }
        })
        .collect()
}

static STEPS: AtomicU64 = AtomicU64::new(0);

extern "C" fn step(_: i32) {
    STEPS.fetch_add(1, Ordering::Relaxed);
}

/// Instructions that a function executes, by the trap flag.
pub(crate) fn steps(function: *const (), argument: *mut ()) -> u64 {
    // SAFETY: the handler counts; the trap flag is set for the call and cleared after it.
    unsafe {
        libc::signal(libc::SIGTRAP, step as *const () as libc::sighandler_t);
        STEPS.store(0, Ordering::Relaxed);
        core::arch::asm!(
            "pushfq",
            "or dword ptr [rsp], 0x100",
            "popfq",
            "call {function}",
            "pushfq",
            "and dword ptr [rsp], 0xfffffeff",
            "popfq",
            function = in(reg) function,
            in("rdi") argument,
            clobber_abi("sysv64"),
        );
    }
    STEPS.load(Ordering::Relaxed)
}

/// Instructions a round.
pub(crate) fn instructions(caller: Caller) -> f64 {
    let steps = |rounds| {
        let mut p = [7u64; 16];
        p[15] = rounds;
        steps(caller as *const (), (&raw mut p).cast())
    };
    (steps(100) - steps(50)) as f64 / 50.0
}

/// Ticks of the counter in a nanosecond.
pub(crate) fn ticks_a_ns() -> f64 {
    let (start, ticks) = (std::time::Instant::now(), now());
    std::thread::sleep(std::time::Duration::from_millis(20));
    let ticks = (now() - ticks) as f64;
    ticks / start.elapsed().as_nanos() as f64
}
