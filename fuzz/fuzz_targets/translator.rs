//! Hostile 64- and 32-bit code, translated.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| softcpu::interp::fuzz::fuzz_translator(data));
