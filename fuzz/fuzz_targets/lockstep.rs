//! Hostile 64- and 32-bit code, translated, and what comes of it checked by the interpreter.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| softcpu::interp::fuzz::fuzz_lockstep(data));
