//! Hostile code in hostile surroundings.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| softcpu::interp::fuzz::fuzz_interpreter(data));
