//! Which translations survive what. That something is still cached where it may be is
//! asserted too: a flush shows nothing on an empty TLB.

use super::*;
use crate::state::control::Cr4;

/// A virtual address outside the identity map, in the second GiB.
const PAGE: u64 = 0x4000_0000;
/// Physical pages with their own number in the first byte.
const OLD: u64 = 0x20_0000;
const NEW: u64 = 0x20_1000;
/// Roots of address spaces; each has its other tables behind it.
const SPACE_A: u64 = 0x10_0000;
const SPACE_B: u64 = 0x11_0000;
const PRESENT: u64 = 0x67;
const GLOBAL: u64 = 0x100;

struct Spaces {
    guest: Guest,
}

impl Spaces {
    fn new() -> Self {
        let mut guest = Guest::long();
        let cr3 = guest.machine.vcpu.state.cr3;
        let identity = guest.word((guest.word(cr3)) & !0xfff);
        for root in [SPACE_A, SPACE_B] {
            let (l3, l2, l1) = (root + 0x1000, root + 0x2000, root + 0x3000);
            guest.machine.put(root, &(l3 | PRESENT).to_le_bytes());
            guest.machine.put(l3, &identity.to_le_bytes());
            guest.machine.put(l3 + 8, &(l2 | PRESENT).to_le_bytes());
            guest.machine.put(l2, &(l1 | PRESENT).to_le_bytes());
        }
        guest.machine.put(OLD, b"old!");
        guest.machine.put(NEW, b"new!");
        guest.machine.vcpu.state.cr4 |= Cr4::PGE;
        guest.machine.vcpu.state_changed();
        let mut spaces = Self { guest };
        spaces.map(SPACE_A, OLD | PRESENT);
        spaces.map(SPACE_B, OLD | PRESENT);
        spaces.switch(SPACE_A);
        spaces
    }

    fn map(&mut self, space: u64, entry: u64) {
        self.guest.machine.put(space + 0x3000, &entry.to_le_bytes());
    }

    fn switch(&mut self, cr3: u64) {
        self.guest.set(Gpr::Rbx, cr3);
        assert_eq!(self.guest.run(&[0x0f, 0x22, 0xdb]), End::Done);
    }

    fn set_cr4(&mut self, cr4: Cr4) {
        self.guest.set(Gpr::Rbx, cr4.bits());
        assert_eq!(self.guest.run(&[0x0f, 0x22, 0xe3]), End::Done);
    }

    fn cr4(&self) -> Cr4 {
        self.guest.machine.vcpu.state.cr4
    }

    /// Whether the old page is seen.
    fn sees_old(&mut self) -> bool {
        self.guest.set(Gpr::Rdi, PAGE);
        // mov ecx, [rdi]
        assert_eq!(self.guest.run(&[0x8b, 0x0f]), End::Done);
        match &(self.guest.reg(Gpr::Rcx) as u32).to_le_bytes() {
            b"old!" => true,
            b"new!" => false,
            other => panic!("{other:?}"),
        }
    }

    fn invlpg(&mut self, addr: u64) {
        self.guest.set(Gpr::Rdi, addr);
        assert_eq!(self.guest.run(&[0x0f, 0x01, 0x3f]), End::Done);
    }

    fn invpcid(&mut self, kind: u64, pcid: u64, addr: u64) -> End {
        self.guest.machine.put(DATA, &pcid.to_le_bytes());
        self.guest.machine.put(DATA + 8, &addr.to_le_bytes());
        self.guest.set(Gpr::Rbx, kind);
        self.guest.set(Gpr::Rdi, DATA);
        self.guest.run(&[0x66, 0x0f, 0x38, 0x82, 0x1f])
    }

    /// Caches the old page, then maps the new one behind the TLB's back.
    fn cached(&mut self, flags: u64) {
        self.map(SPACE_A, OLD | PRESENT | flags);
        self.guest.machine.vcpu.state_changed();
        assert!(self.sees_old());
        self.map(SPACE_A, NEW | PRESENT | flags);
        assert!(self.sees_old(), "it should still be cached");
    }
}

#[test]
fn every_flush_forgets_ordinary_pages() {
    type Flush = fn(&mut Spaces);
    let flushes: [(&str, Flush); 6] = [
        ("mov cr3", |spaces| spaces.switch(SPACE_A)),
        ("invlpg", |spaces| spaces.invlpg(PAGE + 0xabc)),
        ("invpcid address", |spaces| assert_eq!(spaces.invpcid(0, 0, PAGE), End::Done)),
        ("invpcid single", |spaces| assert_eq!(spaces.invpcid(1, 0, 0), End::Done)),
        ("invpcid all", |spaces| assert_eq!(spaces.invpcid(2, 0, 0), End::Done)),
        ("invpcid all but global", |spaces| assert_eq!(spaces.invpcid(3, 0, 0), End::Done)),
    ];
    for (name, flush) in flushes {
        let mut spaces = Spaces::new();
        spaces.cached(0);
        flush(&mut spaces);
        assert!(!spaces.sees_old(), "{name}");
    }
}

