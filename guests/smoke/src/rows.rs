//! Rows of a comparison: what user space costs, on whatever runs it.
//!
//! `smoke rows` prints `measured NAME NUMBER UNIT`, less being better, and is run on the
//! host too. Each row is the best of a few turns, so that one interruption does not show.

use std::hint::black_box;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::process::Command;
use std::time::Instant;

/// Turns of each row, of which the fastest counts.
const TURNS: usize = 3;
/// Bytes hashed, words sorted, roots taken.
const HASHED: usize = 20 << 20;
const SORTED: usize = 1 << 20;
const ROOTS: u32 = 5_000_000;

/// Seconds that the fastest of some turns takes; each begins with what `prepare` makes.
fn best<T>(prepare: impl Fn() -> T, mut turn: impl FnMut(T)) -> f64 {
    let times = (0..TURNS).map(|_| {
        let given = prepare();
        let start = Instant::now();
        turn(given);
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

fn say(name: &str, seconds: f64, times: usize, unit: &str) {
    let scale = match unit {
        "ns" => 1e9,
        "us" => 1e6,
        _ => 1e3,
    };
    println!("measured {name} {:.2} {unit}", seconds * scale / times as f64);
}

/// Prints all rows.
pub(crate) fn measure() {
    say("getppid", best(|| (), |()| system_calls(100_000)), 100_000, "ns");
    let data: Vec<u8> = (0..HASHED).map(|i| (i * 7) as u8).collect();
    say("fnv", best(|| (), |()| _ = black_box(fnv(&data))), 1, "ms");
    say("shell-sort", best(shuffled, |mut words| shell_sort(&mut words)), 1, "ms");
    say("square-roots", best(|| (), |()| _ = black_box(square_roots())), 1, "ms");
    say("copy-256-MiB", best(|| (), |()| copies()), 1, "ms");
    say("page-fault", best(|| (), |()| page_faults(4000)), 4000, "us");
    say("fork", best(|| (), |()| forks(50)), 50, "us");
    say("fork-exec", best(|| (), |()| programs(30)), 30, "us");
    say("pipe-round-trip", best(|| (), |()| round_trips(2000)), 2000, "us");
}

fn system_calls(times: usize) {
    for _ in 0..times {
        // SAFETY: takes nothing and touches nothing.
        black_box(unsafe { libc::syscall(libc::SYS_getppid) });
    }
}

/// Fowler, Noll and Vo's hash, byte by byte.
fn fnv(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

fn shuffled() -> Vec<u32> {
    let mut next = 1_u32;
    let word = || {
        next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        next
    };
    std::iter::repeat_with(word).take(SORTED).collect()
}

fn shell_sort(words: &mut [u32]) {
    let mut gap = words.len() / 2;
    while gap > 0 {
        for i in gap..words.len() {
            let (word, mut at) = (words[i], i);
            while at >= gap && words[at - gap] > word {
                words[at] = words[at - gap];
                at -= gap;
            }
            words[at] = word;
        }
        gap /= 2;
    }
    assert!(words.is_sorted());
}

fn square_roots() -> f64 {
    (1..ROOTS).fold(1.0, |sum, i| (sum + f64::from(i)).sqrt() / 1.0001)
}

fn copies() {
    let from = vec![1_u8; 4 << 20];
    let mut to = vec![0; from.len()];
    for _ in 0..64 {
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
    }
}

/// Touches fresh pages; small ones, whatever the system's habits.
fn page_faults(pages: usize) {
    const PAGE: usize = 4096;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh mapping, used within its bounds and given back.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), pages * PAGE, access, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        libc::madvise(at, pages * PAGE, libc::MADV_NOHUGEPAGE);
        for page in 0..pages {
            at.cast::<u8>().add(page * PAGE).write_volatile(1);
        }
        libc::munmap(at, pages * PAGE);
    }
}

fn forks(times: usize) {
    for _ in 0..times {
        // SAFETY: the child does nothing but end; this program has one thread here.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(0);
            }
            assert_eq!(libc::waitpid(child, std::ptr::null_mut(), 0), child);
        }
    }
}

fn programs(times: usize) {
    for _ in 0..times {
        let status = Command::new("/proc/self/exe").args(["child", "0"]).status();
        assert!(status.is_ok_and(|status| status.success()));
    }
}

fn round_trips(times: usize) {
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
