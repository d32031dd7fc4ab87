use super::*;
use crate::addr::PAGE_SIZE;
use crate::mmu::gs_pages::GsPage;
use crate::state::control::Cr4;
use crate::testing::TestMachine;
use crate::translate::Config;
use crate::vcpu::Exit;

const CODE: u64 = 0x1000;
/// Physical pages behind the base, and the table that maps them at [`BASE`].
const DATA: u64 = 0x8000;
const TABLES: u64 = 0x20_0000;
const BASE: u64 = 0xffff_8880_0000_0000;

/// One whose GS is at [`BASE`], with pages of the kernel's that are its own.
fn machine(code: &[u8]) -> TestMachine {
    let mut machine = TestMachine::long_mode();
    let l4 = machine.vcpu.state.cr3;
    let entry = |at: u64, to: u64| machine.put(at, &(to | 0x163).to_le_bytes());
    entry(l4 + (BASE >> 39 & 511) * 8, TABLES);
    entry(TABLES + (BASE >> 30 & 511) * 8, TABLES + 0x1000);
    entry(TABLES + 0x1000 + (BASE >> 21 & 511) * 8, TABLES + 0x2000);
    for page in 0..16 {
        entry(TABLES + 0x2000 + page * 8, DATA + page * PAGE_SIZE);
    }
    machine.put(CODE, code);
    let state = &mut machine.vcpu.state;
    state.cr4 |= Cr4::PGE;
    state.segment_mut(SegReg::Gs).base = BASE;
    state.rip = CODE;
    state.gpr[1] = 1000;
    state.gpr[4] = 0x7000;
    machine.vcpu.state_changed();
    machine.translating_as(0, Config { verify: true, ..Config::default() })
}

fn kept(machine: &TestMachine) -> Vec<usize> {
    let pages = machine.vcpu.mmu.gs_pages.pages.iter().enumerate();
    pages.filter(|(_, GsPage { base, .. })| *base == BASE).map(|(number, _)| number).collect()
}

#[test]
fn what_is_looked_at_often_is_kept() {
    // again: add gs:[0x10], rcx; mov rax, gs:[0x3ff8]; mov dl, gs:[0x4fff]; add gs:[0x1ffc], rcx
    // dec ecx; jnz again; hlt
    let mut machine = machine(&[
        0x65, 0x48, 0x01, 0x0c, 0x25, 0x10, 0, 0, 0, 0x65, 0x48, 0x8b, 0x04, 0x25, 0xf8, 0x3f, 0,
        0, 0x65, 0x8a, 0x14, 0x25, 0xff, 0x4f, 0, 0, 0x65, 0x48, 0x01, 0x0c, 0x25, 0xfc, 0x1f, 0,
        0, 0xff, 0xc9, 0x75, 0xd9, 0xf4,
    ]);
    machine.put(DATA + 0x3ff8, &0x1234_5678_u64.to_le_bytes());
    machine.put(DATA + 0x4fff, &[0x77]);
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    let state = &machine.vcpu.state;
    assert_eq!((state.gpr[0], state.gpr[2] as u8), (0x1234_5678, 0x77));
    let sum = 500_500_u64.to_le_bytes();
    assert_eq!(
        (machine.get(DATA + 0x10, 8), machine.get(DATA + 0x1ffc, 8)),
        (sum.into(), sum.into())
    );
    // What goes on in the next page is looked up each time.
    assert_eq!(kept(&machine), [0, 3, 4]);
    let counters = machine.vcpu.translator_counters().unwrap();
    assert!((1000..1030).contains(&counters.interpreted), "{}", counters.interpreted);
}

#[test]
fn what_is_mapped_anew_is_found_anew() {
    // again: mov rax, gs:[0x10]; add rbx, rax; mov rax, gs:[0x18]; add rbx, rax; mov rax,
    // gs:[0x20]; add rbx, rax; mov rax, gs:[0x28]; add rbx, rax; xchg [rsi], r8; invlpg [rdi]
    // dec ecx; jnz again; hlt
    let mut code = Vec::new();
    for distance in [0x10, 0x18, 0x20, 0x28] {
        code.extend([0x65, 0x48, 0x8b, 0x04, 0x25, distance, 0, 0, 0, 0x48, 0x01, 0xc3]);
    }
    code.extend([0x4c, 0x87, 0x06, 0x0f, 0x01, 0x3f, 0xff, 0xc9, 0x75]);
    code.push((-(code.len() as i64) - 1) as u8);
    code.push(0xf4);
    let mut machine = machine(&code);
    for (at, value) in [(0x10, 1_u64), (0x18, 2), (0x20, 3), (0x28, 4)] {
        machine.put(DATA + at, &value.to_le_bytes());
        machine.put(DATA + 5 * PAGE_SIZE + at, &(value * 1000).to_le_bytes());
    }
    let state = &mut machine.vcpu.state;
    state.gpr[3] = 0;
    state.gpr[6] = TABLES + 0x2000;
    state.gpr[7] = BASE;
    state.gpr[8] = (DATA + 5 * PAGE_SIZE) | 0x163;
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    assert_eq!(machine.vcpu.state.gpr[3], 500 * 10 + 500 * 10_000);
}
