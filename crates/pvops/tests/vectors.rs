//! Thunks that keep vector registers, run on this machine's own CPU: around a callee that
//! fills every vector and mask register with ones, upper halves too, every bit of the
//! caller's must be what it was. Where the CPU lacks the registers, the test says so.

use core::arch::global_asm;
use pvops::dynamic::{DynamicThunk, SaveSet, Vectors};
use pvops::{CallKind, RegSet, Width, convention, probe};
use std::io::Write as _;
use std::mem::offset_of;

/// Vector registers around one call, as the widest set has them.
#[repr(C, align(64))]
struct Frame {
    before: [[u8; 64]; 32],
    after: [[u8; 64]; 32],
    masks_before: [u64; 8],
    masks_after: [u64; 8],
    target: *const u8,
}

global_asm!(
    // RDI: the frame. RBX is kept by every callee, so it remembers.
    ".pushsection .text.pvops_vectors, \"ax\", @progbits",
    ".globl pvops_run_ymm",
    "pvops_run_ymm:",
    "push rbx",
    "mov rbx, rdi",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovups ymm\\n, [rbx + {before} + 64 * \\n]",
    ".endr",
    "call [rbx + {target}]",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovups [rbx + {after} + 64 * \\n], ymm\\n",
    ".endr",
    "vzeroupper",
    "pop rbx",
    "ret",
    ".globl pvops_run_zmm",
    "pvops_run_zmm:",
    "push rbx",
    "mov rbx, rdi",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64 zmm\\n, [rbx + {before} + 64 * \\n]",
    ".endr",
    ".irp n, 0,1,2,3,4,5,6,7",
    "kmovq k\\n, [rbx + {masks_before} + 8 * \\n]",
    ".endr",
    "call [rbx + {target}]",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64 [rbx + {after} + 64 * \\n], zmm\\n",
    ".endr",
    ".irp n, 0,1,2,3,4,5,6,7",
    "kmovq [rbx + {masks_after} + 8 * \\n], k\\n",
    ".endr",
    "vzeroupper",
    "pop rbx",
    "ret",
    // The callees: all vector registers, then all general ones that the convention lets
    // them trash. The result is how far the stack was from its alignment.
    ".globl pvops_trash_ymm",
    "pvops_trash_ymm:",
    "endbr64",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vcmptrueps ymm\\n, ymm\\n, ymm\\n",
    ".endr",
    "jmp 9f",
    ".globl pvops_trash_zmm",
    "pvops_trash_zmm:",
    "endbr64",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vpternlogd zmm\\n, zmm\\n, zmm\\n, 0xff",
    ".endr",
    ".irp n, 0,1,2,3,4,5,6,7",
    "kxnorq k\\n, k\\n, k\\n",
    ".endr",
    "9:",
    ".irp r, rcx, rdx, rsi, rdi, r8, r9, r10, r11",
    "mov \\r, -1",
    ".endr",
    "lea rax, [rsp + 8]",
    "and eax, 15",
    "ret",
    ".popsection",
    before = const offset_of!(Frame, before),
    after = const offset_of!(Frame, after),
    masks_before = const offset_of!(Frame, masks_before),
    masks_after = const offset_of!(Frame, masks_after),
    target = const offset_of!(Frame, target),
);

unsafe extern "sysv64" {
    fn pvops_run_ymm(frame: *mut Frame) -> u64;
    fn pvops_run_zmm(frame: *mut Frame) -> u64;
    fn pvops_trash_ymm();
    fn pvops_trash_zmm();
}

impl Frame {
    /// Different bytes in every place of every register, none of them all ones.
    fn new(target: *const u8) -> Box<Self> {
        let byte = |register: usize, i: usize| (register * 64 + i).wrapping_mul(167) as u8 & 0x7f;
        Box::new(Self {
            before: std::array::from_fn(|r| std::array::from_fn(|i| byte(r, i))),
            after: [[0; 64]; 32],
            masks_before: std::array::from_fn(|k| 0x0123_4567_89ab_cdef_u64.rotate_left(k as u32)),
            masks_after: [0; 8],
            target,
        })
    }

