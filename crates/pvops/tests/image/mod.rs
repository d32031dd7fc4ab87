//! This very program in ring 0: the soft engine with the program's own text and data at
//! their own addresses, copied in page by page as they are touched, and one call site
//! beside them. What runs there is what ships, compiled callees and all.

use pvops::convention::X86_64;
use pvops::engine::{State, Subject, rewrite};
use pvops::family::OpInfo;
use pvops::plan::original;
use pvops::{CallKind, Erased, Gpr, Report, Site, Sites, Text, TextError, Why, Width};
use softcpu::Exit;
use softcpu::state::rflags::RFlags;
use softcpu::state::segment::{SegReg, Segment};
use softcpu::testing::TestMachine;
use std::collections::BTreeSet;

/// Data that ops are given: identity-mapped.
pub(crate) const DATA: u64 = 0x5000;
/// The stack, and the one for entries from user mode.
pub(crate) const STACK: u64 = 0x8_0000;
const ENTRY_STACK: u64 = 0x9_0000;
/// Code that user mode is left to: two bytes of undefined instruction.
pub(crate) const USER: u64 = 0xa000;
/// Tables: GDT, IDT, TSS.
pub(crate) const GDT: u64 = 0x7000;
const IDT: u64 = 0xb000;
const TSS: u64 = 0xc000;
/// Where a page fault, a general protection fault and an undefined instruction lead.
const PAGE_FAULT: u64 = 0xd000;
const PROTECTION: u64 = 0xd100;
const UNDEFINED: u64 = 0xd200;
/// Physical home of the site and of the copied pages.
const SITE_PAGE: u64 = 0x1_0000;
const POOL: u64 = 0x10_0000;
const POOL_END: u64 = 0x3f_8000;
const PAGE: u64 = 4096;

/// What the rig's kernel answers for a performance counter.
pub(crate) const COUNTER: u64 = 0x1122_3344_5566_7788;

/// What runs at the site besides its op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It falls through.
    Returns,
    /// It leaves for [`USER`], where the first instruction ends the run.
    Leaves,
}

/// A run's ends: all general registers, flags, and the memory at [`DATA`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct After {
    pub(crate) gpr: [u64; 16],
    pub(crate) flags: RFlags,
    pub(crate) data: Vec<u8>,
    /// Privilege level and place at the end.
    pub(crate) place: (u16, u64),
}

/// A machine with one site.
pub(crate) struct Image {
    pub(crate) machine: TestMachine,
    site: Site,
    slot: u64,
    next: u64,
    pages: Vec<(u64, u64)>,
}

/// Pages of this program that runs have touched so far.
pub(crate) type Touched = BTreeSet<u64>;

/// An address near this program's text, and where nothing of it is: for sites and thunks.
pub(crate) fn near() -> u64 {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let start = maps.lines().next().and_then(|l| l.split_once('-')).expect("a first line").0;
    let first = u64::from_str_radix(start, 16).expect("hexadecimal");
    assert!((image as fn() -> u64) as usize as u64 >= first);
    first - 16 * PAGE
}

fn image() -> u64 {
    0
}

impl Image {
    /// A site of that kind and length that calls through a slot with `target`, whose text
    /// follows `extra` if that is not empty: a thunk, say.
    pub(crate) fn new(
        kind: CallKind,
        len: u8,
        target: u64,
        extra: &[u8],
        touched: &Touched,
    ) -> Self {
        let address = near();
        let slot = address + 0x800;
        let site = Site { address, slot, len, kind, clobbers: X86_64.clobbers(kind) };
        let machine = TestMachine::long_mode();
        let mut image = Self { machine, site, slot, next: POOL, pages: vec![] };
        image.map(address, SITE_PAGE);
        image.put(address, original(&site, Width::Bits64, Why::Unpatched).bytes());
        image.put(address + u64::from(len), &[0xf4]); // hlt
        image.put(slot, &target.to_le_bytes());
        image.put(Self::extra(), extra);
        for page in touched {
            image.copy_in(*page);
        }
        image.tables();
        image
    }

    /// Where `new` puts its extra text.
    pub(crate) fn extra() -> u64 {
        near() + 0x200
    }

