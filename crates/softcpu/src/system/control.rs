//! Control registers, long-mode activation, extended control registers, and `hlt`.
//!
//! Sources: SDM vol. 3, 2.5 (control registers), 4.1.2 and 4.10.4 (paging-mode changes
//! and what they flush), 4.4.1 (PDPTEs), 9.8.5 (IA-32e activation); vol. 2, MOV CR, XSETBV.

use crate::addr::GuestPhysAddr;
use crate::decode::op::{Op, OpFlags};
use crate::mmu::PHYS_BITS;
use crate::state::CodeSize;
use crate::state::control::{Cr0, Cr4, Efer};
use crate::state::fpu::{XCR0_AVX, XCR0_SSE, XCR0_X87};
use crate::state::regs::Gpr;
use crate::state::segment::{Access, SegReg};
use crate::vcpu::{Exit, Step, Vcpu};

/// CR3 bit 63, with CR4.PCIDE: keep the translations of the new PCID.
const CR3_NO_FLUSH: u64 = 1 << 63;
/// CR3 bits 11..0, with CR4.PCIDE: the process-context identifier.
const CR3_PCID: u64 = 0xfff;
/// CR8: the task priority class is four bits.
const CR8_CLASS: u64 = 0xf;
/// Reserved bits of a PDPTE register: 2..1, 8..5 and those above the physical address.
const PDPTE_RESERVED: u64 = 0x1e6 | !((1 << PHYS_BITS) - 1);

impl Vcpu {
    /// The PCID in force; 0 without CR4.PCIDE.
    pub(crate) fn pcid(&self) -> u16 {
        if self.state.cr4.contains(Cr4::PCIDE) { (self.state.cr3 & CR3_PCID) as u16 } else { 0 }
    }

    /// The CR4 bits this CPU has: those whose feature CPUID reports.
    fn cr4_known(&self) -> Cr4 {
        let mut known = Cr4::all().difference(Cr4::VME | Cr4::PVI);
        if !self.cpuid.has_xsave() {
            known.remove(Cr4::OSXSAVE);
        }
        known
    }

    /// Whether registers with these contents mean PAE paging with PDPTE registers.
    pub(crate) fn is_pae(cr0: Cr0, cr4: Cr4, efer: Efer) -> bool {
        cr0.contains(Cr0::PG) && cr4.contains(Cr4::PAE) && !efer.contains(Efer::LMA)
    }

    /// Reads the four PDPTEs that `cr3` points at; reserved bits fault.
    pub(crate) fn read_pdptes(&mut self, cr3: u64) -> Result<[u64; 4], crate::vcpu::Abort> {
        let table = cr3 & 0xffff_ffe0;
        let mut entries = [0_u64; 4];
        for (index, entry) in (0_u64..).zip(entries.iter_mut()) {
            let at = GuestPhysAddr(table.wrapping_add(index << 3));
            *entry = self.memory.load::<u64>(at).unwrap_or(u64::MAX);
            if *entry & 1 != 0 && *entry & PDPTE_RESERVED != 0 {
                return Err(self.gp(0));
            }
        }
        Ok(entries)
    }

    /// A write of CR0.
    ///
    /// # Errors
    /// `#GP(0)` for reserved bits and combinations that make no mode.
    pub(crate) fn set_cr0(&mut self, value: u64) -> Step {
        if value >> 32 != 0 {
            return Err(self.gp(0));
        }
        let old = self.state.cr0;
        let new = Cr0::from_bits_truncate(value) | Cr0::ET;
        let paging = new.contains(Cr0::PG);
        let caching = new.contains(Cr0::NW) && !new.contains(Cr0::CD);
        if paging && !new.contains(Cr0::PE) || caching {
            return Err(self.gp(0));
        }
        let mut efer = self.state.efer;
        if paging && !old.contains(Cr0::PG) && efer.contains(Efer::LME) {
            let code_is_long = self.state.segment(SegReg::Cs).is_long();
            // A 16-bit TSS means nothing in long mode. Bit 3 of the type is the width.
            let narrow_tss = !self.state.tr.access.contains(Access::CODE);
            if !self.state.cr4.contains(Cr4::PAE) || code_is_long || narrow_tss {
                return Err(self.gp(0));
            }
            efer |= Efer::LMA;
        }
        if !paging && old.contains(Cr0::PG) {
            if self.state.code_size() == CodeSize::Bits64 || self.state.cr4.contains(Cr4::PCIDE) {
                return Err(self.gp(0));
            }
            efer.remove(Efer::LMA);
        }
        let pdpte_bits = Cr0::PG | Cr0::CD | Cr0::NW;
        if Self::is_pae(new, self.state.cr4, efer) && (old ^ new).intersects(pdpte_bits) {
            self.mmu.pdpte = self.read_pdptes(self.state.cr3)?;
        }
        self.state.cr0 = new;
        self.state.efer = efer;
        self.mode_changed();
        Ok(())
    }

    /// A write of CR3. Translations of the old address space are forgotten, or with PCIDs
    /// kept for its return.
    pub(crate) fn set_cr3(&mut self, value: u64) -> Step {
        let tagged = self.state.cr4.contains(Cr4::PCIDE);
        let keep = tagged && value & CR3_NO_FLUSH != 0;
        let value = if tagged { value & !CR3_NO_FLUSH } else { value };
        if self.state.long_mode() && value >> PHYS_BITS != 0 {
            return Err(self.gp(0));
        }
        if Self::is_pae(self.state.cr0, self.state.cr4, self.state.efer) {
            self.mmu.pdpte = self.read_pdptes(value)?;
        }
        self.state.cr3 = value;
        self.mmu.switch_space(self.pcid(), keep);
        self.mode_changed();
        Ok(())
    }