    /// How many of the first registers, and of the masks, differ in their first bytes.
    fn lost(&self, registers: usize, bytes: usize) -> (usize, usize) {
        let pairs = self.before.iter().zip(&self.after).take(registers);
        let vectors = pairs.filter(|(before, after)| before[..bytes] != after[..bytes]).count();
        let masks = self.masks_before.iter().zip(&self.masks_after).filter(|(b, a)| b != a).count();
        (vectors, masks)
    }
}

/// A page to execute thunks in.
struct Page(*mut u8);

impl Page {
    const LEN: usize = 4096;

    /// A thunk around `target`, far from it or near as the system maps.
    fn with_thunk(target: *const u8, vectors: Vectors) -> Self {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh page of our own; made executable only when nobody writes it any
        // more, and never run before.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let page = libc::mmap(std::ptr::null_mut(), Self::LEN, rw, flags, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            let memory = std::slice::from_raw_parts_mut(page.cast::<u8>(), Self::LEN);
            let width = Width::Bits64;
            let saves = SaveSet { vectors, ..SaveSet::callee_save(width) };
            let thunk = DynamicThunk { width, saves, target: target as u64 };
            thunk.write(memory, page as u64).expect("written");
            let rx = libc::PROT_READ | libc::PROT_EXEC;
            assert_eq!(libc::mprotect(page, Self::LEN, rx), 0);
            Self(page.cast())
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: our own page; nobody runs there any more.
        unsafe { libc::munmap(self.0.cast(), Self::LEN) };
    }
}

/// One set: bare, the callee changes everything; behind the thunk, nothing.
fn check(
    run: unsafe extern "sysv64" fn(*mut Frame) -> u64,
    callee: unsafe extern "sysv64" fn(),
    vectors: Vectors,
    (registers, bytes, masks): (usize, usize, usize),
) {
    let target = callee as *const u8;
    let page = Page::with_thunk(target, vectors);
    let call = |target: *const u8| {
        let mut frame = Frame::new(target);
        // SAFETY: the caller looked whether the CPU has the registers; both targets return
        // and keep RBX.
        let misaligned = unsafe { run(&raw mut *frame) };
        assert_eq!(misaligned, 0, "{vectors:?}: the callee's stack");
        frame
    };
    assert_eq!(call(target).lost(registers, bytes).0, registers, "the callee trashes them all");
    if masks > 0 {
        assert_eq!(call(target).lost(registers, bytes).1, masks, "and the masks");
    }
    let kept = call(page.0);
    let lost = kept.lost(registers, bytes);
    assert_eq!(lost.0, 0, "{vectors:?}: {:x?} became {:x?}", kept.before, kept.after);
    if masks > 0 {
        assert_eq!(lost.1, 0, "{:x?} became {:x?}", kept.masks_before, kept.masks_after);
    }
    // SAFETY: a thunk around a callee that takes nothing and returns.
    let found = unsafe { probe::observe(page.0.cast(), &[1, 2, 3, 4, 5, 6]) };
    let may = convention::NATIVE.clobbers(CallKind::CalleeSave);
    assert_eq!((found.changed, found.vectors), (may, 0), "{vectors:?}");
    // The set of one size less would not have done.
    let smaller = match vectors {
        Vectors::Zmm => Vectors::Ymm,
        _ => Vectors::Xmm,
    };
    let page = Page::with_thunk(target, smaller);
    assert_eq!(call(page.0).lost(registers, bytes).0, registers, "{smaller:?} is not enough");
    assert_eq!(RegSet::EMPTY, found.changed.minus(may));
}

/// Past the test harness, which shows nothing of tests that pass.
fn say_skipped(what: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: this CPU has no {what} registers");
}

#[test]
fn ymm_registers_survive_whole() {
    if !is_x86_feature_detected!("avx") {
        return say_skipped("YMM");
    }
    check(pvops_run_ymm, pvops_trash_ymm, Vectors::Ymm, (16, 32, 0));
}

#[test]
fn zmm_and_mask_registers_survive_whole() {
    if !(is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")) {
        return say_skipped("ZMM");
    }
    check(pvops_run_zmm, pvops_trash_zmm, Vectors::Zmm, (32, 64, 8));
}