    /// GDT, IDT with three handlers, TSS.
    fn tables(&mut self) {
        let m = &self.machine;
        // Kernel code and data at 0x10, a TSS at 0x20, user's 32-bit code and data at 0x30
        // and 0x38, 64-bit code at 0x40; as SYSRET and SYSEXIT count from them.
        let tss = (TSS & 0xff_ffff) << 16 | 0x67 | 0x89 << 40 | (TSS >> 24) << 56;
        let gdt = [
            0,
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            tss,
            0,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
        ];
        for (i, entry) in gdt.iter().enumerate() {
            m.put(GDT + i as u64 * 8, &u64::to_le_bytes(*entry));
        }
        for (vector, handler) in [(6, UNDEFINED), (13, PROTECTION), (14, PAGE_FAULT)] {
            let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16) << 48;
            m.put(IDT + vector * 16, &low.to_le_bytes());
            m.put(IDT + vector * 16 + 8, &[0; 8]);
        }
        m.put(TSS + 4, &ENTRY_STACK.to_le_bytes());
        m.put(PAGE_FAULT, &[0xf4]);
        m.put(UNDEFINED, &[0xf4]);
        // The CPU has no performance counters; this kernel has one:
        // mov eax, low; mov edx, high; add qword [rsp + 8], 2; add rsp, 8; iretq
        let mut counter = vec![0xb8];
        counter.extend((COUNTER as u32).to_le_bytes());
        counter.push(0xba);
        counter.extend(((COUNTER >> 32) as u32).to_le_bytes());
        counter.extend([0x48, 0x83, 0x44, 0x24, 8, 2, 0x48, 0x83, 0xc4, 8, 0x48, 0xcf]);
        m.put(PROTECTION, &counter);
        m.put(USER, &[0x0f, 0x0b]);
        let state = &mut self.machine.vcpu.state;
        (state.gdtr.base, state.gdtr.limit) = (GDT, 9 * 8 - 1);
        (state.idtr.base, state.idtr.limit) = (IDT, 15 * 16 - 1);
        state.tr = Segment::from_descriptor(0x20, tss);
        state.efer |= softcpu::state::control::Efer::SCE;
        // SYSRET: 32-bit code at base, data 8 after it, 64-bit code 16 after it. SYSEXIT to
        // 32-bit code: 16 and 24 after its base.
        state.msr.star = 0x30 << 48 | 0x10 << 32;
        state.msr.sysenter_cs = 0x20;
        state.msr.kernel_gs_base = 0x1234_5000;
        state.segment_mut(SegReg::Gs).base = 0x6000;
    }

    /// Maps a page of the program's half of the address space.
    fn map(&mut self, page: u64, physical: u64) {
        let mut table = self.machine.vcpu.state.cr3;
        for level in [39, 30, 21] {
            let entry = table + (page >> level & 0x1ff) * 8;
            let now = u64::from_le_bytes(self.machine.get(entry, 8).try_into().expect("eight"));
            table = if now & 1 == 0 {
                let fresh = self.page();
                self.machine.put(entry, &(fresh | 0x67).to_le_bytes());
                fresh
            } else {
                now & !0xfff
            };
        }
        self.machine.put(table + (page >> 12 & 0x1ff) * 8, &(physical | 0x67).to_le_bytes());
        self.pages.push((page, physical));
    }

    fn page(&mut self) -> u64 {
        let page = self.next;
        self.next += PAGE;
        assert!(self.next <= POOL_END, "the rig's memory is full");
        page
    }

    /// A copy of one of this program's own pages.
    fn copy_in(&mut self, page: u64) {
        let physical = self.page();
        // SAFETY: `run` looked the page up among the program's mappings. Nobody writes it
        // meanwhile but other tests' counters, of which any value will do.
        let bytes: Vec<u8> = (page..page + PAGE)
            .map(|a| unsafe { std::ptr::with_exposed_provenance::<u8>(a as usize).read_volatile() })
            .collect();
        self.machine.put(physical, &bytes);
        self.map(page, physical);
    }

    /// Where an address is in the machine's memory.
    fn physical(&self, address: u64) -> Option<u64> {
        let page = self.pages.iter().find(|(page, _)| address & !0xfff == *page);
        page.map(|(page, physical)| address - page + physical)
    }

    /// Stores to the program's copy.
    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.machine.put(self.physical(address).expect("mapped"), bytes);
    }

    /// Patches the site to the best form of `bound`.
    pub(crate) fn patch(&mut self, bound: Erased) -> Report {
        let (kind, slot) = (self.site.kind, self.slot);
        let info = OpInfo { name: "op", sites: Some(kind), args: 0, returns: false };
        let ops: &'static [OpInfo] = Box::leak(Box::new([info]));
        let width = Width::Bits64;
        let index_of = |address| (address == slot).then_some(0);
        let subject = Subject { family: "image", ops, width, index_of };
        let base = near() + 0x400;
        let mut record = vec![];
        record.extend((self.site.address.wrapping_sub(base) as i32).to_le_bytes());
        record.extend((slot.wrapping_sub(base + 4) as i32).to_le_bytes());
        record.extend([self.site.len, kind as u8]);
        record.extend(self.site.clobbers.bits().to_le_bytes());
        // SAFETY: one record of the site that `new` put there.
        let sites = unsafe { Sites::new(&record, base) }.expect("a whole record");
        let old = |_| State::Original;
        // SAFETY: nobody executes it but the machine.
        unsafe { rewrite(&subject, sites, self, old, |_| State::Bound(bound), |_| ()) }
            .expect("patched")
    }

    /// Runs the site, with patterns in every register but those of `set`. `Err` when it
    /// touched a page of the program that is not there yet: noted for the next try.
    pub(crate) fn run(
        &mut self,
        set: &[(Gpr, u64)],
        flags: RFlags,
        end: End,
        touched: &mut Touched,
    ) -> Result<(After, After), ()> {
        let mut before = Gpr::ALL.map(pvops::probe::pattern);
        before[Gpr::Rsp as usize] = STACK;
        for (register, value) in set {
            before[*register as usize] = *value;
        }
        let state = &mut self.machine.vcpu.state;
        state.gpr[..16].copy_from_slice(&before);
        state.rip = self.site.address;
        state.rflags = flags;
        self.machine.vcpu.state_changed();
        let data = self.machine.get(DATA, 0x400);
        let place = (0, self.site.address);
        let before = After { gpr: before, flags, data, place };
        let after_site = self.site.address + u64::from(self.site.len) + 1;
        // Ops that halt go on as if an interrupt had come.
        for _ in 0..4 {
            assert_eq!(self.machine.vcpu.run(), Exit::Halt, "{:x?}", self.machine.vcpu.state);
            let state = &self.machine.vcpu.state;
            let mut gpr = [0; 16];
            gpr.copy_from_slice(&state.gpr[..16]);
            let data = self.machine.get(DATA, 0x400);
            let rip = state.rip;
            if rip == PAGE_FAULT + 1 {
                let page = state.cr2 & !0xfff;
                assert!(is_ours(page) && touched.insert(page), "page fault at {:#x}", state.cr2);
                return Err(());
            }
            if end == End::Returns && rip == after_site {
                let place = (state.cpl().into(), rip);
                return Ok((before, After { gpr, flags: state.rflags, data, place }));
            }
            if end == End::Leaves && rip == UNDEFINED + 1 {
                // What the entry from user mode pushed: RIP, CS, RFLAGS, RSP, SS.
                let word = |n: u64| {
                    let bytes = self.machine.get(ENTRY_STACK - 40 + n * 8, 8);
                    u64::from_le_bytes(bytes.try_into().expect("eight"))
                };
                let flags = RFlags::from_bits_retain(word(2));
                gpr[Gpr::Rsp as usize] = word(3);
                let place = (word(1) as u16 & 3, word(0));
                return Ok((before, After { gpr, flags, data, place }));
            }
        }
        panic!("still at {:#x}", self.machine.vcpu.state.rip);
    }
}

