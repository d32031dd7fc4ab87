//! A guest of the lguest platform that says and does whatever it likes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::platform::lguest::fuzz::fuzz_lguest(data));
