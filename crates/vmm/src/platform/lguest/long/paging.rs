//! Page tables: the CPU walks the guest's own, so all there is to do is to switch them, and
//! to tell a table that is no memory from an entry with reserved bits.

use lguest_abi::long::Phys;
use softcpu::Vcpu;
use softcpu::addr::{PAGE_OFFSET, PAGE_SIZE};

use super::{LongDeath, LongGuest};

const PRESENT: u64 = 1;
/// Of an entry above the lowest level: it maps a page.
const LARGE: u64 = 0x80;
/// An entry's address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl LongGuest {
    /// NEW_PGTABLE.
    pub(super) fn new_pgtable(&self, cpu: &mut Vcpu, top: Phys) -> Result<(), LongDeath> {
        if top.0 & PAGE_OFFSET != 0 || !self.ram.holds(top, PAGE_SIZE) {
            return Err(LongDeath::Table(top.0));
        }
        cpu.load_cr3(top.0).map_err(|_| LongDeath::Table(top.0))
    }

    /// The table on the way to `at` that lies outside of memory, if one does: the CPU reads
    /// ones there, and faults for their reserved bits.
    pub(super) fn stray_table(&self, cpu: &Vcpu, at: u64) -> Option<u64> {
        let end = self.ram.end().saturating_add(self.bus_len);
        let mut table = cpu.state.cr3 & ADDRESS;
        for shift in [39_u32, 30, 21, 12] {
            if table >= end {
                return Some(table);
            }
            let index = at.wrapping_shr(shift) & 0x1ff;
            let entry = self.ram.word64(table | index << 3);
            if entry & PRESENT == 0 || shift != 39 && entry & LARGE != 0 {
                return None;
            }
            table = entry & ADDRESS;
        }
        None
    }
}