    /// A write of CR4.
    pub(crate) fn set_cr4(&mut self, value: u64) -> Step {
        if value & !self.cr4_known().bits() != 0 {
            return Err(self.gp(0));
        }
        let old = self.state.cr4;
        let new = Cr4::from_bits_truncate(value);
        let changed = old ^ new;
        if self.state.long_mode() && !new.contains(Cr4::PAE) {
            return Err(self.gp(0));
        }
        if changed.contains(Cr4::PCIDE) && new.contains(Cr4::PCIDE) {
            let ready = self.state.long_mode() && self.state.cr3 & CR3_PCID == 0;
            if !ready {
                return Err(self.gp(0));
            }
        }
        let pdpte_bits = Cr4::PAE | Cr4::PGE | Cr4::PSE | Cr4::SMEP;
        if Self::is_pae(self.state.cr0, new, self.state.efer) && changed.intersects(pdpte_bits) {
            self.mmu.pdpte = self.read_pdptes(self.state.cr3)?;
        }
        self.state.cr4 = new;
        if changed.intersects(Cr4::PGE | Cr4::PCIDE | Cr4::PAE | Cr4::PSE | Cr4::SMEP | Cr4::SMAP) {
            self.mmu.flush_all();
            // The address-space tags change their meaning with PCIDE.
            self.mmu.flush_non_global(self.pcid());
        }
        self.mode_changed();
        Ok(())
    }

    fn operand_width(op: &Op) -> u64 {
        if op.flags.contains(OpFlags::LONG) { u64::MAX } else { 0xffff_ffff }
    }
}

/// `mov r, crN`.
pub(crate) fn mov_from_cr(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.require_cpl0()?;
    let value = match op.src {
        0 => cpu.state.cr0.bits(),
        2 => cpu.state.cr2,
        3 => cpu.state.cr3,
        4 => cpu.state.cr4.bits(),
        8 => u64::from(cpu.env.task_priority()) & CR8_CLASS,
        _ => return Err(cpu.ud()),
    };
    *cpu.state.gpr_slot_mut(op.dst) = value & Vcpu::operand_width(op);
    Ok(())
}

/// `mov crN, r`.
pub(crate) fn mov_to_cr(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.require_cpl0()?;
    let value = cpu.state.gpr_slot(op.src) & Vcpu::operand_width(op);
    match op.dst {
        0 => cpu.set_cr0(value)?,
        2 => cpu.state.cr2 = value,
        3 => cpu.set_cr3(value)?,
        4 => cpu.set_cr4(value)?,
        8 => {
            if value & !CR8_CLASS != 0 {
                return Err(cpu.gp(0));
            }
            cpu.env.set_task_priority(value as u8);
        }
        _ => return Err(cpu.ud()),
    }
    cpu.end_block(op)
}

/// `clts`.
pub(crate) fn clts(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.require_cpl0()?;
    cpu.state.cr0.remove(Cr0::TS);
    cpu.end_block(op)
}

/// `hlt`.
pub(crate) fn hlt(cpu: &mut Vcpu, op: &Op) -> Step {
    cpu.require_cpl0()?;
    Err(cpu.leave(op, Exit::Halt))
}

/// `invd`, `wbinvd`: there is no cache to write back; host caches are coherent.
pub(crate) fn wbinvd(cpu: &mut Vcpu, _op: &Op) -> Step {
    cpu.require_cpl0()
}

/// `xsetbv`: only XCR0 exists.
pub(crate) fn xsetbv(cpu: &mut Vcpu, op: &Op) -> Step {
    if !cpu.state.cr4.contains(Cr4::OSXSAVE) {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let value = cpu.edx_eax();
    let index = cpu.state.reg(Gpr::Rcx) as u32;
    let incomplete = value & XCR0_X87 == 0 || value & XCR0_AVX != 0 && value & XCR0_SSE == 0;
    if index != 0 || value & !cpu.cpuid.xcr0_supported() != 0 || incomplete {
        return Err(cpu.gp(0));
    }
    cpu.state.xcr0 = value;
    cpu.end_block(op)
}

/// `xgetbv`: XCR0, which any ring may read.
pub(crate) fn xgetbv(cpu: &mut Vcpu, _op: &Op) -> Step {
    if !cpu.state.cr4.contains(Cr4::OSXSAVE) {
        return Err(cpu.ud());
    }
    if cpu.state.reg(Gpr::Rcx) as u32 != 0 {
        return Err(cpu.gp(0));
    }
    cpu.set_edx_eax(cpu.state.xcr0);
    Ok(())
}

impl Vcpu {
    /// EDX:EAX as one value.
    pub(crate) fn edx_eax(&self) -> u64 {
        self.state.reg(Gpr::Rdx) << 32 | self.state.reg(Gpr::Rax) & 0xffff_ffff
    }

    /// Splits `value` into EDX:EAX.
    pub(crate) fn set_edx_eax(&mut self, value: u64) {
        self.state.set_reg32(Gpr::Rax, value as u32);
        self.state.set_reg32(Gpr::Rdx, (value >> 32) as u32);
    }
}
