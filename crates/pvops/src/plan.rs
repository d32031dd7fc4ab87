//! What bytes go to a site: a pure function of site and binding.
//!
//! Order of preference: in line, nop or identity, direct call or jump, indirect. Every
//! form fills the site exactly. Calls stand at the site's end, as the compiler's own does
//! (padding goes before them): a callee that is running while its site is patched returns
//! to the end, and whatever form the site has by then, one of its instructions ends there.

use crate::binding::{Code, Erased, Template};
use crate::convention::{CallKind, Convention, Width};
use crate::report::{Form, Why};
use crate::site::{SITE_MAX, SITE_MIN, Site};

/// The longest site.
const MAX: usize = SITE_MAX as usize;

/// A CS override: one byte, and without meaning on near branches, on register operands,
/// and in 64-bit mode on anything.
const PAD_PREFIX: u8 = 0x2e;

/// How many of them an instruction takes before some CPUs decode it slowly.
const PREFIXES: usize = 3;

/// Nops of one to nine bytes (SDM vol. 2, NOP).
const NOPS: [&[u8]; 9] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

/// The bytes for one site.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    buffer: [u8; MAX],
    len: usize,
    /// What they are.
    pub form: Form,
}

impl Plan {
    fn new(form: Form) -> Self {
        Self { buffer: [0; MAX], len: 0, form }
    }

    /// The bytes: as many as the site has.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    fn push(&mut self, bytes: &[u8]) {
        let end = (self.len + bytes.len()).min(MAX);
        let count = end - self.len;
        self.buffer[self.len..end].copy_from_slice(&bytes[..count]);
        self.len = end;
    }

    /// Lengthens the first instruction of `len` bytes of code to come, if that spares the
    /// nop behind them: one instruction less to decode, and nothing to be caught inside.
    fn prefixes(&mut self, site: &Site, len: usize) {
        if let Some(rest) = usize::from(site.len).checked_sub(self.len + len)
            && rest <= PREFIXES
        {
            self.push(&[PAD_PREFIX; PREFIXES][..rest]);
        }
    }

    /// Fills up to the site's length with the longest nops.
    fn nops(self, site: &Site) -> Self {
        self.nops_before(site, 0)
    }

    /// Fills up to what the site's last `tail` bytes leave.
    fn nops_before(mut self, site: &Site, tail: usize) -> Self {
        while let Some(rest) = usize::from(site.len).checked_sub(self.len + tail)
            && rest > 0
        {
            self.push(NOPS[rest.min(NOPS.len()) - 1]);
        }
        self
    }
}

/// Bytes of a call or jump at the end of a site.
const CALL: usize = SITE_MIN as usize;

/// What the compiler put there: single-byte nops and an indirect call or jump.
#[must_use]
pub fn original(site: &Site, width: Width, why: Why) -> Plan {
    let mut plan = Plan::new(Form::Indirect(why));
    while plan.len + CALL < usize::from(site.len) {
        plan.push(&[0x90]);
    }
    let modrm = if site.kind == CallKind::Jump { 0x25 } else { 0x15 };
    plan.push(&[0xff, modrm]);
    let operand = match width {
        // The linker resolved it within 32 bits, or there would be no program.
        Width::Bits64 => site.slot.wrapping_sub(site.address.wrapping_add(site.len.into())) as u32,
        Width::Bits32 => site.slot as u32,
    };
    plan.push(&operand.to_le_bytes());
    plan
}

