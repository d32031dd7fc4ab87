//! Guests of the 64-bit ABI. Their code is assembler in this program's own constants, copied
//! from there into an image; `prelude.s` has the macros they are written with.
//!
//! A guest powers off if all its checks hold; otherwise its exit status is the number of the
//! one that does not, counted from 1 in the order of its text.

mod bus;
mod calls;
mod hostile;
mod interrupts;
mod start;
mod traps;
mod users;

use lguest_abi::long::Wire;
use lguest_abi::long::entry::KERNEL_MAP;
use lguest_abi::long::note::{Descriptor, note_bytes};
use lguest_abi::long::shared_data::SharedData;
use vmm::loader::PlatformKind;
use vmm::machine::{Machine, MachineConfig, Outcome};

use super::guest::{Console, config};

/// Physical addresses of the image's parts.
pub(crate) const CODE: u64 = 0x10_0000;
pub(crate) const DATA: u64 = 0x20_0000;
/// Bytes of data: shared data, variables, stacks.
const DATA_BYTES: u64 = 0x4_0000;

/// Makes a function that returns a guest's code.
macro_rules! guest {
    ($name:ident, $code:literal) => {
        std::arch::global_asm!(
            include_str!("prelude.s"),
            ".pushsection .rodata.guests, \"a\"",
            concat!(".globl long_", stringify!($name), "_start"),
            concat!(".globl long_", stringify!($name), "_end"),
            concat!("long_", stringify!($name), "_start:"),
            $code,
            concat!("long_", stringify!($name), "_end:"),
            ".popsection",
            include_str!("epilogue.s"),
            options(raw)
        );

        fn $name() -> &'static [u8] {
            let (start, end): (*const u8, *const u8);
            // SAFETY: two addresses are computed.
            unsafe {
                std::arch::asm!(
                    concat!("lea {}, [rip + long_", stringify!($name), "_start]"),
                    concat!("lea {}, [rip + long_", stringify!($name), "_end]"),
                    out(reg) start,
                    out(reg) end,
                    options(nomem, nostack)
                );
                // SAFETY: what lies between is a constant of this program.
                std::slice::from_raw_parts(start, end.addr() - start.addr())
            }
        }
    };
}
pub(crate) use guest;

/// An image with this code, and shared data that is filled in but for `noirq_iret`.
pub(crate) fn image(code: &[u8]) -> Vec<u8> {
    let mut shared = SharedData::new();
    shared.features = 3;
    shared.irq_words = DATA + 64;
    shared.kernel_address = 0xffff_8000_0000_0000;
    let mut data = vec![0; 4096];
    shared.write(&mut data).unwrap();
    image_with(code, &data)
}

/// The same with this page of shared data.
pub(crate) fn image_with(code: &[u8], data: &[u8]) -> Vec<u8> {
    let note = note_bytes(Descriptor {
        version_min: 1,
        version_max: 1,
        entry: KERNEL_MAP + CODE,
        features: 0,
    });
    let parts: [(u32, u32, u64, &[u8], u64); 3] = [
        (1, 5, CODE, code, code.len() as u64),
        (1, 6, DATA, data, DATA_BYTES),
        (4, 4, 0, &note, 0),
    ];
    let mut head = b"\x7fELF\x02\x01\x01".to_vec();
    head.resize(16, 0);
    head.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [0_u64, 64, 0] {
        head.extend(word.to_le_bytes());
    }
    head.extend([0, 0, 0, 0, 64, 0, 56, 0, parts.len() as u8, 0, 0, 0, 0, 0, 0, 0]);
    let mut offset = (64 + 56 * parts.len()) as u64;
    for (kind, flags, phys, bytes, len) in parts {
        head.extend([kind.to_le_bytes(), flags.to_le_bytes()].concat());
        let filed = bytes.len() as u64;
        for word in [offset, KERNEL_MAP + phys, phys, filed, len.max(filed), 4] {
            head.extend(word.to_le_bytes());
        }
        offset += filed;
    }
    parts.iter().for_each(|part| head.extend(part.3));
    head
}

/// Runs a machine: how it ended, and what was printed.
pub(crate) fn run((config, console): (MachineConfig, Console)) -> (Outcome, String) {
    let machine = Machine::new(config).unwrap();
    assert_eq!(machine.platform(), PlatformKind::LguestLong);
    let outcome = machine.run().unwrap();
    (outcome, console.text())
}

/// Runs a guest whose checks must hold; returns what it printed.
pub(crate) fn check(code: &[u8]) -> String {
    let (outcome, console) = run(config(image(code), 60.0));
    if let Outcome::Exited(number) = outcome {
        panic!("check {number} does not hold; it printed {console:?}");
    }
    assert_eq!(outcome, Outcome::PoweredOff, "{console}");
    console
}

/// Runs a guest until it dies, and says of what.
pub(crate) fn dies(code: &[u8]) -> String {
    match run(config(image(code), 60.0)).0 {
        Outcome::Died(reason) => reason,
        other => panic!("it should have died: {other:?}"),
    }
}
