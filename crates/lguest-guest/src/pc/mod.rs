//! What a PC needs where lguest has hypercalls: descriptor tables, a local APIC, a serial
//! port, ways to end. The operations on top are native instructions.

use core::arch::asm;

pub(crate) mod apic;
pub(crate) mod ports;
pub(crate) mod power;
pub(crate) mod segments;
pub(crate) mod serial;

use crate::{paging, time, trap};

/// MSRs of `syscall`.
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const FMASK: u32 = 0xc000_0084;
/// What `syscall` turns off: TF, IF, DF, NT, AC.
const OFF: u64 = 0x4_4700;

/// Writes an MSR.
pub(crate) fn write_msr(msr: u32, value: u64) {
    // SAFETY: the callers' MSRs are there, and the values mean what they should.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// Brings the platform into the state that lguest's guests begin in.
pub(crate) fn start() {
    paging::started_on(segments::first_tables());
    serial::start();
    trap::on_pc();
    segments::load_gates();
    time::on_pc();
    apic::start();
}

/// Where `syscall` goes.
pub(crate) fn set_system_call(entry: u64) {
    write_msr(STAR, u64::from(segments::KERNEL_CS) << 32);
    write_msr(LSTAR, entry);
    write_msr(FMASK, OFF);
}
