//! A local APIC: its page, its MSRs, its timers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::devices::fuzz::fuzz_local_apic(data));
