//! A 64-bit lguest guest's hypercalls, traps and stores, whatever they are.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::platform::lguest::long::fuzz::fuzz_long(data));
