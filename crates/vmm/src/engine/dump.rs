//! A vCPU's registers as text, for whoever wonders what a guest is doing.

use std::fmt::Write;

use softcpu::Vcpu;
use softcpu::state::regs::Gpr;
use softcpu::state::segment::SegReg;

/// What `vcpu` holds now and what it has done so far.
pub(crate) fn registers(vcpu: &Vcpu) -> String {
    let state = &vcpu.state;
    let cs = state.segment(SegReg::Cs);
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "rip {:#018x}  cs {:#06x} base {:#x}  cpl {}  {:?}  flags {:?}",
        state.rip,
        cs.selector,
        cs.base,
        state.cpl(),
        state.code_size(),
        state.rflags
    );
    let named: Vec<_> = Gpr::NAMES.iter().zip(&state.gpr).collect();
    for row in named.chunks(4) {
        let row: Vec<_> =
            row.iter().map(|(name, value)| format!("{name:<3} {value:016x}")).collect();
        let _ = writeln!(text, "{}", row.join("  "));
    }
    let _ = writeln!(
        text,
        "cr0 {:?}  cr2 {:#x}  cr3 {:#x}  cr4 {:?}  efer {:?}",
        state.cr0, state.cr2, state.cr3, state.cr4, state.efer
    );
    let _ = writeln!(text, "{:?}", vcpu.counters());
    if let Some(counters) = vcpu.translator_counters() {
        let _ = writeln!(text, "translator {counters:?}");
    }
    text
}
