//! puppy: a small kernel, and a place to begin your own.
//!
//! It has threads that are preempted, programs in user mode with memory of their own, a file
//! on a disk, and a shell. `lguest-guest` has brought it here; what is in these files is what
//! makes it this kernel and no other:
//!
//! * `threads`: who runs, and when another does.
//! * `programs`: user mode: address spaces, system calls, three programs.
//! * `file`: a file on a disk.
//! * `shell`: what you talk to.
//! * `tests`, `bench`: whether it is right, and how fast.
//!
//! `cargo puppy` boots it on lguest, `cargo puppy --pc` on a PC, `cargo puppy test` runs its
//! tests on both. To have your own: copy this directory, and take out what you do not want.
#![no_std]
#![no_main]

extern crate alloc;

mod bench;
mod file;
mod programs;
mod shell;
mod tests;
mod threads;

use lguest_guest::heap::Heap;
use lguest_guest::{Boot, Platform, frames, irq, platform, println, test, time, virtio};

#[global_allocator]
static HEAP: Heap = Heap;

/// How often the timer ticks, in nanoseconds: so long may a thread run at a time.
const TICK: u64 = 10_000_000;

lguest_guest::main!(main);

fn main(boot: &'static Boot) -> ! {
    frames::start(boot.memory.clone());
    threads::start();
    programs::start();
    let devices = virtio::start().expect("the devices' drivers start");
    let disks = devices.disks.len();
    file::start(devices.disks);
    let place = if platform() == Platform::Lguest { "lguest" } else { "a PC" };
    println!("puppy on {place}: {} MiB free, {disks} disks", frames::untouched() >> 20);
    time::every(TICK);
    irq::enable();
    if boot.command_line.split_whitespace().any(|word| word.starts_with("test")) {
        test::run(boot)
    } else if boot.has_word("bench") {
        bench::run()
    } else {
        shell::run()
    }
}