/// Whether a page is one of this program's, readable.
fn is_ours(page: u64) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    maps.lines().any(|line| {
        let (range, rest) = line.split_once(' ').expect("a range");
        let (start, end) = range.split_once('-').expect("two ends");
        let ends = [start, end].map(|e| u64::from_str_radix(e, 16).expect("hexadecimal"));
        (ends[0]..ends[1]).contains(&page) && rest.starts_with('r')
    })
}

// SAFETY: the machine does not run meanwhile, and its engine watches its code for writes.
unsafe impl Text for Image {
    fn covers(&self, address: u64, len: usize) -> Result<(), TextError> {
        let end = self.physical(address + len as u64);
        self.physical(address).and(end).map(|_| ()).ok_or(TextError::OutsideWindow)
    }
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), TextError> {
        let physical = self.physical(address).ok_or(TextError::OutsideWindow)?;
        bytes.copy_from_slice(&self.machine.get(physical, bytes.len()));
        Ok(())
    }
    unsafe fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), TextError> {
        self.put(address, bytes);
        Ok(())
    }
}

/// The general registers that differ.
pub(crate) fn changed(before: &After, after: &After) -> pvops::RegSet {
    let differ = |r: &Gpr| before.gpr[*r as usize] != after.gpr[*r as usize];
    pvops::RegSet::of(&Gpr::ALL.into_iter().filter(differ).collect::<Vec<_>>())
}
