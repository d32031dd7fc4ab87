//! Guest support for kernels in Rust: what a kernel needs to run under lguest, and the same
//! binary on a PC.
//!
//! A kernel's privileged operations are bound when it knows where it runs. Here that is
//! [`pvops`]: under lguest the interrupt flag is a word in memory behind register-saving
//! thunks, page tables and stacks go by hypercall; on a PC the native instructions take the
//! calls' places in the text. What the crate has, from a kernel's first instruction on:
//!
//! * [`main!`] names the function that is entered with a [`Boot`]: memory, command line,
//!   initrd. Two entries lead there, for the 64-bit lguest ABI and for PVH.
//! * [`println!`], and panics that say what happened and end the machine.
//! * [`irq`], [`trap`], [`time`], [`power`]: interrupts on and off, handlers for everything
//!   that enters the kernel, clocks and a timer, the ways to end.
//! * [`frames`], [`paging`], a global allocator ([`heap`]); [`task`] switches stacks,
//!   [`user`] goes to user mode.
//! * [`virtio`]: disks, consoles and entropy by the `virtio-drivers` crate, over lguest's bus
//!   or PCI.
//! * [`mod@test`]: kernel tests, whose outcome is lguest's exit status.
//!
//! `guests/puppy` is a kernel on it, and says how one is built.
#![no_std]
#![cfg(target_arch = "x86_64")]

extern crate alloc;

pub mod boot;
pub mod console;
mod entry;
pub mod frames;
pub mod heap;
pub mod hypercall;
pub mod irq;
mod mem;
mod ops;
pub mod paging;
mod pc;
pub mod power;
pub mod task;
pub mod test;
mod text;
pub mod time;
pub mod trap;
pub mod user;
pub mod virtio;

pub use boot::{Boot, Platform, platform};
pub use ops::{InterruptOps, set_interrupt_ops};
pub use pvops;

/// Names the kernel's main function, an `fn(&'static Boot) -> !`. It begins on a stack of
/// 64 KiB with interrupts off.
#[macro_export]
macro_rules! main {
    ($main:path) => {
        #[unsafe(no_mangle)]
        fn kernel_main(boot: &'static $crate::Boot) -> ! {
            let main: fn(&'static $crate::Boot) -> ! = $main;
            main(boot)
        }

        #[panic_handler]
        fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
            $crate::power::panic(info)
        }
    };
}

unsafe extern "Rust" {
    /// What [`main!`] defines.
    fn kernel_main(boot: &'static Boot) -> !;
}
