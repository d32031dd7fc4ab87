//! Page tables: whose they are, which format they have, and what a guest's words about
//! them change.
//!
//! The CPU walks the guest's own tables, so nothing is shadowed: a call that says that an
//! entry has changed comes down to what a TLB must forget. Old guests (V1 to V4) start on
//! tables that the host made; newer ones at physical addresses, until they name their
//! first own table. Whether a guest's tables are PAE it never says: they show it.
//!
//! What may be in an entry are the rules of [`lguest_abi::tables`]. The old host applied them
//! where it copied an entry to its shadow, which is when it is used, or handed over with the
//! marks of use. Here the CPU refuses the flags on its walk.

use lguest_abi::boot::{PAGE, PDPT_FLAGS, TABLE_FLAGS, TablePlacement};
use lguest_abi::tables::{ACCESSED, BadEntry, DIRTY, LARGE_OR_PAT, Level, UPPER_ALLOWED, frame};
use lguest_abi::{Band, Paging, Phys, Virt};
use softcpu::mmu::RefusedFlags;
use softcpu::state::control::{Cr0, Cr4};
use softcpu::supervisor::Paging as CpuPaging;
use softcpu::{GuestPhysAddr, Vcpu};

use super::guest_memory::GuestMemory;
use super::{Death, Lguest, Session};

const PRESENT: u64 = 1;
/// Flags of an entry, of either format.
const FLAGS: u64 = 0xfff;
/// What the CPU refuses on its walk.
pub(super) const REFUSED: RefusedFlags =
    RefusedFlags { upper: FLAGS & !UPPER_ALLOWED, lowest: LARGE_OR_PAT };
/// Frames of 32 address bits, for where devices may be anywhere.
const ALL_FRAMES: u32 = 1 << 20;
/// log2 of what a top-level entry covers, without and with PAE.
const TWO_LEVEL_SHIFT: u32 = 22;
const PAE_SHIFT: u32 = 30;
/// The same of an entry of the lowest level.
const PAGE_SHIFT: u32 = 12;
/// Entries of a directory without PAE.
const DIRECTORY_ENTRIES: u32 = 1024;
/// Where kernels lie, and how far their text is looked through.
const KERNEL_TEXT: std::ops::Range<u32> = 0x10_0000..0x400_0000;
/// How much is looked at at once, and how much of it again with the next.
const STRETCH: usize = 0x1_0000;
const OVERLAP: usize = 64;

impl Lguest {
    /// Makes the page tables that V1 to V4 start on; returns their top level.
    pub(super) fn make_first_tables(
        &self,
        format: Paging,
        kernel_address: u32,
    ) -> Result<Phys, Death> {
        let died = Death::NoRoomForTables(format);
        let place = TablePlacement::of(format, self.ram, self.initrd).ok_or(died)?;
        let frames = self.ram / PAGE;
        let entry =
            |frame: u32| if frame < frames { frame.wrapping_mul(PAGE) | TABLE_FLAGS } else { 0 };
        let table = |n: u32| place.tables.wrapping_add(n.wrapping_mul(PAGE)) | TABLE_FLAGS;
        let memory = &self.memory;
        match format {
            Paging::TwoLevel => {
                let all = 0..place.count.saturating_mul(DIRECTORY_ENTRIES);
                memory.write(Phys(place.tables), &words(all.map(entry)))?;
                let mut top = [0; DIRECTORY_ENTRIES as usize];
                for first in [0, kernel_address >> TWO_LEVEL_SHIFT] {
                    let slots = top.iter_mut().skip(first as usize);
                    slots.zip(0..place.count).for_each(|(slot, n)| *slot = table(n));
                }
                memory.write(Phys(place.pgdir), &words(top))?;
            }
            Paging::Pae => {
                let pmd = place.pmd.ok_or(died)?;
                let wide = |low: u32| [low, 0];
                let all = 0..place.count.saturating_mul(DIRECTORY_ENTRIES / 2);
                memory.write(Phys(place.tables), &words(all.flat_map(|n| wide(entry(n)))))?;
                let middle = (0..DIRECTORY_ENTRIES / 2)
                    .flat_map(|n| wide(if n < place.count { table(n) } else { 0 }));
                memory.write(Phys(pmd), &words(middle))?;
                let kernel = kernel_address >> PAE_SHIFT;
                let top = (0..DIRECTORY_ENTRIES / 2)
                    .flat_map(|n| wide(if n == 0 || n == kernel { pmd | PDPT_FLAGS } else { 0 }));
                memory.write(Phys(place.pgdir), &words(top))?;
            }
        }
        Ok(Phys(place.pgdir))
    }

