//! A driver's rings and requests, as a disk gets them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::virtio::block::fuzz::fuzz_block(data));
