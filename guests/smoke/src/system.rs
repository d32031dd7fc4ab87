//! The kernel's services: system calls in number, `/proc`, and time.

use crate::{Outcome, ensure};
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Twenty thousand system calls in a row give the same answer.
pub fn many_syscalls() -> Outcome {
    let pid = std::process::id();
    for _ in 0..20_000 {
        // SAFETY: getpid has no arguments and no effects.
        let got = unsafe { libc::syscall(libc::SYS_getpid) };
        ensure!(got == i64::from(pid), "getpid is {got}, was {pid}");
    }
    // SAFETY: no such system call; the kernel says ENOSYS and does nothing.
    let got = unsafe { libc::syscall(0xfff) };
    ensure!(got == -1, "a system call that does not exist returned {got}");
    Ok(())
}

/// `/proc` is there and makes sense: processors, memory, our own maps.
pub fn proc_files() -> Outcome {
    let read = |path| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let processors = read("/proc/cpuinfo")?.matches("processor\t:").count();
    let online = thread::available_parallelism().map_or(0, usize::from);
    ensure!(processors >= online && online > 0, "{processors} processors, {online} usable");

    let memory = read("/proc/meminfo")?;
    let field = |name: &str| {
        let line = memory.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let (total, free) = (field("MemTotal:"), field("MemFree:"));
    ensure!(total > free && free > Some(0), "MemTotal {total:?}, MemFree {free:?}");

    let here = proc_files as *const () as usize;
    let mapped = read("/proc/self/maps")?.lines().any(|line| {
        let mut ends = line.split_whitespace().next().unwrap_or("").split('-');
        let mut end = || usize::from_str_radix(ends.next()?, 16).ok();
        matches!((end(), end()), (Some(from), Some(to)) if (from..to).contains(&here))
            && line.contains("r-xp")
    });
    ensure!(mapped, "this function is in no executable line of /proc/self/maps");
    Ok(())
}

/// The monotonic clock never steps back, on one thread or between threads, and agrees with
/// the kernel's answer by system call (the vDSO reads the clock without one).
pub fn time_never_goes_back() -> Outcome {
    let start = Instant::now();
    let nanos = || start.elapsed().as_nanos() as u64;
    let latest = AtomicU64::new(0);
    let worst = thread::scope(|scope| {
        let handles: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut worst = 0u64;
                    for step in 0..5_000u32 {
                        // What another thread has published was read before now.
                        let before = latest.load(Ordering::SeqCst);
                        let now = nanos();
                        worst = worst.max(before.saturating_sub(now));
                        latest.fetch_max(now, Ordering::SeqCst);
                        if step % 500 == 0 {
                            thread::yield_now();
                        }
                    }
                    worst
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap_or(u64::MAX)).max()
    });
    ensure!(worst == Some(0), "time went back by {worst:?} ns between threads");

    for _ in 0..200 {
        let before = clock_by_vdso();
        let between = clock_by_syscall();
        let after = clock_by_vdso();
        ensure!(
            before <= between && between <= after,
            "the vDSO and the kernel disagree: {before:?} {between:?} {after:?}"
        );
    }
    Ok(())
}

fn clock_by_vdso() -> (i64, i64) {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    (time.tv_sec, time.tv_nsec)
}

fn clock_by_syscall() -> (i64, i64) {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live timespec.
    unsafe { libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &mut time) };
    (time.tv_sec, time.tv_nsec)
}

/// Sleeping takes at least as long as asked, and not for ever.
pub fn sleep_takes_its_time() -> Outcome {
    let start = Instant::now();
    thread::sleep(Duration::from_millis(50));
    let took = start.elapsed();
    ensure!(took >= Duration::from_millis(50), "50 ms of sleep took {took:?}");
    ensure!(took < Duration::from_secs(10), "50 ms of sleep took {took:?}");
    Ok(())
}
