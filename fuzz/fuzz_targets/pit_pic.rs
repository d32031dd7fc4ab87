//! The interval timer and the legacy interrupt controllers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::fuzz::fuzz_pit_pic(data));