/// The best form of `bound` that the site can take.
#[must_use]
pub fn plan(site: &Site, bound: &Erased, width: Width) -> Plan {
    match &bound.template {
        Template::Inline(code) if fits(site, code) => {
            if let Some(plan) = inline(site, code, width) {
                return plan;
            }
        }
        Template::Nop => return Plan::new(Form::Nop).nops(site),
        Template::Identity => {
            let mut plan = Plan::new(Form::Identity);
            let convention = Convention::of(width);
            // mov ret, first argument: none needed where they are the same register.
            if let ([from, ..], [to, ..]) = (convention.args, convention.ret)
                && from != to
            {
                plan.prefixes(site, 3);
                plan.push(&[0x48, 0x89, 0xc0 | (*from as u8) << 3 | *to as u8]);
            }
            return plan.nops(site);
        }
        Template::Inline(_) | Template::Call => {}
    }
    let (opcode, form) = match site.kind {
        CallKind::Jump => (0xe9, Form::Jump),
        CallKind::Plain | CallKind::CalleeSave => (0xe8, Form::Direct),
    };
    let target = bound.target.addr() as u64;
    match relative(site.address, site.len.into(), target, width) {
        Some(displacement) => {
            let mut plan = Plan::new(form).nops_before(site, CALL);
            plan.push(&[PAD_PREFIX, opcode]);
            plan.push(&displacement.to_le_bytes());
            plan
        }
        None => original(site, width, Why::TooFar),
    }
}

/// Whether the code is short enough and gives up nothing that the site keeps.
fn fits(site: &Site, code: &Code) -> bool {
    code.bytes.len() <= usize::from(site.len) && code.clobbers.is_subset(site.clobbers)
}

fn inline(site: &Site, code: &Code, width: Width) -> Option<Plan> {
    let mut plan = Plan::new(Form::Inline);
    if width == Width::Bits64 {
        plan.prefixes(site, code.bytes.len());
    }
    let start = plan.len;
    plan.push(code.bytes);
    for fixup in code.fixups {
        let target = fixup.target.addr() as u64;
        let end = (start + usize::from(fixup.end)) as u64;
        let displacement = relative(site.address, end, target, width)?;
        let at = start + usize::from(fixup.at);
        plan.buffer[..plan.len].get_mut(at..at + 4)?.copy_from_slice(&displacement.to_le_bytes());
    }
    Some(plan.nops(site))
}

