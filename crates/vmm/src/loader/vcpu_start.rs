//! The registers the first vCPU starts with, and the tables they point to: what a boot
//! loader would have set up before it jumps to the kernel.
//!
//! Sources: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"; xen/docs/misc/pvh
//! "x86 PVH guest direct boot"; Multiboot Specification 0.6.96, section 3.2.

use softcpu::VcpuState;
use softcpu::addr::PAGE_SIZE;
use softcpu::state::control::{Cr0, Cr4, Efer};
use softcpu::state::regs::Gpr;
use softcpu::state::segment::{DescriptorTable, SegReg, Segment};

use super::EntryPoint;
use super::error::PlaceError;
use super::multiboot::BOOTLOADER_MAGIC;
use super::place::Placer;
use crate::layout::{BOOT_GDT, BOOT_PAGE_TABLES};

/// Code, base 0, limit 4 GiB, 64-bit, readable.
const CODE64: u64 = 0x00af_9b00_0000_ffff;
/// Code, base 0, limit 4 GiB, 32-bit, readable.
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
/// Data, base 0, limit 4 GiB, writable.
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// The descriptor table. Linux's protocol wants code at selector 0x10 and data at 0x18
/// (`__BOOT_CS`, `__BOOT_DS`); the 32-bit entries use 0x08 for code and the same data.
const GDT: [u64; 4] = [0, CODE32, CODE64, DATA];
const CODE32_SELECTOR: u16 = 0x08;
const CODE64_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

/// Page table entry: present, writable.
const PRESENT_WRITABLE: u64 = 0b11;
/// Page directory entry: maps 2 MiB.
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_SHIFT: u32 = 21;
const ENTRIES: u64 = 512;
/// Page directories: one per GiB that is mapped.
const DIRECTORIES: u64 = 4;

/// IA32_MTRR_DEF_TYPE: enabled, default type write-back; no ranges.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Writes the descriptor table.
pub(super) fn place_descriptors(placer: &mut Placer<'_>) -> Result<(), PlaceError> {
    let gdt: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let end = BOOT_GDT.0.saturating_add(gdt.len() as u64);
    placer.put(BOOT_GDT.0..end, &gdt, "descriptor table")
}

/// Writes page tables that map the first 4 GiB to themselves.
pub(super) fn place_page_tables(placer: &mut Placer<'_>) -> Result<(), PlaceError> {
    let tables: Vec<u8> = page_tables().flat_map(u64::to_le_bytes).collect();
    placer.put(BOOT_PAGE_TABLES, &tables, "page tables")
}

/// The entries of one PML4, one PDPT and the directories, page after page.
fn page_tables() -> impl Iterator<Item = u64> {
    let filled = |used: u64, entry: fn(u64) -> u64| {
        (0..ENTRIES).map(move |n| if n < used { entry(n) } else { 0 })
    };
    let pml4 = filled(1, |_| pointer_to(1));
    let pdpt = filled(DIRECTORIES, |n| pointer_to(n.saturating_add(2)));
    let pages = (0..ENTRIES.saturating_mul(DIRECTORIES))
        .map(|n| n << LARGE_PAGE_SHIFT | LARGE_PAGE | PRESENT_WRITABLE);
    pml4.chain(pdpt).chain(pages)
}

/// An entry that points to the n-th page of the tables.
fn pointer_to(n: u64) -> u64 {
    BOOT_PAGE_TABLES.start.saturating_add(PAGE_SIZE.saturating_mul(n)) | PRESENT_WRITABLE
}

/// Sets the model-specific registers that firmware sets up on every CPU before any kernel
/// runs, and that neither RESET nor INIT does: memory is write-back unless page tables
/// say otherwise (Linux gives up on PAT when it finds MTRRs disabled).
///
/// To be applied to every vCPU when it is created, on top of its reset state.
pub fn set_firmware_msrs(state: &mut VcpuState) {
    state.msr.mtrr_def_type = MTRR_ENABLED_WRITE_BACK;
}

