//! `rdmsr` and `wrmsr`.
//!
//! A register lives in one of four places: in the state (below), in the table of
//! constants ([`msr_table`]), among the memory-type ranges ([`mtrr`]), or in
//! the environment (local APIC, KVM's paravirtual ones). Sources: SDM vol. 4; AMD APM
//! vol. 2, appendix A.

use super::{msr_table, mtrr};
use crate::addr::GuestVirtAddr;
use crate::decode::op::Op;
use crate::env::MsrRefused;
use crate::state::control::{Cr0, Efer};
use crate::state::regs::Gpr;
use crate::state::segment::SegReg;
use crate::vcpu::{Step, Vcpu};

/// Register numbers by their names in the manuals.
pub(crate) mod index {
    #![allow(missing_docs, reason = "the manuals' own names")]
    pub(crate) const IA32_TSC: u32 = 0x10;
    pub(crate) const IA32_TSC_ADJUST: u32 = 0x3b;
    pub(crate) const IA32_SPEC_CTRL: u32 = 0x48;
    pub(crate) const IA32_SYSENTER_CS: u32 = 0x174;
    pub(crate) const IA32_SYSENTER_ESP: u32 = 0x175;
    pub(crate) const IA32_SYSENTER_EIP: u32 = 0x176;
    pub(crate) const IA32_MISC_ENABLE: u32 = 0x1a0;
    pub(crate) const IA32_DEBUGCTL: u32 = 0x1d9;
    pub(crate) const IA32_PAT: u32 = 0x277;
    pub(crate) const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    pub(crate) const EFER: u32 = 0xc000_0080;
    pub(crate) const STAR: u32 = 0xc000_0081;
    pub(crate) const LSTAR: u32 = 0xc000_0082;
    pub(crate) const CSTAR: u32 = 0xc000_0083;
    pub(crate) const FMASK: u32 = 0xc000_0084;
    pub(crate) const FS_BASE: u32 = 0xc000_0100;
    pub(crate) const GS_BASE: u32 = 0xc000_0101;
    pub(crate) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(crate) const TSC_AUX: u32 = 0xc000_0103;
}

use index::{
    CSTAR, EFER, FMASK, FS_BASE, GS_BASE, IA32_DEBUGCTL, IA32_MISC_ENABLE, IA32_MTRR_DEF_TYPE,
    IA32_PAT, IA32_SPEC_CTRL, IA32_SYSENTER_CS, IA32_SYSENTER_EIP, IA32_SYSENTER_ESP, IA32_TSC,
    IA32_TSC_ADJUST, KERNEL_GS_BASE, LSTAR, STAR, TSC_AUX,
};

/// IA32_SPEC_CTRL bits kept: IBRS, STIBP, SSBD. They change nothing.
const SPEC_CTRL_BITS: u64 = 7;
/// IA32_MISC_ENABLE bits kept: fast strings, and what firmware may set.
const MISC_ENABLE_BITS: u64 = 1 | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 34;
/// IA32_DEBUGCTL bits kept: LBR and BTF. Neither is acted on: there is no branch
/// recording, and single step is always by instruction.
const DEBUGCTL_BITS: u64 = 3;

impl Vcpu {
    /// What `rdmsr` of register `index` gives.
    ///
    /// # Errors
    /// [`MsrRefused`] for a register that neither the CPU nor the environment has.
    pub fn read_msr(&mut self, index: u32) -> Result<u64, MsrRefused> {
        let msr = &self.state.msr;
        Ok(match index {
            IA32_TSC => self.tsc(),
            IA32_TSC_ADJUST => msr.tsc_adjust,
            IA32_SPEC_CTRL => msr.spec_ctrl,
            IA32_SYSENTER_CS => msr.sysenter_cs,
            IA32_SYSENTER_ESP => msr.sysenter_esp,
            IA32_SYSENTER_EIP => msr.sysenter_eip,
            IA32_MISC_ENABLE => msr.misc_enable,
            IA32_DEBUGCTL => msr.debugctl,
            IA32_PAT => msr.pat,
            IA32_MTRR_DEF_TYPE => msr.mtrr_def_type,
            EFER => self.state.efer.bits(),
            STAR => msr.star,
            LSTAR => msr.lstar,
            CSTAR => msr.cstar,
            FMASK => msr.fmask,
            FS_BASE => self.state.segment(SegReg::Fs).base,
            GS_BASE => self.state.segment(SegReg::Gs).base,
            KERNEL_GS_BASE => msr.kernel_gs_base,
            TSC_AUX => msr.tsc_aux,
            _ => {
                if let Some(constant) = msr_table::find(index) {
                    return Ok(constant.value);
                }
                if let Some(value) = self.read_range_register(index) {
                    return Ok(value);
                }
                return self.env.read_msr(index);
            }
        })
    }

