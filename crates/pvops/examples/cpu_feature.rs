//! An ordinary program that picks an implementation by what the CPU can do, once, at
//! start, and patches it in: no test and no indirect call is left in the loop.
//!
//! Run it with `cargo run --release -p pvops --example cpu_feature`.

use pvops::user::{DualMapping, Threads};
use pvops::{Binding, Bindings, CalleeSave, Code, Family, Gpr, RegSet, Sites, callee_save};
use std::error::Error;

pvops::family! {
    /// Bit counting.
    mod bits {
        use super::count_portable;
        /// How many bits are set.
        callee_save fn count(word: u64) -> u64 = pvops::Binding::call(count_portable::CALLEE_SAVE);
    }
}

/// For every x86-64. Compiled code: goes behind a thunk.
#[callee_save]
fn count_portable(word: u64) -> u64 {
    let mut left = word;
    let mut count = 0;
    while left != 0 {
        left &= left - 1;
        count += 1;
    }
    count
}

/// One instruction, where the CPU has it.
#[unsafe(naked)]
extern "sysv64" fn count_popcnt(word: u64) -> u64 {
    core::arch::naked_asm!("endbr64", "popcnt rax, rdi", "ret")
}

/// The call, or the instruction itself in its place.
fn popcnt() -> Binding<CalleeSave<extern "sysv64" fn(u64) -> u64>> {
    let code = Code {
        bytes: &[0xf3, 0x48, 0x0f, 0xb8, 0xc7], // popcnt rax, rdi
        clobbers: RegSet::of(&[Gpr::Rax]),
        fixups: &[],
    };
    // SAFETY: naked, changes RAX only; the bytes are its own instruction.
    unsafe { Binding::inline(CalleeSave::promise(count_popcnt), code) }
}

#[inline(never)]
fn total(words: &[u64]) -> u64 {
    words.iter().map(|word| bits::count(*word)).sum()
}

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<u64> =
        (0..1_000_000u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
    let time = || {
        let start = std::time::Instant::now();
        let sum = total(&words);
        (sum, start.elapsed())
    };
    let (before, portable) = time();

    let mut family = bits::Family::claim()?;
    let mut bindings = Bindings::new("this CPU");
    if std::is_x86_feature_detected!("popcnt") {
        // A promise is a word; here it is put to the test.
        // SAFETY: the CPU has the instruction.
        unsafe { pvops::probe::keeps_promise(count_popcnt as *const (), &[42])? };
        bindings.bind(bits::op::Count, popcnt())?;
    }
    family.bind(&bindings)?;
    let sites = Sites::of_program();
    let mut text = DualMapping::around(sites, Threads::stop(40))?;
    let (_patched, report) = family.apply(sites, &mut text, |_| ()).map_err(|(_, error)| error)?;

    let (after, patched) = time();
    println!("{report}");
    println!("{before} bits in {portable:?} before, {after} in {patched:?} after");
    assert_eq!(before, after);
    Ok(())
}
