//! Rows of what the kernel does for a program: system calls, memory, processes, switches.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::stopwatch::{fastest, say};

/// The least there is of a system call.
pub(crate) fn system_calls(name: &str) {
    const TIMES: usize = 50_000;
    let calls = || {
        for _ in 0..TIMES {
            // SAFETY: takes nothing and touches nothing.
            black_box(unsafe { libc::syscall(libc::SYS_getppid) });
        }
    };
    say(name, fastest(calls), TIMES, "ns");
}

const PAGE: usize = 4096;

/// Runs `work` on fresh memory, and gives that back.
fn with_mapping(pages: usize, work: impl FnOnce(*mut u8)) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh mapping where the kernel likes.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, access, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    work(at.cast());
    // SAFETY: our own mapping, which nobody uses any more.
    unsafe { libc::munmap(at, pages * PAGE) };
}

/// Touches fresh pages; small ones, whatever the system's habits.
pub(crate) fn page_faults(name: &str) {
    const PAGES: usize = 4000;
    let faults = || {
        with_mapping(PAGES, |at| {
            // SAFETY: advice about our own mapping.
            unsafe { libc::madvise(at.cast(), PAGES * PAGE, libc::MADV_NOHUGEPAGE) };
            for page in 0..PAGES {
                // SAFETY: within the mapping.
                unsafe { at.add(page * PAGE).write_volatile(1) };
            }
        });
    };
    say(name, fastest(faults), PAGES, "us");
}

/// Maps, touches and unmaps one page.
pub(crate) fn mappings(name: &str) {
    const TIMES: usize = 5000;
    let mappings = || {
        for _ in 0..TIMES {
            // SAFETY: within the mapping.
            with_mapping(1, |at| unsafe { at.write_volatile(1) });
        }
    };
    say(name, fastest(mappings), TIMES, "us");
}

/// A signal to this thread, its handler, and back.
pub(crate) fn signals(name: &str) {
    const TIMES: usize = 10_000;
    static TAKEN: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn take(_: libc::c_int) {
        TAKEN.fetch_add(1, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = take;
    // SAFETY: the handler only counts, which a handler may.
    unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
    let signals = || {
        let before = TAKEN.load(Ordering::Relaxed);
        for _ in 0..TIMES {
            // SAFETY: a signal that has a handler.
            unsafe { libc::raise(libc::SIGUSR1) };
        }
        assert_eq!(TAKEN.load(Ordering::Relaxed) - before, TIMES);
    };
    say(name, fastest(signals), TIMES, "us");
}

/// Files that come and go in memory.
pub(crate) fn files(name: &str) {
    const TIMES: usize = 3000;
    let path = "/dev/shm/lguest-rows.file";
    let files = || {
        for _ in 0..TIMES {
            File::create(path).and_then(|_| fs::remove_file(path)).expect("room in /dev/shm");
        }
    };
    say(name, fastest(files), TIMES, "us");
}

/// Keeps this thread, and what it starts, on one CPU: guests have no more, and the host shall
/// not be measured on two.
fn on_one_cpu<T>(work: impl FnOnce() -> T) -> T {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: all zeroes is a set, the empty one; the calls are given sets of ours and their
    // size; a CPU's number is less than a set has room for, or CPU_SET leaves it out.
    let before = unsafe {
        let (mut before, mut one): (libc::cpu_set_t, libc::cpu_set_t) = std::mem::zeroed();
        libc::sched_getaffinity(0, size, &mut before);
        libc::CPU_SET(libc::sched_getcpu().unsigned_abs() as usize, &mut one);
        libc::sched_setaffinity(0, size, &one);
        before
    };
    let done = work();
    // SAFETY: the set of before.
    unsafe { libc::sched_setaffinity(0, size, &before) };
    done
}

/// Two threads that wake each other by futexes, there and back.
pub(crate) fn switches(name: &str) {
    const TIMES: usize = 5000;
    let switches = || {
        let (theirs, over) = (AtomicBool::new(false), AtomicBool::new(false));
        let main = thread::current();
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                while !over.load(Ordering::Acquire) {
                    if theirs.swap(false, Ordering::AcqRel) {
                        main.unpark();
                    }
                    thread::park();
                }
            });
            for _ in 0..TIMES {
                theirs.store(true, Ordering::Release);
                other.thread().unpark();
                while theirs.load(Ordering::Acquire) {
                    thread::park();
                }
            }
            over.store(true, Ordering::Release);
            other.thread().unpark();
        });
    };
    say(name, on_one_cpu(|| fastest(switches)), TIMES, "us");
}

/// A byte to another process and back.
pub(crate) fn round_trips(name: &str) {
    say(name, on_one_cpu(|| fastest(|| bytes(TRIPS))), TRIPS, "us");
}

const TRIPS: usize = 2000;

fn bytes(times: usize) {
    let (mut there, mut to): (PipeReader, PipeWriter) = std::io::pipe().expect("a pipe");
    let (mut from, mut back): (PipeReader, PipeWriter) = std::io::pipe().expect("a pipe");
    // SAFETY: the child reads and writes two descriptors and ends; one thread here.
    let child = unsafe { libc::fork() };
    let mut byte = [0];
    if child == 0 {
        drop(to);
        while there.read_exact(&mut byte).is_ok() && back.write_all(&byte).is_ok() {}
        // SAFETY: the child's end, without the parent's clean-up.
        unsafe { libc::_exit(0) };
    }
    for _ in 0..times {
        to.write_all(&byte).and_then(|()| from.read_exact(&mut byte)).expect("the child answers");
    }
    drop(to);
    // SAFETY: waits for our own child.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
}

/// A process that only ends.
pub(crate) fn forks(name: &str) {
    const TIMES: usize = 50;
    let forks = || {
        for _ in 0..TIMES {
            // SAFETY: the child does nothing but end; this program has one thread here.
            unsafe {
                let child = libc::fork();
                if child == 0 {
                    libc::_exit(0);
                }
                assert_eq!(libc::waitpid(child, std::ptr::null_mut(), 0), child);
            }
        }
    };
    say(name, fastest(forks), TIMES, "us");
}

/// A process that runs a program, this one, which only ends.
pub(crate) fn programs(name: &str) {
    const TIMES: usize = 30;
    let programs = || {
        for _ in 0..TIMES {
            let status = Command::new("/proc/self/exe").arg("child").status();
            assert!(status.is_ok_and(|status| status.success()));
        }
    };
    say(name, fastest(programs), TIMES, "us");
}
