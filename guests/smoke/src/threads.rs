//! Threads: futexes, locked instructions and per-thread vector state, under contention.

use crate::{Outcome, ensure};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::Duration;

const THREADS: usize = 4;

/// A mutex fought over by four threads loses no increment.
pub fn mutex() -> Outcome {
    const EACH: u64 = 5_000;
    let total = Mutex::new(0u64);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for step in 0..EACH {
                    *total.lock().unwrap() += 1;
                    if step % 512 == 0 {
                        thread::yield_now();
                    }
                }
            });
        }
    });
    let total = *total.lock().unwrap();
    ensure!(total == EACH * THREADS as u64, "{total} increments, not {}", EACH * THREADS as u64);
    Ok(())
}

/// Two threads pass a ball a few hundred times by condition variable.
pub fn condvar() -> Outcome {
    const PASSES: u32 = 400;
    let ball = (Mutex::new(0u32), Condvar::new());
    let lost = AtomicUsize::new(0);
    thread::scope(|scope| {
        for player in 0..2 {
            let (ball, lost) = (&ball, &lost);
            scope.spawn(move || {
                let mut count = ball.0.lock().unwrap();
                while *count < PASSES {
                    if *count % 2 == player {
                        *count += 1;
                        ball.1.notify_all();
                    } else {
                        let (guard, timeout) =
                            ball.1.wait_timeout(count, Duration::from_secs(20)).unwrap();
                        count = guard;
                        if timeout.timed_out() {
                            lost.fetch_add(1, Ordering::SeqCst);
                            return;
                        }
                    }
                }
            });
        }
    });
    ensure!(lost.into_inner() == 0, "a wake-up was lost");
    ensure!(ball.0.into_inner().unwrap() == PASSES, "the ball was not passed {PASSES} times");
    Ok(())
}

/// `lock xadd`, `lock cmpxchg`, `xchg` and the bit operations are atomic between threads, and
/// stores are seen in the order they were made.
pub fn atomics() -> Outcome {
    const EACH: u64 = 10_000;
    let added = AtomicU64::new(0);
    let exchanged = AtomicU64::new(0);
    let toggled = AtomicU64::new(0);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (added, exchanged, toggled) = (&added, &exchanged, &toggled);
            scope.spawn(move || {
                for _ in 0..EACH {
                    added.fetch_add(3, Ordering::Relaxed);
                    let _ = exchanged.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |x| {
                        Some(black_box(x) + 5)
                    });
                    toggled.fetch_xor(1 << thread, Ordering::Relaxed);
                }
            });
        }
    });
    let threads = THREADS as u64;
    ensure!(added.into_inner() == 3 * EACH * threads, "lock xadd lost additions");
    ensure!(exchanged.into_inner() == 5 * EACH * threads, "lock cmpxchg lost additions");
    ensure!(toggled.into_inner() == 0, "lock xor lost a toggle");

    // Message passing: whoever sees the flag sees the data.
    let (data, flag) = (AtomicU64::new(0), AtomicU64::new(0));
    let wrong = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..=EACH {
                data.store(n, Ordering::Relaxed);
                flag.store(n, Ordering::Release);
            }
        });
        scope.spawn(|| {
            let mut seen = 0;
            while seen < EACH {
                seen = flag.load(Ordering::Acquire);
                if data.load(Ordering::Relaxed) < seen {
                    wrong.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    });
    ensure!(wrong.into_inner() == 0, "a store overtook an earlier one");
    Ok(())
}

/// Each thread's vector and x87 state is its own across context switches.
pub fn float_state_is_private() -> Outcome {
    let results: Vec<f64> = thread::scope(|scope| {
        let handles: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || {
                    let mut value = [thread as f64; 8];
                    for step in 0..3_000u32 {
                        for (lane, v) in value.iter_mut().enumerate() {
                            *v = black_box(*v) + lane as f64;
                        }
                        if step % 100 == 0 {
                            thread::yield_now();
                        }
                    }
                    value.iter().sum()
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap_or(f64::NAN)).collect()
    });
    for (thread, sum) in results.into_iter().enumerate() {
        let want = 8.0 * thread as f64 + 3_000.0 * 28.0;
        ensure!(sum == want, "thread {thread} summed to {sum}, not {want}");
    }
    Ok(())
}