    /// NEW_PGTABLE.
    pub(super) fn new_pgtable(&mut self, cpu: &mut Vcpu, top: Phys) -> Result<(), Death> {
        // Enough for PAE's four entries; a directory's page lies in the same memory.
        self.memory.check(top, 32)?;
        let Some(session) = &mut self.session else { return Ok(()) };
        if !session.on_first_tables {
            return load_top(cpu, session.paging, top);
        }
        let kernel = session.fields.kernel_address;
        session.paging = if session.band.may_have_pae() {
            format_of(&self.memory, top, kernel).ok_or(Death::UnknownPaging(top))?
        } else {
            Paging::TwoLevel
        };
        session.on_first_tables = false;
        tracing::debug!(format = ?session.paging, %top, "the guest's own page tables");
        enter(cpu, session.paging, top)
    }

    /// SET_PTE: the entry for `at` has changed, in whichever table. Only the current one
    /// has cached translations.
    pub(super) fn set_pte(&self, cpu: &mut Vcpu, at: Virt, entry: u64) -> Result<(), Death> {
        cpu.flush_page(at.0.into());
        let Some(session) = &self.session else { return Ok(()) };
        if entry & (ACCESSED | DIRTY) != 0 {
            // It would have been in use from now on.
            let limit = match session.band {
                Band::V6 => ALL_FRAMES,
                _ => self.frames(),
            };
            frame(session.paging, Level::Page, entry, limit)?;
        }
        Ok(())
    }

    /// Where the guest's frames end.
    fn frames(&self) -> u32 {
        u32::try_from(self.memory.limit() >> PAGE_SHIFT).unwrap_or(ALL_FRAMES)
    }

    /// Which entry on the way to `at` the CPU has refused; `None` if it is a lawful one by now.
    pub(super) fn bad_entry(&self, cpu: &Vcpu, at: u32) -> Option<BadEntry> {
        let format = self.session.as_ref()?.paging;
        let top = cpu.state.cr3 as u32;
        let (mut table, levels) = match format {
            Paging::TwoLevel => (
                top & !0xfff,
                [(Level::Top, TWO_LEVEL_SHIFT, 10), (Level::Page, PAGE_SHIFT, 10)].as_slice(),
            ),
            Paging::Pae => (
                top & !0x1f,
                [(Level::Top, PAE_SHIFT, 2), (Level::Middle, 21, 9), (Level::Page, PAGE_SHIFT, 9)]
                    .as_slice(),
            ),
        };
        for (level, shift, bits) in levels {
            let index = at.wrapping_shr(*shift) & 1_u32.wrapping_shl(*bits).wrapping_sub(1);
            let word = |n: u32| self.memory.word(Phys(table.wrapping_add(n.wrapping_mul(4)))).ok();
            let entry = match format {
                Paging::TwoLevel => word(index)?.into(),
                Paging::Pae => {
                    let low = index.wrapping_mul(2);
                    u64::from(word(low.wrapping_add(1))?) << 32 | u64::from(word(low)?)
                }
            };
            match frame(format, *level, entry, self.frames()) {
                Ok(next) => table = next?.wrapping_mul(PAGE),
                Err(bad) => return Some(bad),
            }
        }
        None
    }

    /// SET_PGD: an entry of a top level has changed.
    pub(super) fn set_pgd(&self, cpu: &mut Vcpu, index: u32) -> Result<(), Death> {
        let Some(session) = &self.session else { return Ok(()) };
        let entries = match session.paging {
            Paging::TwoLevel => DIRECTORY_ENTRIES,
            Paging::Pae => 4,
        };
        match session.band {
            Band::V5 | Band::V6 if index > entries => Err(Death::TopLevelIndex(index)),
            _ => Self::flush(session, cpu),
        }
    }

    /// Forgets all translations, and reads PAE's top-level entries anew.
    pub(super) fn flush_tlb(&self, cpu: &mut Vcpu) -> Result<(), Death> {
        self.session.as_ref().map_or(Ok(()), |session| Self::flush(session, cpu))
    }

