//! kvmclock: pages in guest memory that turn the TSC into time.
//!
//! All vCPUs count in the one host TSC, so their pages hold the same line through the
//! same point and never need to be updated: written once when the guest asks, and again
//! only if it moves its TSC. Source: Linux Documentation/virt/kvm/x86/msr.rst.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use softcpu::{GuestPhysAddr, PhysMemory};

use crate::clock::{TscFrequency, host_tsc};

/// The MSRs: wall clock and system time, old and new numbers.
pub const MSR_WALL_CLOCK: u32 = 0x11;
/// See [`MSR_WALL_CLOCK`].
pub const MSR_SYSTEM_TIME: u32 = 0x12;
/// See [`MSR_WALL_CLOCK`].
pub const MSR_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
/// See [`MSR_WALL_CLOCK`].
pub const MSR_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

/// Bit 0 of the system-time MSR: the page is in use.
const ENABLED: u64 = 1;
/// `pvclock_vcpu_time_info.flags`: the same on all vCPUs.
const TSC_STABLE: u8 = 1;

/// The moment the guest's clocks count from.
#[derive(Clone, Copy, Debug)]
pub struct Epoch {
    /// The host's TSC then.
    pub tsc: u64,
    /// The time of day then, since the Unix epoch.
    pub wall: Duration,
    /// How fast the TSC counts.
    pub frequency: TscFrequency,
}

impl Epoch {
    /// Now.
    #[must_use]
    pub fn now(frequency: TscFrequency) -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { tsc: host_tsc(), wall, frequency }
    }

    /// The 32 bytes of `pvclock_vcpu_time_info` for a guest whose TSC is `offset` ahead
    /// of the host's, but for the version, which is zero.
    #[must_use]
    pub fn time_info(&self, offset: u64) -> [u8; 32] {
        let (factor, shift) = self.frequency.pvclock_scale();
        let tsc_timestamp = self.tsc.wrapping_add(offset);
        let system_time = 0_u64;
        let mut info = [0; 32];
        let fields = [0; 8]
            .into_iter()
            .chain(tsc_timestamp.to_le_bytes())
            .chain(system_time.to_le_bytes())
            .chain(factor.to_le_bytes())
            .chain([shift as u8, TSC_STABLE]);
        for (byte, field) in info.iter_mut().zip(fields) {
            *byte = field;
        }
        info
    }

    /// Writes the wall-clock structure (version, seconds, nanoseconds) at `addr`.
    pub fn write_wall_clock(&self, memory: &PhysMemory, addr: u64) {
        let seconds = self.wall.as_secs() as u32;
        let mut body = [0; 12];
        let fields = [0; 4]
            .into_iter()
            .chain(seconds.to_le_bytes())
            .chain(self.wall.subsec_nanos().to_le_bytes());
        for (byte, field) in body.iter_mut().zip(fields) {
            *byte = field;
        }
        publish(memory, GuestPhysAddr(addr), &body);
    }
}

/// The system-time MSR of one vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemTime64 {
    msr: u64,
}

impl SystemTime64 {
    /// What the MSR reads as.
    #[must_use]
    pub const fn read(self) -> u64 {
        self.msr
    }

    /// The guest says where the page is to be.
    pub fn write(&mut self, value: u64, epoch: &Epoch, memory: &PhysMemory, offset: u64) {
        self.msr = value;
        self.refresh(epoch, memory, offset);
    }

    /// Writes the page anew; `offset` is guest TSC minus host TSC.
    pub fn refresh(self, epoch: &Epoch, memory: &PhysMemory, offset: u64) {
        if self.msr & ENABLED != 0 {
            publish(memory, GuestPhysAddr(self.msr & !ENABLED), &epoch.time_info(offset));
        }
    }
}

/// Writes a structure whose first word is a version that is odd while the rest changes.
/// An address that is not RAM is the guest's own loss.
fn publish(memory: &PhysMemory, addr: GuestPhysAddr, body: &[u8]) {
    let Some(before) = memory.load::<u32>(addr) else { return };
    // On x86 stores are seen in order, and `store` is one the compiler does not move.
    memory.store(addr, before.wrapping_add(1) | 1);
    if let Some(rest) = body.get(4..) {
        memory.write(addr.wrapping_add(4), rest);
    }
    memory.store(addr, (before | 1).wrapping_add(1));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::pc::test_memory;

    #[test]
    fn a_guest_computes_the_time_from_the_page() {
        let frequency = TscFrequency::from_hz(3_000_000_000);
        let epoch = Epoch { tsc: 1_000_000, wall: Duration::from_nanos(5_000_000_007), frequency };
        let memory = test_memory();
        let offset = 500_u64.wrapping_neg();
        let mut msr = SystemTime64::default();
        msr.write(0x2000 | ENABLED, &epoch, &memory, offset);
        let word = |at: u64| memory.load::<u32>(GuestPhysAddr(0x2000 + at)).unwrap();
        let long = |at: u64| memory.load::<u64>(GuestPhysAddr(0x2000 + at)).unwrap();
        assert_eq!((word(0), long(8), long(16)), (2, 999_500, 0));
        let [shift, flags, ..] = word(28).to_le_bytes();
        assert_eq!(flags, TSC_STABLE);
        // One second later by the guest's TSC.
        let delta = 3_000_999_500_u64 - long(8);
        assert!((shift as i8) < 0);
        let nanos = (u128::from(delta >> -(shift as i8)) * u128::from(word(24))) >> 32;
        assert!(nanos.abs_diff(1_000_000_000) <= 2, "{nanos}");

        epoch.write_wall_clock(&memory, 0x3000);
        let wall = [0, 4, 8].map(|at| memory.load::<u32>(GuestPhysAddr(0x3000 + at)).unwrap());
        assert_eq!(wall, [2, 5, 7]);
    }

    #[test]
    fn a_disabled_or_wild_page_is_not_written() {
        let epoch = Epoch::now(TscFrequency::from_hz(1_000_000_000));
        let memory = test_memory();
        let mut msr = SystemTime64::default();
        msr.write(0x2000, &epoch, &memory, 0);
        assert_eq!(memory.load::<u32>(GuestPhysAddr(0x2000)), Some(0));
        msr.write(0xffff_ffff_ffff_f001, &epoch, &memory, 0);
        msr.write(0x2ffd, &epoch, &memory, 0);
    }
}
