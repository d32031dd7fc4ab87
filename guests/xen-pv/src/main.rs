//! A paravirtual kernel for Xen that proves pvops' Xen backend where it is at home.
//!
//! Xen starts it as its first domain. It has its events delivered by Xen, its page tables
//! checked by Xen, and runs every interrupt op and every frame conversion in each form: as
//! called, through sites as the compiler made them, and through the same sites patched, in
//! text that is never writable where it executes. What it finds goes to Xen's console; how
//! it ended is the reason it gives for its shutdown: a reboot if all is well, else a crash.
//!
//! `cargo xtask xen-check` builds and boots it.

#![no_std]
#![no_main]

mod events;
mod frames;
mod hypercall;
mod interrupts;
mod memory;
mod start;
mod text;

use core::panic::PanicInfo;
use hypercall::Shutdown;
use start::StartInfo;

/// Entered with Xen's start info, on a stack of the kernel's own, events masked.
extern "sysv64" fn main(info: &'static StartInfo) -> ! {
    say!("pvops under Xen {}.{}", hypercall::version() >> 16, hypercall::version() & 0xffff);
    info.check();
    let tables = frames::Tables::of(info);
    events::start(info, tables);
    text::protect(tables);
    frames::prove(tables);
    interrupts::prove(tables);
    say!("pvops under Xen: all proved");
    hypercall::shutdown(Shutdown::Reboot)
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("pvops under Xen: {info}");
    hypercall::shutdown(Shutdown::Crash)
}