#[test]
fn global_pages_survive_cr3_but_not_the_rest() {
    let mut spaces = Spaces::new();
    spaces.cached(GLOBAL);
    spaces.switch(SPACE_B);
    assert!(spaces.sees_old());
    spaces.switch(SPACE_A);
    assert!(spaces.sees_old(), "global");
    assert_eq!(spaces.invpcid(3, 0, 0), End::Done);
    assert!(spaces.sees_old(), "global");
    spaces.invlpg(PAGE);
    assert!(!spaces.sees_old());

    spaces.cached(GLOBAL);
    assert_eq!(spaces.invpcid(2, 0, 0), End::Done);
    assert!(!spaces.sees_old());

    spaces.cached(GLOBAL);
    let cr4 = spaces.cr4();
    spaces.set_cr4(cr4 - Cr4::PGE);
    spaces.set_cr4(cr4);
    assert!(!spaces.sees_old(), "CR4.PGE");
}

#[test]
fn pcids_keep_address_spaces_apart_and_alive() {
    const KEEP: u64 = 1 << 63;
    let mut spaces = Spaces::new();
    let cr4 = spaces.cr4();
    spaces.set_cr4(cr4 | Cr4::PCIDE);
    let there_and_back = |spaces: &mut Spaces, back: u64, meanwhile: fn(&mut Spaces)| {
        spaces.map(SPACE_A, OLD | PRESENT);
        spaces.switch(SPACE_A | 1);
        assert!(spaces.sees_old());
        spaces.map(SPACE_A, NEW | PRESENT);
        // Space B does not touch the page: the two would share a place in the TLB.
        spaces.switch(SPACE_B | 2);
        meanwhile(spaces);
        spaces.switch(back);
        spaces.sees_old()
    };
    assert!(there_and_back(&mut spaces, SPACE_A | 1 | KEEP, |_| {}), "kept");
    assert!(!there_and_back(&mut spaces, SPACE_A | 1, |_| {}), "flushed by CR3");
    let single = |spaces: &mut Spaces| assert_eq!(spaces.invpcid(1, 1, 0), End::Done);
    assert!(!there_and_back(&mut spaces, SPACE_A | 1 | KEEP, single), "flushed by INVPCID");
    let other = |spaces: &mut Spaces| assert_eq!(spaces.invpcid(1, 3, 0), End::Done);
    assert!(there_and_back(&mut spaces, SPACE_A | 1 | KEEP, other), "another one flushed");
    let address = |spaces: &mut Spaces| assert_eq!(spaces.invpcid(0, 1, PAGE), End::Done);
    assert!(!there_and_back(&mut spaces, SPACE_A | 1 | KEEP, address));
    let touch = |spaces: &mut Spaces| assert!(spaces.sees_old(), "space B has its own page");
    there_and_back(&mut spaces, SPACE_A | 1, touch);
    // The same root under a PCID that was never used sees what the tables say.
    assert!(!there_and_back(&mut spaces, SPACE_A | 9 | KEEP, |_| {}));
}

#[test]
fn invpcid_checks_its_operands() {
    let mut spaces = Spaces::new();
    assert_eq!(spaces.invpcid(4, 0, 0), gp(0), "no such type");
    assert_eq!(spaces.invpcid(1, 1, 0), gp(0), "a PCID without CR4.PCIDE");
    assert_eq!(spaces.invpcid(0, 0, 1 << 47), gp(0), "not canonical");
    assert_eq!(spaces.invpcid(1, 1 << 12, 0), gp(0), "reserved bits");
}

#[test]
fn invlpg_forgets_the_whole_large_page() {
    let mut spaces = Spaces::new();
    let l2 = SPACE_A + 0x2000;
    spaces.guest.machine.put(l2, &(OLD | PRESENT | 0x80).to_le_bytes());
    spaces.guest.machine.put(OLD + 0x5000, b"old!");
    spaces.guest.machine.vcpu.state_changed();
    assert!(spaces.sees_old());
    // Another 2 MiB page, whose first bytes are the new ones.
    spaces.guest.machine.put(0, b"new!");
    spaces.guest.machine.put(l2, &(PRESENT | 0x80).to_le_bytes());
    assert!(spaces.sees_old(), "it should still be cached");
    spaces.invlpg(PAGE + 0x1f_f000);
    assert!(!spaces.sees_old());
}

#[test]
fn accessed_and_dirty_bits_are_set_when_due() {
    let mut spaces = Spaces::new();
    spaces.map(SPACE_A, OLD | 0x07);
    spaces.switch(SPACE_A);
    let entry = |spaces: &Spaces| spaces.guest.word(SPACE_A + 0x3000) & 0x60;
    assert_eq!(entry(&spaces), 0);
    assert!(spaces.sees_old());
    assert_eq!(entry(&spaces), 0x20, "accessed");
    // mov [rdi], ecx: dirty, although the page is cached for loads.
    assert_eq!(spaces.guest.run(&[0x89, 0x0f]), End::Done);
    assert_eq!(entry(&spaces), 0x60, "dirty");
}
