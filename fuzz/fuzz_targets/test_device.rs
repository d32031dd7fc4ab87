//! The test device: ports that drive lines, a scratch port, memory that is not RAM.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::fuzz::fuzz_test_device(data));
