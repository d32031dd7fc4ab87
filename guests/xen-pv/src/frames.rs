//! Frame conversions on the tables Xen made, with Xen as the judge of what comes of them.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::hypercall;
use crate::say;
use crate::start::StartInfo;
use crate::text::Alias;
use pvops::backend::xen::frames::{self, Frames};
use pvops::families::mmu;
use pvops::families::types::{CpuMask, Mm, Pgd, Pmd, Pte, Pud};
use pvops::{Binding, Bindings, Family, Form, Plain, Sites};

/// Bytes in a page.
pub(crate) const PAGE: usize = 4096;
const FRAME: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;

/// A page of the kernel's that is mapped as need be.
#[repr(C, align(4096))]
pub(crate) struct Page(pub(crate) UnsafeCell<[u8; PAGE]>);
// SAFETY: reached through raw pointers and hypercalls only, on one CPU.
unsafe impl Sync for Page {}

impl Page {
    pub(crate) fn address(&self) -> usize {
        self.0.get().addr()
    }
}

/// Where Xen's table of the machine's frames is (Xen, public/arch-x86/xen-x86_64.h).
const OF_MACHINE: usize = 0xffff_8000_0000_0000;
static MACHINE_FRAMES: AtomicU64 = AtomicU64::new(0);

fn of_machine(machine: u64) -> Option<u64> {
    if machine >= MACHINE_FRAMES.load(Ordering::Relaxed) {
        return None;
    }
    let table = core::ptr::with_exposed_provenance::<u64>(OF_MACHINE);
    // SAFETY: Xen's table. It is asked here for frames of RAM only, where it has no hole.
    Some(unsafe { table.add(machine as usize).read_volatile() })
}

/// The page tables and the tables of frames.
#[derive(Clone, Copy)]
pub(crate) struct Tables {
    pub(crate) frames: &'static Frames,
    top: usize,
}

impl Tables {
    pub(crate) fn of(info: &'static StartInfo) -> Self {
        static FRAMES: FramesOnce = FramesOnce(UnsafeCell::new(None));
        struct FramesOnce(UnsafeCell<Option<Frames>>);
        // SAFETY: written once, below, before anybody reads.
        unsafe impl Sync for FramesOnce {}
        MACHINE_FRAMES.store(hypercall::machine_frames(), Ordering::Relaxed);
        let table: *const AtomicU64 = core::ptr::with_exposed_provenance(info.frames);
        // SAFETY: Xen mapped that many words there, for the domain to use and to change.
        let to_machine = unsafe { core::slice::from_raw_parts(table, info.frame_count as usize) };
        // SAFETY: called once, by the only CPU.
        let frames = unsafe { &mut *FRAMES.0.get() };
        let frames = frames.insert(Frames { to_machine, of_machine });
        Self { frames, top: info.page_table }
    }

    /// The machine frame behind an address of the kernel's.
    pub(crate) fn machine_of(self, address: usize) -> u64 {
        self.frames.machine((address / PAGE) as u64).expect("memory of the kernel's")
    }

    /// The entry at each level that leads to an address, top first, as the CPU reads them;
    /// the conversions lead from one to the next.
    fn walk(self, address: usize) -> [u64; 4] {
        let index = |level: u32| address >> (12 + 9 * level) & 511;
        let entry = |table: u64, level| {
            let table = core::ptr::with_exposed_provenance::<u64>((table & FRAME) as usize);
            // SAFETY: page tables are mapped where their frames' numbers say, read-only.
            unsafe { table.add(index(level)).read_volatile() }
        };
        let pgd = entry(self.top as u64, 3);
        let pud = entry(mmu::pgd_val(Pgd(pgd)), 2);
        let pmd = entry(mmu::pud_val(Pud(pud)), 1);
        let pte = entry(mmu::pmd_val(Pmd(pmd)), 0);
        [pgd, pud, pmd, pte]
    }
}

static ONE: Page = Page(UnsafeCell::new([0x11; PAGE]));
static OTHER: Page = Page(UnsafeCell::new([0x22; PAGE]));

fn check(tables: Tables, form: &str) {
    let mut checked = 0;
    for address in [check as *const () as usize, ONE.address(), OTHER.address(), tables.top] {
        let [pgd, pud, pmd, pte] = tables.walk(address);
        let value = mmu::pte_val(Pte(pte));
        // Addresses and frames of the guest's have the same numbers here.
        assert_eq!(value & FRAME, (address & !(PAGE - 1)) as u64, "{form}: {pte:#x}");
        assert_eq!(pte & FRAME, tables.machine_of(address) << 12, "{form}: {pte:#x}");
        // And back.
        assert_eq!(mmu::make_pte(value).0, pte, "{form}");
        assert_eq!(mmu::make_pmd(mmu::pmd_val(Pmd(pmd))).0, pmd, "{form}");
        assert_eq!(mmu::make_pud(mmu::pud_val(Pud(pud))).0, pud, "{form}");
        assert_eq!(mmu::make_pgd(mmu::pgd_val(Pgd(pgd))).0, pgd, "{form}");
        checked += 8;
    }
    // Machine frame 0 is not ours, whatever our frame 0 is.
    assert_eq!(mmu::pte_val(Pte(0x67)) & PRESENT, 0, "{form}");
    // An entry made here maps what it should, as far as Xen and the CPU are concerned.
    let entry = |page: &Page| mmu::make_pte(page.address() as u64 | 0x67).0;
    let first = ONE.0.get().cast::<u8>();
    // SAFETY: the page is for this; back to its own frame before anybody else looks.
    let seen = unsafe {
        hypercall::update_va_mapping(ONE.address(), entry(&OTHER));
        let seen = first.read_volatile();
        hypercall::update_va_mapping(ONE.address(), entry(&ONE));
        [seen, first.read_volatile()]
    };
    assert_eq!(seen, [0x22, 0x11], "{form}");
    say!("frames, {form}: {} conversions", checked + 3);
}

unsafe extern "sysv64" fn flush_others(_: *const CpuMask, _: *mut Mm, _: usize) {}

unsafe extern "sysv64" fn set_fixmap(index: u32, _: u64, _: u64) {
    panic!("no fixed mapping number {index}");
}

/// The conversions in every form.
pub(crate) fn prove(tables: Tables) {
    let mut bindings = Bindings::new("xen");
    frames::bind(&mut bindings, tables.frames).expect("once");
    bindings
        .bind(mmu::op::FlushTlbOthers, Binding::call(Plain::new(flush_others)))
        .and_then(|b| b.bind(mmu::op::SetFixmap, Binding::call(Plain::new(set_fixmap))))
        .expect("once");
    let mut family = mmu::Family::claim().expect("nobody has it");
    family.bind(&bindings).expect("complete");
    check(tables, "indirect");
    let sites = Sites::of_program();
    let mut text = Alias::new(tables);
    let (patched, report) = family
        .apply(sites, &mut text, |o| assert_eq!(o.form, Form::Direct, "{o}"))
        .map_err(|(_, error)| error)
        .expect("patched");
    say!("frames, patched: {report}");
    check(tables, "patched");
    // The text itself stayed as it was protected.
    let [.., pte] = tables.walk(prove as *const () as usize);
    assert_eq!(pte & (PRESENT | WRITABLE), PRESENT, "text is writable: {pte:#x}");
    let family = patched.undo(sites, &mut text).map_err(|(_, error)| error).expect("undone");
    check(tables, "undone");
    family.release();
}
