//! Call sites written by hand, as a module's that is loaded late: functions of nothing but a
//! site, so that what a call of one loses is what the site loses.

use pvops::plan::original;
use pvops::{Outcome, Site, Sites, Text, TextError, Why, Width, convention};
use std::collections::BTreeMap;

/// The program's sites, one for each op.
#[derive(Debug, Default)]
pub(crate) struct Ops(BTreeMap<&'static str, Site>);

impl Ops {
    /// Takes note of a site that was patched.
    pub(crate) fn note(&mut self, outcome: &Outcome) {
        let site = Sites::of_program().iter().flatten().find(|s| s.address == outcome.site);
        self.0.entry(outcome.op).or_insert(site.expect("patched by its record"));
    }
}

/// A page of sites near the program, writable as well: nobody else runs them.
pub(crate) struct Module {
    page: *mut u8,
    names: Vec<&'static str>,
    records: Records,
}

/// The records of a module's sites.
#[derive(Clone, Default)]
pub(crate) struct Records {
    bytes: Vec<u8>,
    base: u64,
}

impl Records {
    pub(crate) fn sites(&self) -> Sites<'_> {
        // SAFETY: one for each site that `Module::load` wrote, and true.
        unsafe { Sites::new(&self.bytes, self.base) }.expect("whole records")
    }
}

const PAGE: usize = 4096;
/// Bytes for each function.
const STRIDE: usize = 64;
/// Bytes before its site: `sub rsp, 8`, so that the stack is aligned where it calls.
const ENTER: [u8; 4] = [0x48, 0x83, 0xec, 0x08];
/// `add rsp, 8; ret`
const LEAVE: [u8; 5] = [0x48, 0x83, 0xc4, 0x08, 0xc3];

impl Module {
    /// A site for each of the ops, as the compiler would have made it.
    pub(crate) fn load(ops: &Ops) -> Self {
        let page = map_near(ops.0.values().next().expect("some op").slot);
        // As if they stood at the end of the page.
        let records = Records { bytes: vec![], base: (page.addr() + PAGE) as u64 };
        let mut module = Self { page, names: vec![], records };
        for (i, (name, program)) in ops.0.iter().enumerate() {
            let start = page.addr() + i * STRIDE;
            let site = Site { address: (start + ENTER.len()) as u64, ..*program };
            let body = original(&site, Width::Bits64, Why::Unpatched);
            let code = [&ENTER[..], body.bytes(), &LEAVE].concat();
            assert!(code.len() <= STRIDE && i * STRIDE + code.len() <= PAGE);
            // SAFETY: within the page, which is ours to write.
            unsafe { code.as_ptr().copy_to(page.add(i * STRIDE), code.len()) };
            let record = &mut module.records.bytes;
            let at = module.records.base + record.len() as u64;
            let relative = |to: u64, from: u64| to.wrapping_sub(from) as i32;
            record.extend(relative(site.address, at).to_le_bytes());
            record.extend(relative(site.slot, at + 4).to_le_bytes());
            record.extend([site.len, site.kind as u8]);
            record.extend(site.clobbers.bits().to_le_bytes());
            module.names.push(name);
        }
        module
    }

    /// A copy of its records.
    pub(crate) fn records(&self) -> Records {
        self.records.clone()
    }

    /// The function around an op's site.
    pub(crate) fn function(&self, op: &str) -> *const () {
        let index = self.names.iter().position(|name| *name == op).expect("a site of this op");
        self.page.wrapping_add(index * STRIDE).cast_const().cast()
    }

    /// Calls an op through its site with a pattern in every register that is no argument;
    /// returns its result. Only what the site gives up may have changed.
    ///
    /// # Safety
    /// As the op.
    pub(crate) unsafe fn call(&self, op: &str, args: &[usize]) -> u64 {
        let kind = self.kind(op);
        // SAFETY: a function of this module; the rest is passed on.
        let found = unsafe { pvops::probe::observe(self.function(op), args) };
        let lost = found.changed.minus(convention::NATIVE.clobbers(kind));
        assert!(lost.is_empty(), "{op} {args:x?}: lost {lost:?}");
        found.result
    }

    fn kind(&self, op: &str) -> pvops::CallKind {
        let index = self.names.iter().position(|name| *name == op).expect("a site of this op");
        self.records.sites().iter().nth(index).expect("its record").expect("true").kind
    }
}

/// A page within a displacement's reach of an address.
fn map_near(address: u64) -> *mut u8 {
    let base = address as usize & !(PAGE - 1);
    for step in 1..4096 {
        let hint = std::ptr::without_provenance_mut(base - step * (64 << 10));
        // SAFETY: new memory; MAP_FIXED_NOREPLACE replaces none.
        let page = unsafe {
            libc::mmap(
                hint,
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        if page == hint {
            return page.cast();
        }
    }
    panic!("no memory near {address:#x}");
}

// SAFETY: nobody runs the page while it is patched: its only user does that.
unsafe impl Text for Module {
    fn covers(&self, address: u64, len: usize) -> Result<(), TextError> {
        let start = self.page.addr() as u64;
        let inside = address >= start && address + len as u64 <= start + PAGE as u64;
        if inside { Ok(()) } else { Err(TextError::OutsideWindow) }
    }
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), TextError> {
        let from = self.page.wrapping_add(address as usize - self.page.addr());
        // SAFETY: `covers` accepted it.
        unsafe { from.copy_to(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }
    unsafe fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), TextError> {
        let to = self.page.wrapping_add(address as usize - self.page.addr());
        // SAFETY: `covers` accepted it.
        unsafe { bytes.as_ptr().copy_to(to, bytes.len()) };
        Ok(())
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: the page that `load` mapped, and nobody runs it any more.
        unsafe { libc::munmap(self.page.cast(), PAGE) };
    }
}
