//! Arbitrary bytes as instructions of each code size.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| softcpu::interp::fuzz::fuzz_decoder(data));
