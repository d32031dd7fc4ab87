//! A vCPU's architectural state, to go back to.

use crate::state::VcpuState;
use crate::system::SystemExtras;
use crate::vcpu::{Shadow, Vcpu};

/// All that decides what a vCPU does next, apart from memory and what it caches.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) state: VcpuState,
    shadow: Shadow,
    nmi_blocked: bool,
    system: SystemExtras,
    pdpte: [u64; 4],
}

impl Snapshot {
    pub(super) fn of(cpu: &Vcpu) -> Self {
        Self {
            state: cpu.state.clone(),
            shadow: cpu.shadow,
            nmi_blocked: cpu.nmi_blocked,
            system: cpu.system,
            pdpte: cpu.mmu.pdpte,
        }
    }

    /// Replaces it by `cpu`'s.
    pub(super) fn take(&mut self, cpu: &Vcpu) {
        self.state.clone_from(&cpu.state);
        self.shadow = cpu.shadow;
        self.nmi_blocked = cpu.nmi_blocked;
        self.system = cpu.system;
        self.pdpte = cpu.mmu.pdpte;
    }

    /// Puts `cpu` there.
    pub(super) fn restore(&self, cpu: &mut Vcpu) {
        cpu.state.clone_from(&self.state);
        cpu.shadow = self.shadow;
        cpu.nmi_blocked = self.nmi_blocked;
        cpu.system = self.system;
        cpu.mmu.pdpte = self.pdpte;
        cpu.code_hit = false;
        cpu.mode_changed();
        cpu.update_event_mask();
    }
}
