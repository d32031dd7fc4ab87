//! The local APIC: the timer's interrupt. The old interrupt controller is masked, devices are
//! polled.

use super::ports::out8;
use super::write_msr;
use crate::boot::direct;
use crate::trap::vector;

/// The registers' physical address, and those in use.
const APIC: u64 = 0xfee0_0000;
const EOI: usize = 0xb0;
const SPURIOUS: usize = 0xf0;
const TIMER: usize = 0x320;
/// Spurious-interrupt register: the APIC is on.
const ON: u32 = 0x100;
/// Timer: at a moment of the TSC.
const DEADLINE_MODE: u32 = 2 << 17;
const TSC_DEADLINE: u32 = 0x6e0;
/// Where spurious interrupts go: to a vector without a handler.
const NOBODY: u32 = vector::LAST as u32 - 1;

fn write(register: usize, value: u32) {
    // SAFETY: the APIC's registers, which the first page tables map.
    unsafe { direct(APIC).add(register).cast::<u32>().write_volatile(value) };
}

pub(crate) fn start() {
    for port in [0x21, 0xa1] {
        out8(port, 0xff);
    }
    write(SPURIOUS, ON | NOBODY);
    write(TIMER, DEADLINE_MODE | vector::TIMER as u32);
}

pub(crate) fn acknowledge() {
    write(EOI, 0);
}

/// One interrupt in so many nanoseconds; 0: none.
pub(crate) fn arm(nanoseconds: u64, khz: u64) {
    let ticks = (u128::from(nanoseconds) * u128::from(khz) / 1_000_000) as u64;
    let at = if nanoseconds == 0 { 0 } else { crate::time::ticks() + ticks };
    write_msr(TSC_DEADLINE, at);
}
