//! A driver of the virtio entropy device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::virtio::fuzz::fuzz_entropy(data));
