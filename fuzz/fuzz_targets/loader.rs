//! Arbitrary bytes as a kernel with initrds: loading ends in a guest or an error.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::loader::fuzz::fuzz_loader(data));
