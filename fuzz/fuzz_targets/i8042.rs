//! The keyboard controller's ports.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::fuzz::fuzz_i8042(data));
