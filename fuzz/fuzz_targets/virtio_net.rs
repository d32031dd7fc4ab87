//! A network card between a hostile driver and a hostile peer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::virtio::net::fuzz::fuzz_net(data));
