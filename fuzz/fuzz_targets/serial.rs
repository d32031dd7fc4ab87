//! The serial port's registers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::fuzz::fuzz_serial(data));