impl EntryPoint {
    /// The state in which the first vCPU enters the kernel. [`load`](super::load) has
    /// written the tables it points to.
    #[must_use]
    pub fn vcpu_state(&self) -> VcpuState {
        let mut state = VcpuState::at_reset();
        set_firmware_msrs(&mut state);
        // The limit is a constant that fits.
        state.gdtr = DescriptorTable {
            base: BOOT_GDT.0,
            limit: (size_of_val(&GDT) as u16).saturating_sub(1),
        };
        state.idtr = DescriptorTable { base: 0, limit: 0 };
        for reg in [SegReg::Es, SegReg::Ss, SegReg::Ds, SegReg::Fs, SegReg::Gs] {
            *state.segment_mut(reg) = Segment::from_descriptor(DATA_SELECTOR, DATA);
        }
        state.cr0 = Cr0::PE | Cr0::ET | Cr0::NE;
        match *self {
            Self::Linux64 { rip, boot_params } => {
                state.cr0 |= Cr0::PG | Cr0::WP;
                state.cr3 = BOOT_PAGE_TABLES.start;
                state.cr4 = Cr4::PAE;
                state.efer = Efer::LME | Efer::LMA;
                *state.segment_mut(SegReg::Cs) = Segment::from_descriptor(CODE64_SELECTOR, CODE64);
                state.set_reg(Gpr::Rsi, boot_params.0);
                state.rip = rip.0;
            }
            Self::Pvh { eip, start_info } => {
                *state.segment_mut(SegReg::Cs) = Segment::from_descriptor(CODE32_SELECTOR, CODE32);
                state.set_reg(Gpr::Rbx, start_info.0);
                state.rip = eip.0;
            }
            Self::Multiboot { eip, info } => {
                *state.segment_mut(SegReg::Cs) = Segment::from_descriptor(CODE32_SELECTOR, CODE32);
                state.set_reg(Gpr::Rax, BOOTLOADER_MAGIC.into());
                state.set_reg(Gpr::Rbx, info.0);
                state.rip = eip.0;
            }
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MIN_RAM};
    use softcpu::GuestPhysAddr;
    use softcpu::state::CodeSize;
    use vm_memory::{Bytes, GuestAddress};

    /// Walks the tables as the CPU would.
    fn translate(ram: &GuestRam, cr3: u64, addr: u64) -> Option<u64> {
        let mut table = cr3;
        for shift in [39, 30, 21] {
            let entry: u64 =
                ram.mmap().read_obj(GuestAddress(table + (addr >> shift & 0x1ff) * 8)).unwrap();
            if entry & 1 == 0 {
                return None;
            }
            table = entry & !0xfff;
            if shift == 21 {
                assert_eq!(entry & 0x83, 0x83);
                return Some(table + (addr & 0x1f_ffff));
            }
        }
        unreachable!()
    }

    fn place(ram: &GuestRam) {
        let mut placer = Placer::new(ram);
        place_descriptors(&mut placer).unwrap();
        place_page_tables(&mut placer).unwrap();
    }

    #[test]
    fn the_first_4_gib_map_to_themselves() {
        let ram = GuestRam::new(MIN_RAM).unwrap();
        place(&ram);
        for addr in [0, 0x1234, 0x20_0000, 0x3fff_ffff, 0x4000_0000, 0xfee0_0000, 0xffff_ffff] {
            assert_eq!(translate(&ram, BOOT_PAGE_TABLES.start, addr), Some(addr));
        }
        assert_eq!(translate(&ram, BOOT_PAGE_TABLES.start, 1 << 32), None);
    }

    #[test]
    fn segments_are_what_the_table_says() {
        let ram = GuestRam::new(MIN_RAM).unwrap();
        place(&ram);
        let at = GuestPhysAddr(0x100_0000);
        let entries = [
            (EntryPoint::Linux64 { rip: at, boot_params: at }, CodeSize::Bits64),
            (EntryPoint::Pvh { eip: at, start_info: at }, CodeSize::Bits32),
            (EntryPoint::Multiboot { eip: at, info: at }, CodeSize::Bits32),
        ];
        for (entry, size) in entries {
            let state = entry.vcpu_state();
            assert_eq!((state.code_size(), state.cpl(), state.rip), (size, 0, at.0));
            for reg in [SegReg::Cs, SegReg::Ss, SegReg::Ds] {
                let segment = *state.segment(reg);
                let raw = state.gdtr.base + u64::from(segment.selector);
                assert!(u64::from(segment.selector) < u64::from(state.gdtr.limit));
                let raw = ram.mmap().read_obj(GuestAddress(raw)).unwrap();
                assert_eq!(segment, Segment::from_descriptor(segment.selector, raw));
            }
        }
    }
}