    fn flush(session: &Session, cpu: &mut Vcpu) -> Result<(), Death> {
        if !cpu.state.cr0.contains(Cr0::PG) {
            return Ok(());
        }
        // No translation is global here, and none of another address space is kept.
        debug_assert!(!session.on_first_tables || session.band < Band::V5);
        let top = cpu.state.cr3 as u32;
        load_top(cpu, session.paging, Phys(top))
    }
}

/// Goes on with the tables at `top`, of the format in force.
fn load_top(cpu: &mut Vcpu, format: Paging, top: Phys) -> Result<(), Death> {
    check_top(cpu, format, top)?;
    cpu.load_cr3(top.0).map_err(|_| Death::BadPageTable(top))
}

/// PAE's four entries, which the CPU reads at once: they may have no flag but that they are
/// there. Where they lead counts when they are used.
fn check_top(cpu: &Vcpu, format: Paging, top: Phys) -> Result<(), Death> {
    if format == Paging::TwoLevel {
        return Ok(());
    }
    let mut table = [0; 32];
    if !cpu.memory().read(GuestPhysAddr(u64::from(top.0 & !0x1f)), &mut table) {
        return Err(Death::BadPageTable(top));
    }
    for entry in table.as_chunks().0 {
        match frame(format, Level::Top, u64::from_le_bytes(*entry), ALL_FRAMES) {
            Err(bad @ BadEntry::Flags { .. }) => return Err(bad.into()),
            Ok(_) | Err(BadEntry::Frame { .. }) => {}
        }
    }
    Ok(())
}

/// Switches to the tables at `top`.
pub(super) fn enter(cpu: &mut Vcpu, format: Paging, top: Phys) -> Result<(), Death> {
    check_top(cpu, format, top)?;
    let mut cr4 = cpu.state.cr4;
    cr4.set(Cr4::PAE, format == Paging::Pae);
    let paging = CpuPaging { cr0: cpu.state.cr0 | Cr0::PG, cr3: top.0, cr4 };
    cpu.load_paging(paging).map_err(|_| Death::BadPageTable(top))
}

fn words(words: impl IntoIterator<Item = u32>) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// The format of the top level at `top`, by its entry for the kernel: that of a PDPT has
/// the present flag and no other, that of a directory has more.
fn format_of(memory: &GuestMemory, top: Phys, kernel_address: u32) -> Option<Paging> {
    let word = |offset: u32| memory.word(Phys(top.0.wrapping_add(offset))).map_or(0, u64::from);
    let inside = |entry: u64| entry & PRESENT != 0 && entry & !FLAGS < memory.limit();
    let slot = (kernel_address >> PAE_SHIFT).wrapping_mul(8);
    let pdpte = word(slot.wrapping_add(4)) << 32 | word(slot);
    if inside(pdpte) && pdpte & FLAGS == u64::from(PDPT_FLAGS) {
        return Some(Paging::Pae);
    }
    let pde = word((kernel_address >> TWO_LEVEL_SHIFT).wrapping_mul(4));
    let directory = inside(pde) && pde & REFUSED.upper == 0;
    directory.then_some(Paging::TwoLevel)
}

/// Whether the kernel's text makes the call SET_PMD, which only kernels with PAE do: `mov
/// eax, 13` and soon after it the instruction that traps. For the bands whose first tables
/// must have the right format before the guest has shown any.
pub(super) fn calls_set_pmd(memory: &GuestMemory) -> bool {
    const NUMBER: [u8; 5] = [0xb8, lguest_abi::call::number::SET_PMD as u8, 0, 0, 0];
    const NEAR: usize = 40;
    let traps = |code: &[u8]| {
        let near = code.get(..code.len().min(NEAR)).unwrap_or(code);
        let calls = [lguest_abi::band::Trap::Int1f, lguest_abi::band::Trap::Vmcall];
        calls.iter().any(|trap| {
            let bytes = trap.bytes();
            near.windows(bytes.len()).any(|window| window == bytes)
        })
    };
    KERNEL_TEXT.step_by(STRETCH).any(|at| {
        let text = memory.up_to(Phys(at), STRETCH.saturating_add(OVERLAP));
        let mut rest = text.as_slice();
        while let Some(at) = rest.windows(NUMBER.len()).position(|window| window == NUMBER) {
            rest = rest.get(at.saturating_add(NUMBER.len())..).unwrap_or_default();
            if traps(rest) {
                return true;
            }
        }
        false
    })
}
