//! Hypercalls, and the ring in which they may wait for each other.
//!
//! A direct call costs a trap. [`later`] puts a call into the ring if somebody is making a
//! batch ([`begin_batch`]); the next direct call carries all of them out.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::ptr::{addr_of, addr_of_mut};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, compiler_fence};

pub use lguest_abi::long::call::{Call, FlushScope, GateKind, ShutdownReason};
use lguest_abi::long::entry::DIRECT_MAP;
use lguest_abi::long::feature;
use lguest_abi::long::shared_data::{RING_SLOTS, SharedData};
pub use lguest_abi::long::{Phys, Virt};
use pvops::backend::lguest::SHARED as IRQ_WORDS;

use crate::boot::phys_of;
use crate::{irq, trap};

#[repr(C, align(4096))]
struct Page(UnsafeCell<SharedData>);
// SAFETY: every access is a volatile one of a single field; the ring's are made with
// interrupts off.
unsafe impl Sync for Page {}
static PAGE: Page = Page(UnsafeCell::new(SharedData::new()));

/// Makes the call now. All registers but none are changed by it; memory is, as it says.
pub fn call(call: Call) {
    let words = call.encode();
    let [a, b, c, d] = words.args;
    // SAFETY: the caller means what it says; the host keeps all registers.
    unsafe {
        asm!("int 0x1f", in("rax") words.number, in("rdi") a, in("rsi") b, in("rdx") c, in("rcx") d)
    };
}

/// The first call: tells the host of the shared data.
pub(crate) fn introduce(offered: u64) {
    let data = PAGE.0.get();
    // SAFETY: nobody else knows the page yet.
    unsafe {
        (*data).features = offered & (feature::BUS | feature::CLOCK);
        (*data).irq_words = phys_of(&raw const IRQ_WORDS);
        (*data).noirq_iret = trap::guarded_iretq();
        (*data).kernel_address = DIRECT_MAP;
    }
    call(Call::Init { data: Phys(phys_of(data)) });
}

/// The shared data, of which the host writes some at any time.
pub(crate) fn shared() -> *mut SharedData {
    PAGE.0.get()
}

static BATCHING: AtomicBool = AtomicBool::new(false);

/// Puts a call into the ring.
pub fn queue(call: Call) {
    let words = call.encode();
    irq::without(|| {
        let data = PAGE.0.get();
        // SAFETY: the fields of our own page; interrupts are off, so the ring is ours.
        unsafe {
            let tail = addr_of!((*data).ring_tail).read_volatile();
            let head = addr_of!((*data).ring_head).read_volatile();
            if tail.wrapping_sub(head) as usize == RING_SLOTS {
                self::call(Call::FlushAsync);
            }
            let [a, b, c, d] = words.args;
            let slot = addr_of_mut!((*data).ring[tail as usize % RING_SLOTS]);
            slot.write_volatile([words.number, a, b, c, d]);
            // The host looks at the slot only when the tail says so.
            compiler_fence(Ordering::Release);
            addr_of_mut!((*data).ring_tail).write_volatile(tail.wrapping_add(1));
        }
    });
}

/// Makes a call now, or with others if a batch is being made.
pub fn later(call: Call) {
    if BATCHING.load(Ordering::Relaxed) { queue(call) } else { self::call(call) }
}

/// From here on [`later`] means later.
pub fn begin_batch() {
    BATCHING.store(true, Ordering::Relaxed);
}

/// All that was to be done later is done.
pub fn end_batch() {
    BATCHING.store(false, Ordering::Relaxed);
    call(Call::FlushAsync);
}

/// Carries out what a batch has so far, if one is being made: its maker does not run for a while,
/// and others make their calls at once meanwhile. Says whether, for [`resume_batch`].
pub(crate) fn pause_batch() -> bool {
    let batching = BATCHING.load(Ordering::Relaxed);
    if batching {
        end_batch();
    }
    batching
}

/// Its maker runs again, and goes on with the batch if there was one.
pub(crate) fn resume_batch(batching: bool) {
    BATCHING.store(batching, Ordering::Relaxed);
}

/// `SEND_INTERRUPTS` for pvops' interrupt ops, which keep every register: so does the host.
#[unsafe(naked)]
pub(crate) extern "sysv64" fn send_interrupts() {
    core::arch::naked_asm!("push rax", "mov eax, 19", "int 0x1f", "pop rax", "ret")
}

static BUS: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

pub(crate) fn set_bus(at: u64, len: u64) {
    let [start, bytes] = &BUS;
    start.store(at, Ordering::Relaxed);
    bytes.store(len, Ordering::Relaxed);
}

/// The bus' physical address, and its length: 0 if there is none.
pub(crate) fn bus() -> (u64, u64) {
    let [start, bytes] = &BUS;
    (start.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed))
}

const _: () = assert!(offset_of!(SharedData, irq_words) == 24);
