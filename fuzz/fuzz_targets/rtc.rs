//! The clock's registers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::fuzz::fuzz_rtc(data));
