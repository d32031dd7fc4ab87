//! GDT, task state and IDT. Selectors are lguest's numbers, with ring 0 for ring 1.

use core::arch::asm;
use core::cell::UnsafeCell;

use pvops::families::types::{TablePointer, Tss};

use crate::boot::phys_of;
use crate::trap::{self, vector};

/// Kernel code.
pub(crate) const KERNEL_CS: u16 = 8;
const KERNEL_DS: u16 = 0x10;
const TASK: u16 = 0x30;
const CODE: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const DPL3: u64 = 3 << 45;
/// A present 64-bit task state, of 104 bytes.
const TASK_LIMIT: u64 = 103;
const TASK_TYPE: u64 = 0x89 << 40;
/// A present interrupt gate.
const GATE: u64 = 0x8e << 40;

/// The task state: RSP0 for entries from users, and the stack that frames begin on.
#[derive(Debug)]
#[repr(C, packed(4))]
pub(crate) struct TaskState {
    reserved: u32,
    rsp: [u64; 3],
    reserved1: u64,
    interrupt_stacks: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    io_map: u16,
}

#[repr(C, align(16))]
pub(crate) struct Cell<T>(UnsafeCell<T>);
// SAFETY: the CPU's tables, written by the only CPU there is, with interrupts off.
unsafe impl<T> Sync for Cell<T> {}

pub(crate) static TASK_STATE: Cell<TaskState> = Cell(UnsafeCell::new(TaskState {
    reserved: 0,
    rsp: [0; 3],
    reserved1: 0,
    interrupt_stacks: [0; 7],
    reserved2: 0,
    reserved3: 0,
    io_map: TASK_LIMIT as u16 + 1,
}));
static GDT: Cell<[u64; 8]> =
    Cell(UnsafeCell::new([0, CODE, DATA, 0, DATA | DPL3, CODE | DPL3, 0, 0]));
static IDT: Cell<[[u64; 2]; 256]> = Cell(UnsafeCell::new([[0; 2]; 256]));
/// Two stacks for the beginnings of frames: everybody's, and the double fault's.
static STACKS: Cell<[[u8; 4096]; 2]> = Cell(UnsafeCell::new([[0; 4096]; 2]));

/// For `load_sp0`.
pub(crate) fn task_state() -> *mut Tss {
    TASK_STATE.0.get().cast()
}

/// The page tables that the entry has made.
pub(crate) fn first_tables() -> u64 {
    let top: u64;
    // SAFETY: it only reads.
    unsafe { asm!("mov {}, cr3", out(reg) top, options(nomem, nostack)) };
    top
}

/// Loads GDT and task state.
pub(crate) fn load() {
    let state = TASK_STATE.0.get().expose_provenance() as u64;
    let stacks = STACKS.0.get().expose_provenance() as u64;
    let low = TASK_LIMIT | (state & 0xff_ffff) << 16 | TASK_TYPE | (state >> 24 & 0xff) << 56;
    let pointer = TablePointer { limit: 63, base: GDT.0.get().expose_provenance() as u64 };
    // SAFETY: nobody uses the tables yet; descriptors are right, so the code goes on in the
    // same memory.
    unsafe {
        (*TASK_STATE.0.get()).interrupt_stacks = [stacks + 4096, stacks + 8192, 0, 0, 0, 0, 0];
        (*GDT.0.get())[6] = low;
        (*GDT.0.get())[7] = state >> 32;
        asm!(
            "lgdt [{pointer}]",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2: mov ss, {data:e}",
            "mov ds, {data:e}",
            "mov es, {data:e}",
            "ltr {task:x}",
            pointer = in(reg) &raw const pointer,
            code = const KERNEL_CS,
            data = in(reg) u64::from(KERNEL_DS),
            task = in(reg) u64::from(TASK),
            scratch = out(reg) _,
        );
    }
}

/// Loads the IDT: each vector's stub, on the first interrupt stack.
pub(crate) fn load_gates() {
    for number in 0..vector::LAST {
        let at = trap::stub(number);
        // The double fault comes where there may be no other stack.
        let stack: u64 = if number == 8 { 2 } else { 1 };
        let users = if number == vector::BREAKPOINT { DPL3 } else { 0 };
        let low = at & 0xffff
            | u64::from(KERNEL_CS) << 16
            | stack << 32
            | GATE
            | users
            | (at >> 16 & 0xffff) << 48;
        // SAFETY: the IDT is not loaded yet.
        unsafe { (*IDT.0.get())[number] = [low, at >> 32] };
    }
    let pointer = TablePointer { limit: 4095, base: IDT.0.get().expose_provenance() as u64 };
    // SAFETY: the table is whole.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer) };
    debug_assert!(phys_of(IDT.0.get()) != 0);
}