    /// What `wrmsr` does.
    ///
    /// # Errors
    /// [`MsrRefused`] for a register that does not exist or a value it does not take;
    /// nothing has changed then.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        let canonical =
            if GuestVirtAddr(value).is_canonical() { Ok(value) } else { Err(MsrRefused) };
        let within = |mask: u64| if value & !mask == 0 { Ok(value) } else { Err(MsrRefused) };
        let when = |valid: bool| if valid { Ok(value) } else { Err(MsrRefused) };
        let msr = &mut self.state.msr;
        match index {
            IA32_TSC => self.write_tsc(value),
            IA32_TSC_ADJUST => self.write_tsc_adjust(value),
            IA32_SPEC_CTRL => msr.spec_ctrl = within(SPEC_CTRL_BITS)?,
            IA32_SYSENTER_CS => msr.sysenter_cs = value & 0xffff_ffff,
            IA32_SYSENTER_ESP => msr.sysenter_esp = canonical?,
            IA32_SYSENTER_EIP => msr.sysenter_eip = canonical?,
            IA32_MISC_ENABLE => msr.misc_enable = within(MISC_ENABLE_BITS)?,
            IA32_DEBUGCTL => msr.debugctl = within(DEBUGCTL_BITS)?,
            IA32_PAT => msr.pat = when(mtrr::is_valid_pat(value))?,
            IA32_MTRR_DEF_TYPE => msr.mtrr_def_type = when(mtrr::is_valid_default(value))?,
            EFER => self.write_efer(value)?,
            STAR => msr.star = value,
            LSTAR => msr.lstar = canonical?,
            CSTAR => msr.cstar = canonical?,
            FMASK => msr.fmask = value & 0xffff_ffff,
            FS_BASE => self.state.segment_mut(SegReg::Fs).base = canonical?,
            GS_BASE => self.state.segment_mut(SegReg::Gs).base = canonical?,
            KERNEL_GS_BASE => msr.kernel_gs_base = canonical?,
            TSC_AUX => msr.tsc_aux = within(0xffff_ffff)?,
            _ => return self.write_other_msr(index, value),
        }
        Ok(())
    }

    fn write_other_msr(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        if let Some(constant) = msr_table::find(index) {
            return match constant.on_write {
                msr_table::OnWrite::Drop(mask) if value & !mask == 0 => Ok(()),
                _ => Err(MsrRefused),
            };
        }
        match self.write_range_register(index, value) {
            Some(true) => Ok(()),
            Some(false) => Err(MsrRefused),
            None => self.env.write_msr(index, value),
        }
    }

    /// EFER: LMA is the CPU's own, and LME cannot change under paging (SDM vol. 3, 2.2.1).
    fn write_efer(&mut self, value: u64) -> Result<(), MsrRefused> {
        let old = self.state.efer;
        // LMA is ignored rather than refused: Linux writes back what it read.
        let new = Efer::from_bits(value).ok_or(MsrRefused)?.difference(Efer::LMA);
        let toggles_mode = (old ^ new).contains(Efer::LME);
        if toggles_mode && self.state.cr0.contains(Cr0::PG) {
            return Err(MsrRefused);
        }
        self.state.efer = new | old & Efer::LMA;
        self.mode_changed();
        Ok(())
    }

    fn refuse_msr(&mut self, index: u32) -> crate::vcpu::Abort {
        let refused = &mut self.system.refused;
        refused.msrs = refused.msrs.saturating_add(1);
        refused.last_msr = index;
        self.gp(0)
    }
}

/// `rdmsr`.
pub(crate) fn rdmsr(cpu: &mut Vcpu, _op: &Op) -> Step {
    cpu.require_cpl0()?;
    let index = cpu.state.reg(Gpr::Rcx) as u32;
    match cpu.read_msr(index) {
        Ok(value) => {
            cpu.set_edx_eax(value);
            Ok(())
        }
        Err(MsrRefused) => Err(cpu.refuse_msr(index)),
    }
}

/// `wrmsr`. It may change the mode (EFER) or what is pending (APIC), so the block ends.
pub(crate) fn wrmsr(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.require_cpl0()?;
    let index = cpu.state.reg(Gpr::Rcx) as u32;
    match cpu.write_msr(index, cpu.edx_eax()) {
        Ok(()) => cpu.end_block(op),
        Err(MsrRefused) => Err(cpu.refuse_msr(index)),
    }
}
