use std::os::fd::{FromRawFd, OwnedFd};

use super::asked::{AROUND, neighbours};
use super::*;
use std::ptr;

const FRAMES: u64 = 64;
const ADDR: u64 = 0x5555_0000_0000;

/// RAM in which each frame begins with its number.
fn ram() -> SharedRam {
    let bytes = (FRAMES << PAGE_SHIFT) as usize;
    // SAFETY: a fresh file, and a fresh mapping that nothing else uses.
    unsafe {
        let file = libc::memfd_create(c"RAM".as_ptr(), libc::MFD_CLOEXEC);
        assert!(file >= 0 && libc::ftruncate(file, bytes as i64) == 0);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(ptr::null_mut(), bytes, access, libc::MAP_SHARED, file, 0);
        assert_ne!(at, libc::MAP_FAILED);
        for frame in 0..FRAMES {
            at.byte_add((frame << PAGE_SHIFT) as usize).cast::<u64>().write(frame);
        }
        libc::munmap(at, bytes);
        SharedRam::new(OwnedFd::from_raw_fd(file), FRAMES as usize)
    }
}

/// What a word of the mirror holds; `None` if it cannot be read. No fault is taken for it.
fn look(mirror: &Mirror, addr: u64) -> Option<u64> {
    let mut word = 0_u64;
    let to = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: 8 };
    let from = libc::iovec { iov_base: addr.wrapping_add(mirror.distance()) as *mut _, iov_len: 8 };
    // SAFETY: the kernel looks whether it may read there, and writes to the word.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &to, 1, &from, 1, 0) };
    (read == 8).then_some(word)
}

fn page(addr: u64, frame: u32, writable: bool) -> Page {
    Page { addr, frame: RamFrame(frame), writable }
}

/// One that serves address space 1 around [`ADDR`].
fn serving() -> Mirror {
    let mut mirror = Mirror::new();
    mirror.prepare();
    assert!(mirror.is_ready() && mirror.wanted(1, ADDR, host_tsc()));
    mirror
}

#[test]
fn what_is_shown_is_there_until_it_is_forgotten() {
    let (ram, mut mirror) = (ram(), serving());
    assert_eq!(look(&mirror, ADDR), None);
    assert!(mirror.show(&ram, page(ADDR + 0x123, 5, true), 3));
    let pages = [0, 1, 2, 3].map(|n| look(&mirror, ADDR + (n << PAGE_SHIFT)));
    assert_eq!(pages, [Some(5), Some(6), Some(7), None]);
    mirror.invalidate(ADDR + 0x1fff, PAGE_SHIFT);
    assert_eq!(look(&mirror, ADDR + 0x1000), None);
    assert_eq!(look(&mirror, ADDR + 0x2000), Some(7));
    // What may have been a large page goes as a whole.
    mirror.invalidate(ADDR, 21);
    assert_eq!([0, 0x2000].map(|at| look(&mirror, ADDR + at)), [None, None]);
    assert_eq!(mirror.guest_address(ADDR.wrapping_add(mirror.distance())), Some(ADDR));
    assert_eq!(mirror.guest_address(ADDR.wrapping_add(mirror.distance()).wrapping_sub(SPAN)), None);
}

#[test]
fn what_has_become_code_is_not_stored_to() {
    let (ram, mut mirror) = (ram(), serving());
    assert!(
        mirror.show(&ram, page(ADDR, 5, true), 2)
            && mirror.show(&ram, page(ADDR + 0x9000, 5, false), 1)
    );
    mirror.drop_writes_to(RamFrame(5));
    assert_eq!([0, 0x1000, 0x9000].map(|at| look(&mirror, ADDR + at)), [None, Some(6), Some(5)]);
    mirror.drop_writes(7, |frame| frame == RamFrame(6));
    assert_eq!([0x1000, 0x9000].map(|at| look(&mirror, ADDR + at)), [None, Some(5)]);
}

#[test]
fn one_address_space_is_served_at_a_time() {
    let (ram, mut mirror) = (ram(), serving());
    assert!(mirror.show(&ram, page(ADDR, 5, true), 1));
    let on = mirror.table(1, true);
    assert!(mirror.table(1, false) != on && mirror.table(2, true) != on);
    // One that takes turns with another does not lose it each time.
    mirror.leaves(1);
    assert!(!mirror.wanted(2, ADDR, host_tsc()) && mirror.serves(1));
    let later = host_tsc() + 2 * ADVANCE;
    assert!(mirror.wanted(2, ADDR, later) && !mirror.serves(1));
    assert_eq!((mirror.table(2, true), look(&mirror, ADDR)), (on, None));
    mirror.forget();
    assert!(!mirror.serves(2) && mirror.table(2, true) != on);
}

