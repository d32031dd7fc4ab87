//! The PCI bus, and a virtio function's registers on it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::pci::fuzz::fuzz_pci(data));