/// The displacement from `end` bytes into the site to `target`, if it has one.
fn relative(site: u64, end: u64, target: u64, width: Width) -> Option<i32> {
    let distance = target.wrapping_sub(site.wrapping_add(end));
    match width {
        Width::Bits64 => i32::try_from(distance as i64).ok(),
        // 32-bit branches wrap around: everything is in reach.
        Width::Bits32 => Some(distance as i32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::binding::Fixup;
    use crate::convention::{Gpr, RegSet, X86_32, X86_64};

    fn site(len: u8, kind: CallKind) -> Site {
        let clobbers = X86_64.clobbers(kind);
        Site { address: 0x40_0000, slot: 0x40_2000, len, kind, clobbers }
    }

    fn bound(template: Template) -> Erased {
        Erased { target: core::ptr::without_provenance(0x50_0000), template }
    }

    fn code(bytes: &'static [u8], clobbers: RegSet) -> Template {
        Template::Inline(Code { bytes, clobbers, fixups: &[] })
    }

    #[test]
    fn prefers_inline_then_direct() {
        let site = site(6, CallKind::CalleeSave);
        let rax = RegSet::of(&[Gpr::Rax]);
        let save = plan(&site, &bound(code(&[0x9c, 0x58], rax)), Width::Bits64);
        assert_eq!(save.bytes(), [0x9c, 0x58, 0x0f, 0x1f, 0x40, 0x00]);
        assert_eq!(save.form, Form::Inline);
        // One byte too long: called instead, never cut.
        let long = plan(&site, &bound(code(&[0x90; 7], rax)), Width::Bits64);
        assert_eq!(long.form, Form::Direct);
        assert_eq!(long.bytes(), [0x2e, 0xe8, 0xfa, 0xff, 0x0f, 0x00]);
        // Gives up a register that the site keeps: called instead.
        let greedy = RegSet::of(&[Gpr::Rax, Gpr::Rcx]);
        let called = plan(&site, &bound(code(&[0x90], greedy)), Width::Bits64);
        assert_eq!(called.form, Form::Direct);
    }

    #[test]
    fn every_form_fills_every_length_exactly() {
        for len in 6..=64 {
            for kind in [CallKind::Plain, CallKind::CalleeSave, CallKind::Jump] {
                let site = site(len, kind);
                for template in [Template::Call, Template::Nop, Template::Identity] {
                    for width in [Width::Bits64, Width::Bits32] {
                        let plan = plan(&site, &bound(template), width);
                        assert_eq!(plan.bytes().len(), usize::from(len));
                    }
                }
                assert_eq!(
                    original(&site, Width::Bits64, Why::Unpatched).bytes().len(),
                    usize::from(len)
                );
            }
        }
    }

    #[test]
    fn fixups_move_with_the_prefixes() {
        const FIXUPS: &[Fixup] =
            &[Fixup { at: 2, end: 7, target: core::ptr::without_provenance(0x50_0000) }];
        // mov byte ptr [rip + target], 1
        let bytes = &[0xc6, 0x05, 0, 0, 0, 0, 1];
        let code = Code { bytes, clobbers: RegSet::EMPTY, fixups: FIXUPS };
        let bound = bound(Template::Inline(code));
        let padded = plan(&site(10, CallKind::CalleeSave), &bound, Width::Bits64);
        let relative = 0x50_0000u32 - 0x40_0000 - 10;
        assert_eq!(padded.bytes()[..5], [0x2e, 0x2e, 0x2e, 0xc6, 0x05]);
        assert_eq!(padded.bytes()[5..9], relative.to_le_bytes());
        let loose = plan(&site(11, CallKind::CalleeSave), &bound, Width::Bits64);
        assert_eq!(loose.bytes()[2..6], (relative + 3).to_le_bytes());
        assert_eq!(loose.bytes()[7..], [0x0f, 0x1f, 0x40, 0x00]);
        // In 32-bit code the prefix would mean another segment.
        let narrow = plan(&site(10, CallKind::CalleeSave), &bound, Width::Bits32);
        assert_eq!(narrow.bytes()[0], 0xc6);
    }

    #[test]
    fn calls_return_to_the_end_of_their_site() {
        for len in 6..=64 {
            for kind in [CallKind::Plain, CallKind::CalleeSave] {
                let site = site(len, kind);
                let end = usize::from(len);
                let indirect = original(&site, Width::Bits64, Why::Unpatched);
                assert_eq!(indirect.bytes()[end - 6..end - 4], [0xff, 0x15]);
                let direct = plan(&site, &bound(Template::Call), Width::Bits64);
                assert_eq!(direct.bytes()[end - 5], 0xe8);
                let slot = site.slot - site.address - u64::from(len);
                assert_eq!(indirect.bytes()[end - 4..], (slot as u32).to_le_bytes());
                let target = 0x50_0000 - site.address - u64::from(len);
                assert_eq!(direct.bytes()[end - 4..], (target as u32).to_le_bytes());
            }
        }
    }

    #[test]
    fn identity_moves_only_where_registers_differ() {
        let wide = plan(&site(6, CallKind::CalleeSave), &bound(Template::Identity), Width::Bits64);
        assert_eq!(wide.bytes(), [0x2e, 0x2e, 0x2e, 0x48, 0x89, 0xf8]);
        let mut narrow = site(6, CallKind::CalleeSave);
        narrow.clobbers = X86_32.clobbers(CallKind::CalleeSave);
        let narrow = plan(&narrow, &bound(Template::Identity), Width::Bits32);
        assert_eq!(narrow.bytes(), NOPS[5]);
    }

    #[test]
    fn what_is_too_far_stays_indirect_and_says_so() {
        let far = Erased {
            target: core::ptr::without_provenance(0x7fff_0000_0000),
            template: Template::Call,
        };
        let plan = plan(&site(6, CallKind::Plain), &far, Width::Bits64);
        assert_eq!(plan.form, Form::Indirect(Why::TooFar));
        assert_eq!(plan.bytes(), [0xff, 0x15, 0xfa, 0x1f, 0, 0]);
    }
}