#[test]
fn spans_that_are_not_a_users_have_no_window() {
    let mut mirror = serving();
    for addr in [1 << 47, 0x7fff_ffff_ffff_f000, 0xffff_8000_0000_0000, u64::MAX] {
        assert!(!mirror.wanted(1, addr, host_tsc()), "{addr:#x}");
        let entry = (mirror.table(1, true) + (addr >> SPAN_SHIFT)) as *const u8;
        // SAFETY: the tables have an entry for each span there can be.
        assert_eq!(unsafe { entry.read_volatile() }, 0);
    }
    // More than there can be at once.
    for span in [1, 2, 3, 4, 5] {
        assert!(mirror.wanted(1, span << SPAN_SHIFT, host_tsc()) || mirror.windows.len() < 4);
    }
    assert!(mirror.windows.len() <= MOST_WINDOWS);
}

#[test]
fn spans_beside_each_other_have_windows_beside_each_other() {
    // The middle one last, and first.
    for spans in [[7, 9, 8], [8, 7, 9]] {
        let (ram, mut mirror) = (ram(), Mirror::new());
        mirror.prepare();
        let at = |span: u64| span << SPAN_SHIFT;
        assert!(spans.iter().all(|span| mirror.wanted(1, at(*span), host_tsc())));
        for (frame, span) in (5..).zip(spans) {
            let last = at(span + 1) - PAGE_SIZE;
            assert!(mirror.show(&ram, page(at(span), frame, true), 1));
            assert!(mirror.show(&ram, page(last, frame + 10, true), 1));
        }
        for (frame, span) in (5..).zip(spans) {
            let last = at(span + 1) - PAGE_SIZE;
            assert_eq!([at(span), last].map(|at| look(&mirror, at)), [frame, frame + 10].map(Some));
        }
        mirror.hide_all();
        let ends = spans.map(|span| [look(&mirror, at(span)), look(&mirror, at(span + 1) - 8)]);
        assert_eq!(ends, [[None; 2]; 3]);
    }
}

#[test]
fn windows_move_to_where_another_fits() {
    // The same process, and the next one, which does not need what the first had.
    for (next, later) in [(1, 0), (2, 2 * ADVANCE)] {
        let (ram, mut mirror) = (ram(), Mirror::new());
        mirror.prepare();
        let first = 7 << SPAN_SHIFT;
        assert!(mirror.wanted(1, first, host_tsc()));
        assert!(mirror.show(&ram, page(first, 5, true), 1));
        let before = mirror.distance();
        // Something of the host's is where the other one's would be. Where nothing else is yet,
        // the other tests' windows among it, is another place each time.
        let (span, taken) = (9..SPANS)
            .find_map(|span| {
                let at = (span << SPAN_SHIFT).wrapping_add(before);
                Some((span, Reserved::at(at, PAGE_SIZE as usize)?))
            })
            .expect("there is room");
        let other = span << SPAN_SHIFT;
        assert!(mirror.wanted(next, other, host_tsc() + later));
        assert!(mirror.distance() != before && mirror.has_retired());
        // What was shown is asked for again, where it may be.
        let kept = next == 1;
        assert!(look(&mirror, other).is_none() && !(kept && look(&mirror, first).is_some()));
        assert!(mirror.show(&ram, page(other, 6, true), 1));
        assert_eq!(mirror.show(&ram, page(first, 7, true), 1), kept);
        assert!(look(&mirror, other) == Some(6) && (!kept || look(&mirror, first) == Some(7)));
        drop(taken);
    }
}

#[test]
fn room_that_was_not_there_is_not_looked_for_at_once() {
    let mut mirror = Mirror::new();
    mirror.prepare();
    assert!(mirror.wanted(1, 0x1000, 0));
    // As far from each other as the host's own ends: no distance is right for both.
    let last = (SPANS - 1) << SPAN_SHIFT;
    for (now, looked) in
        [(100, 100), (101, 100), (99 + CROWDED, 100), (200 + CROWDED, 200 + CROWDED)]
    {
        assert!(!mirror.wanted(1, last, now));
        assert_eq!(mirror.crowded, Some(looked));
        // What there is stays.
        assert!(mirror.wanted(1, 0x1000, now) && mirror.serves(1));
    }
}

#[test]
fn what_costs_too_much_pauses() {
    let mut mirror = serving();
    let now = host_tsc();
    for _ in 0..ADVANCE / AT_ONCE + SHARE {
        mirror.spent(now.wrapping_sub(4 * ADVANCE));
    }
    assert!(!mirror.serves(1) && !mirror.wanted(1, ADDR, host_tsc()));
    assert!(mirror.wanted(1, ADDR, now + 64 * ADVANCE) && mirror.serves(1));
}

#[test]
fn neighbours_are_counted_within_the_span() {
    let all = |addr: u64| addr >> PAGE_SHIFT != 0x20;
    assert_eq!(neighbours(0x2_2000, all), (1, AROUND));
    assert_eq!(neighbours(SPAN, |_| true), (0, AROUND));
}

#[test]
fn a_fault_that_the_host_has_interrupted_does_not_cost_all_there_is() {
    let mut budget = Budget::default();
    budget.spend(1 << 40);
    assert!(budget.has_room(0));
    for _ in 1..ADVANCE / AT_ONCE {
        budget.spend(1 << 40);
    }
    assert!(!budget.has_room(0));
    assert!(!budget.has_room(SHARE - 1) && budget.has_room(SHARE));
}
