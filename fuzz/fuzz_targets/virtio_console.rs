//! A driver of the virtio console.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::virtio::fuzz::fuzz_console(data));
