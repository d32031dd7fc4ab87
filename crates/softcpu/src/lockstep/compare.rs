//! Whether two vCPUs are at the same place with the same state, and what is not the same.

use crate::addr::GuestPhysAddr;
use crate::memory::access;
use crate::memory::copies::PAGE;
use crate::memory::overlay::Before;
use crate::memory::ram::RamFrame;
use crate::state::VcpuState;
use crate::sync::lock;
use crate::vcpu::Vcpu;

/// Whether both have the same registers.
pub(super) fn same_registers(a: &Vcpu, b: &Vcpu) -> bool {
    a.state == b.state
        && a.shadow == b.shadow
        && a.nmi_blocked == b.nmi_blocked
        && a.system == b.system
        && a.mmu.pdpte == b.mmu.pdpte
}

/// Whether both are at the same place with the same in registers, flags aside.
pub(super) fn alike(a: &VcpuState, b: &VcpuState) -> bool {
    a.rip == b.rip && a.gpr == b.gpr && a.vec == b.vec
}

/// How many of what most code works with differ: general-purpose registers, flags, vectors.
pub(super) fn registers(a: &VcpuState, b: &VcpuState) -> usize {
    let gprs = a.gpr.iter().zip(&b.gpr).filter(|(a, b)| a != b).count();
    let vectors = a.vec.iter().zip(&b.vec).filter(|(a, b)| a != b).count();
    gprs.saturating_add(vectors).saturating_add(usize::from(a.rflags != b.rflags))
}

/// Whether both have asked the machine as much.
pub(super) fn same_questions(a: &Vcpu, b: &Vcpu) -> bool {
    let position = |cpu: &Vcpu| cpu.tape.as_ref().map(super::tape::Tape::position);
    position(a) == position(b)
}

/// Whether both show the same memory, but for what devices have stored to the real one.
pub(super) fn same_memory(a: &Vcpu, b: &Vcpu, before: &Before) -> bool {
    frames(a, b, before).into_iter().all(|frame| {
        let (ours, theirs) = (page(a, frame), page(b, frame));
        let real = |cpu: &Vcpu| !cpu.memory.is_overlay();
        ours == theirs
            || [a, b]
                .into_iter()
                .filter(|cpu| real(cpu))
                .any(|cpu| cpu.memory.code().outside().explains(frame, &ours, &theirs))
    })
}

/// The frames in which they can differ. A vCPU on real memory may have changed those that
/// have been copied before; what else changed there a device did.
fn frames(a: &Vcpu, b: &Vcpu, before: &Before) -> Vec<RamFrame> {
    let stored = |cpu: &Vcpu| {
        let copied = || lock(before).frames().collect();
        cpu.memory.stored_frames().unwrap_or_else(copied)
    };
    let mut all = stored(a);
    all.extend(stored(b));
    all.sort_unstable_by_key(|frame| frame.0);
    all.dedup();
    all
}

/// The bytes of `frame` as `cpu` would see them.
fn page(cpu: &Vcpu, frame: RamFrame) -> [u8; PAGE] {
    let mut bytes = [0; PAGE];
    if let Some(shown) = cpu.memory.shown(frame) {
        // SAFETY: a whole page of RAM or a copy of one, which nobody frees meanwhile.
        unsafe { access::copy(shown, bytes.as_mut_ptr(), PAGE) };
    }
    bytes
}

/// Bytes in a row that differ.
#[derive(Debug)]
pub(super) struct Bytes {
    pub(super) addr: GuestPhysAddr,
    pub(super) a: Vec<u8>,
    pub(super) b: Vec<u8>,
}

/// Places in memory that are looked for.
const MOST_PLACES: usize = 16;

/// Where memory differs: the first places.
pub(super) fn memory(a: &Vcpu, b: &Vcpu, before: &Before) -> Vec<Bytes> {
    let mut found: Vec<Bytes> = Vec::new();
    for frame in frames(a, b, before) {
        let Some(start) = a.memory.address_of(frame) else { continue };
        let mut last = None;
        for (n, (a, b)) in page(a, frame).into_iter().zip(page(b, frame)).enumerate() {
            if a == b {
                continue;
            }
            if let Some(bytes) = found.last_mut()
                && last.is_some_and(|last: usize| last.checked_add(1) == Some(n))
            {
                bytes.a.push(a);
                bytes.b.push(b);
            } else if found.len() < MOST_PLACES {
                let addr = start.wrapping_add(n as u64);
                found.push(Bytes { addr, a: vec![a], b: vec![b] });
            } else {
                return found;
            }
            last = Some(n);
        }
    }
    found
}
