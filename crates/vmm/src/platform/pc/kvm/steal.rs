//! The steal-time page: whether a vCPU is running, and TLB flushes it owes.
//!
//! While a vCPU sleeps in `hlt` its page says "preempted". A sibling that wants its TLB
//! flushed then sets a bit there instead of waking it, and the vCPU flushes before it
//! runs again. The stolen time itself is always told as zero: what the host's scheduler
//! takes is not measured. Source: Linux Documentation/virt/kvm/x86/msr.rst.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use softcpu::{GuestPhysAddr, PhysMemory};

/// The MSR.
pub const MSR_STEAL_TIME: u32 = 0x4b56_4d03;
/// Bit 0: the page is in use. Bits 1 to 5 are reserved: the page is 64-byte aligned.
const ENABLED: u64 = 1;
const RESERVED: u64 = 0x3e;

/// Offset of `kvm_steal_time.version` and of the word whose low byte is `preempted`.
const VERSION: u64 = 8;
const PREEMPTED_WORD: u64 = 16;
const PREEMPTED: u32 = 1 << 0;
const FLUSH_TLB: u32 = 1 << 1;

/// The steal-time MSR of one vCPU; written by its environment, used by its thread.
#[derive(Debug, Default)]
pub struct StealTime {
    msr: AtomicU64,
}

impl StealTime {
    /// What the MSR reads as.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.msr.load(SeqCst)
    }

    /// A write of the MSR; `false` is `#GP`.
    #[must_use]
    pub fn write(&self, value: u64, memory: &PhysMemory) -> bool {
        if value & RESERVED != 0 {
            return false;
        }
        self.msr.store(value, SeqCst);
        if let Some(page) = self.page() {
            // No stolen time, an even version, running: a page of zeroes.
            memory.store(page, 0_u64);
            memory.store(page.wrapping_add(VERSION), 0_u64);
            memory.store(page.wrapping_add(PREEMPTED_WORD), 0_u32);
        }
        true
    }

    fn page(&self) -> Option<GuestPhysAddr> {
        let msr = self.msr.load(SeqCst);
        (msr & ENABLED != 0).then_some(GuestPhysAddr(msr & !0x3f))
    }

    /// The vCPU is about to sleep.
    pub fn set_preempted(&self, memory: &PhysMemory) {
        let _ = self.exchange(memory, PREEMPTED);
    }

    /// The vCPU is about to run; `true`: it must flush its TLB first.
    #[must_use]
    pub fn clear_preempted(&self, memory: &PhysMemory) -> bool {
        self.exchange(memory, 0) & FLUSH_TLB != 0
    }

    /// Replaces the `preempted` byte atomically; returns what it was.
    fn exchange(&self, memory: &PhysMemory, value: u32) -> u32 {
        let Some(page) = self.page() else { return 0 };
        let at = page.wrapping_add(PREEMPTED_WORD);
        // Bounded, though only siblings that keep writing there could make it go around.
        for _ in 0..1000 {
            let Some(before) = memory.load::<u32>(at) else { return 0 };
            if memory.compare_exchange(at, before, before & !0xff | value) {
                return before & 0xff;
            }
        }
        // Somebody plays games: a flush too many does no harm.
        FLUSH_TLB
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::pc::test_memory;

    #[test]
    fn a_flush_asked_for_during_sleep_is_told_on_waking() {
        let (steal, memory) = (StealTime::default(), test_memory());
        assert!(!steal.clear_preempted(&memory));
        assert!(!steal.write(0x2021, &memory), "not aligned");
        assert!(steal.write(0x2041, &memory));
        let at = GuestPhysAddr(0x2050);
        steal.set_preempted(&memory);
        assert_eq!(memory.load::<u8>(at), Some(1));
        assert!(!steal.clear_preempted(&memory));
        steal.set_preempted(&memory);
        memory.store(at, 3_u8);
        assert!(steal.clear_preempted(&memory));
        assert_eq!(memory.load::<u8>(at), Some(0));
    }
}
