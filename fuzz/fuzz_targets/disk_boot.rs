//! Arbitrary bytes as a disk: looking for a kernel ends in one or an error.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::loader::fuzz::fuzz_disk_boot(data));
