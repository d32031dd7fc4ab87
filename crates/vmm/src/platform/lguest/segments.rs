//! The GDT that the host keeps for the guest, and segment registers after changes to it.
//!
//! On the old host every way back into the guest reloaded all segment registers from the
//! table, and guests rely on it: new TLS descriptors take effect without a load. So a
//! register whose descriptor has changed is loaded again here; if it cannot be, a data
//! register becomes null, and CS or SS is the guest's end.

use lguest_abi::entry;
use lguest_abi::segments::{Descriptor, GDT_ENTRIES, KERNEL_CS, KERNEL_DS, Stored, TLS_FIRST};
use softcpu::Vcpu;
use softcpu::state::segment::{Access, SegReg, Segment};

use super::Death;

/// The table.
#[derive(Clone, Debug)]
pub(super) struct Gdt {
    entries: [u64; GDT_ENTRIES],
}

impl Gdt {
    /// What a guest starts with: flat code and data for ring 1.
    pub(super) fn new() -> Self {
        let mut gdt = Self { entries: [0; GDT_ENTRIES] };
        for (index, descriptor) in [(KERNEL_CS, entry::CODE), (KERNEL_DS, entry::DATA)] {
            if let Some(slot) = gdt.entries.get_mut(index) {
                *slot = descriptor.0;
            }
        }
        gdt
    }

    /// The table as the CPU is to have it.
    pub(super) fn entries(&self) -> &[u64] {
        &self.entries
    }

    /// Replaces one entry.
    pub(super) fn set(&mut self, index: u32, descriptor: Descriptor) -> Result<(), Death> {
        let died = Death::DescriptorIndex(index);
        let Stored::Used(descriptor) = Descriptor::accept(index, descriptor).ok_or(died)? else {
            return Ok(());
        };
        *self.entries.get_mut(index as usize).ok_or(died)? = descriptor.0;
        Ok(())
    }

    /// Replaces entries from `first` on by those in `bytes`.
    pub(super) fn set_all(&mut self, first: u32, bytes: &[u8]) -> Result<(), Death> {
        let (descriptors, _) = bytes.as_chunks();
        for (index, raw) in (first..).zip(descriptors) {
            self.set(index, Descriptor(u64::from_le_bytes(*raw)))?;
        }
        Ok(())
    }

    /// Replaces the three TLS entries.
    pub(super) fn set_tls(&mut self, bytes: &[u8]) -> Result<(), Death> {
        self.set_all(TLS_FIRST as u32, bytes)
    }

    fn segment(&self, selector: u16) -> Option<Segment> {
        let local = selector & 4 != 0;
        let raw = self.entries.get(usize::from(selector >> 3)).filter(|_| !local)?;
        let segment = Segment::from_descriptor(selector, *raw);
        segment.access.contains(Access::PRESENT | Access::CODE_OR_DATA).then_some(segment)
    }

    /// The code segment that handlers run in: ring 1.
    pub(super) fn kernel_code(&self) -> Result<Segment, Death> {
        self.segment(entry::CS)
            .filter(|code| {
                let conforming = code.access.contains(Access::DOWN_OR_CONFORMING);
                code.access.contains(Access::CODE) && code.dpl() == 1 && !conforming
            })
            .ok_or(Death::KernelCode)
    }

    /// The stack segment for ring 1 that `selector` names.
    pub(super) fn kernel_stack(&self, selector: u16) -> Result<Segment, Death> {
        self.segment(selector)
            .filter(|stack| {
                let writable = stack.access.contains(Access::WRITE_OR_READ);
                !stack.access.contains(Access::CODE) && writable && stack.dpl() == 1
            })
            .filter(|_| selector & 3 == 1)
            .ok_or(Death::StackSegment(selector.into()))
    }

    /// Gives the CPU the table, and loads again what has changed under a register.
    pub(super) fn install(&self, cpu: &mut Vcpu) -> Result<(), Death> {
        cpu.hold_descriptors(&self.entries);
        for (reg, name) in [(SegReg::Cs, "CS"), (SegReg::Ss, "SS")] {
            let held = *cpu.state.segment(reg);
            let fresh = self.segment(held.selector).filter(|new| same_kind(new, &held));
            *cpu.state.segment_mut(reg) = fresh.ok_or(Death::SegmentInUse(name))?;
        }
        for reg in [SegReg::Ds, SegReg::Es, SegReg::Fs, SegReg::Gs] {
            let selector = cpu.state.segment(reg).selector;
            if selector & !3 == 0 {
                continue;
            }
            let cpl = cpu.state.cpl();
            let usable = |new: &Segment| {
                let readable = !new.access.contains(Access::CODE)
                    || new.access.contains(Access::WRITE_OR_READ);
                readable && new.dpl() >= cpl.max((selector & 3) as u8)
            };
            *cpu.state.segment_mut(reg) =
                self.segment(selector).filter(usable).unwrap_or(Segment::null(0));
        }
        cpu.segments_changed();
        Ok(())
    }
}

/// Whether a register that held `old` could hold `new` in the same ring.
fn same_kind(new: &Segment, old: &Segment) -> bool {
    let kind = Access::CODE | Access::WRITE_OR_READ | Access::DPL;
    let conforming = Access::DOWN_OR_CONFORMING;
    new.access & kind == old.access & kind
        && (!new.access.contains(Access::CODE) || !new.access.contains(conforming))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ring_1_segments_serve_handlers() {
        let mut gdt = Gdt::new();
        assert_eq!(gdt.kernel_code().unwrap().dpl(), 1);
        assert_eq!(gdt.kernel_stack(entry::DS).unwrap().selector, entry::DS);
        assert_eq!(gdt.kernel_stack(0x68), Err(Death::StackSegment(0x68)));
        assert_eq!(gdt.kernel_stack(0x61), Err(Death::StackSegment(0x61)));
        assert_eq!(gdt.kernel_stack(0x6d), Err(Death::StackSegment(0x6d)), "a local one");
        assert_eq!(gdt.kernel_stack(0xfff9), Err(Death::StackSegment(0xfff9)));
        // Data for ring 3, then nothing.
        for raw in [0x00cf_f300_0000_ffff, 0] {
            gdt.set(12, Descriptor(raw)).unwrap();
            assert_eq!(gdt.kernel_code(), Err(Death::KernelCode));
        }
        assert_eq!(gdt.set(32, Descriptor(0)), Err(Death::DescriptorIndex(32)));
    }

    #[test]
    fn what_is_the_hosts_stays_empty() {
        let mut gdt = Gdt::new();
        gdt.set_all(0, &[0xff; 8 * GDT_ENTRIES]).unwrap();
        for index in [10, 11, 16, 31] {
            assert_eq!(gdt.entries()[index], 0);
        }
        assert_ne!(gdt.entries()[6], 0);
        gdt.set_tls(&[0; 24]).unwrap();
        assert!(gdt.entries()[6..9].iter().all(|raw| raw & 1 << 47 == 0));
    }
}
