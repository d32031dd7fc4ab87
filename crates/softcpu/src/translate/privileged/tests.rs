//! Rows of privileged and flag instructions, in ring 0 and ring 3: translated against
//! interpreted, with an interrupt that waits or none.

use crate::addr::GuestPhysAddr;
use crate::env::{Environment, MsrRefused};
use crate::handle::Event;
use crate::state::VcpuState;
use crate::state::control::Cr4;
use crate::state::rflags::RFlags;
use crate::state::segment::{DescriptorTable, SegReg, Segment};
use crate::testing::{Random, TestMachine};
use crate::translate::Config;
use crate::vcpu::{Exit, Shadow};

const CODE: u64 = 0x1000;
const GDT: u64 = 0x2000;
const IDT: u64 = 0x3000;
const HANDLER: u64 = 0x4000;
/// The stack's page, and a page of the user's.
const STACK: u64 = 0x8000;
const DATA: u64 = 0x9000;
const VECTOR: u8 = 0x40;
/// Where all is mapped once more.
const HIGH: u64 = 0xffff_8000_0000_0000;
/// `mov r10, gs:[0x10]`
const MOV_R10_GS: [u8; 9] = [0x65, 0x4c, 0x8b, 0x14, 0x25, 0x10, 0, 0, 0];

/// The instructions that rows are made of, those in line and some that care for flags.
const PIECES: &[&[u8]] = &[
    &[0xfa],                                        // cli
    &[0xfb],                                        // sti
    &[0x9c],                                        // pushfq
    &[0x9d],                                        // popfq
    &[0xf3, 0x90],                                  // pause
    &[0x0f, 0x01, 0xf8],                            // swapgs
    &[0x0f, 0x01, 0xcb],                            // stac
    &[0x0f, 0x01, 0xca],                            // clac
    &[0xf3, 0x48, 0x0f, 0xae, 0xc0],                // rdfsbase rax
    &[0xf3, 0x41, 0x0f, 0xae, 0xcf],                // rdgsbase r15d
    &[0xf3, 0x48, 0x0f, 0xae, 0xd1],                // wrfsbase rcx
    &[0xf3, 0x41, 0x0f, 0xae, 0xdb],                // wrgsbase r11d
    &[0xf3, 0x49, 0x0f, 0xae, 0xdb],                // wrgsbase r11
    &[0x8c, 0xd8],                                  // mov eax, ds
    &[0x49, 0x8c, 0xeb],                            // mov r11, gs
    &[0x66, 0x8c, 0xd2],                            // mov dx, ss
    &[0x66, 0x41, 0x8c, 0xd6],                      // mov r14w, ss
    &[0xff, 0x36],                                  // push qword [rsi]
    &[0xff, 0x34, 0x24],                            // push qword [rsp]
    &[0x65, 0xff, 0x76, 0x10],                      // push qword gs:[rsi + 16]
    &[0x41, 0xff, 0x76, 0x08],                      // push qword [r14 + 8]
    &[0x58],                                        // pop rax
    &[0x41, 0x5b],                                  // pop r11
    &[0x51],                                        // push rcx
    &[0x48, 0x8b, 0x16],                            // mov rdx, [rsi]
    &[0x48, 0x89, 0x46, 0x08],                      // mov [rsi + 8], rax
    &[0x48, 0x03, 0x46, 0x18],                      // add rax, [rsi + 24]
    &[0x39, 0xd8],                                  // cmp eax, ebx
    &[0x48, 0x01, 0xc8],                            // add rax, rcx
    &[0x48, 0x11, 0xd0],                            // adc rax, rdx
    &[0x19, 0xdb],                                  // sbb ebx, ebx
    &[0x0f, 0x90, 0xc1],                            // seto cl
    &[0xff, 0xca],                                  // dec edx
    &[0x65, 0x48, 0x8b, 0x04, 0x25, 0x10, 0, 0, 0], // mov rax, gs:[0x10]
    &[0x65, 0x48, 0x01, 0x0c, 0x25, 0x28, 0, 0, 0], // add gs:[0x28], rcx
    &[0x65, 0xff, 0x04, 0x25, 0x18, 0x18, 0, 0],    // inc dword gs:[0x1818]
    &[0xfd],                                        // std
    &[0xfc],                                        // cld
];

/// An environment with one interrupt.
struct OneInterrupt(Option<u8>);

impl Environment for OneInterrupt {
    fn port_read(&mut self, _port: u16, _data: &mut [u8]) {}
    fn port_write(&mut self, _port: u16, _data: &[u8]) {}
    fn mmio_read(&mut self, _addr: GuestPhysAddr, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _addr: GuestPhysAddr, _data: &[u8]) {}
    fn read_msr(&mut self, _index: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn write_msr(&mut self, _index: u32, _value: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.0.take()
    }
}

/// What a row starts from.
struct Start {
    code: Vec<u8>,
    state: VcpuState,
    memory: Vec<u8>,
    interrupt: bool,
}

/// Flags as somebody may have pushed them.
fn flags(random: &mut Random) -> u64 {
    let wild = RFlags::all().difference(RFlags::TF | RFlags::VM | RFlags::RF).bits();
    let tame = (RFlags::STATUS | RFlags::DF | RFlags::ID).bits();
    let mask = match random.below(4) {
        0 => wild,
        1 => tame | RFlags::IF.bits() | RFlags::TF.bits(),
        _ => tame,
    };
    random.next() & mask | RFlags::FIXED.bits()
}

fn start(base: &VcpuState, random: &mut Random) -> Start {
    let mut state = base.clone();
    let user = random.one_in(3);
    if user {
        *state.segment_mut(SegReg::Cs) = Segment::from_descriptor(0x33, 0x00af_fb00_0000_ffff);
        for reg in [SegReg::Ss, SegReg::Ds] {
            *state.segment_mut(reg) = Segment::from_descriptor(0x2b, 0x00cf_f300_0000_ffff);
        }
    }
    for gpr in &mut state.gpr[..16] {
        *gpr = if random.one_in(2) { random.next() } else { random.below(3) };
    }
    // In the middle of the pages, or where they end.
    let mut within = || if random.one_in(3) { 0xff0 + random.below(4) * 8 } else { 0x800 };
    state.gpr[4] = STACK + within();
    state.gpr[6] = DATA + within();
    state.gpr[14] = DATA + 0x100;
    state.rip = CODE;
    state.rflags = RFlags::from_bits_retain(flags(random)).difference(RFlags::TF | RFlags::NT);
    state.cr4 |= Cr4::PGE;
    for (cr4, one_in) in [(Cr4::FSGSBASE, 4), (Cr4::SMAP, 2)] {
        state.cr4.set(cr4, !random.one_in(one_in));
    }
    let base = |random: &mut Random| match random.below(4) {
        0 => HIGH + DATA,
        1 => HIGH + STACK,
        _ => random.below(3) * 0x20,
    };
    state.segment_mut(SegReg::Gs).base = base(random);
    state.msr.kernel_gs_base = base(random);
    let mut code = Vec::new();
    if random.one_in(3) {
        // Until what is behind GS is kept.
        code.extend(MOV_R10_GS.repeat(5));
    }
    for _ in 0..1 + random.below(16) {
        code.extend(PIECES[random.below(PIECES.len() as u64) as usize]);
    }
    code.push(0xf4);
    let memory = (0..0x2000 / 8).flat_map(|_| flags(random).to_le_bytes()).collect();
    let interrupt = random.one_in(2);
    if interrupt {
        state.rflags.remove(RFlags::IF);
    }
    Start { code, state, memory, interrupt }
}

/// One with tables for a single interrupt, whose handler leaves in R10 what it interrupted.
fn machine(translates: bool) -> TestMachine {
    let mut machine = TestMachine::long_mode();
    machine.set_present(0, true);
    let l4 = machine.vcpu.state.cr3 & !0xfff;
    machine.put(l4 + 256 * 8, &((l4 + 0x1000) | 0x67).to_le_bytes());
    let l1 = l4 + 0x3000;
    for page in (0..512).filter(|page| *page << 12 != DATA && *page << 12 != STACK) {
        // The supervisor's, but for code.
        let user = if page << 12 == CODE { 4_u64 } else { 0 };
        machine.put(l1 + page * 8, &(page << 12 | 0x163 | user).to_le_bytes());
    }
    machine.put(l1 + (STACK >> 12) * 8, &(STACK | 0x163).to_le_bytes());
    for (selector, raw) in [
        (0x10, 0x00af_9b00_0000_ffff_u64),
        (0x18, 0x00cf_9300_0000_ffff),
        (0x28, 0x00cf_f300_0000_ffff),
        (0x30, 0x00af_fb00_0000_ffff),
    ] {
        machine.put(GDT + selector, &raw.to_le_bytes());
    }
    let gate = HANDLER & 0xffff | 0x10 << 16 | 0x8e << 40;
    machine.put(IDT + u64::from(VECTOR) * 16, &gate.to_le_bytes());
    // mov r10, [rsp]; iretq
    machine.put(HANDLER, &[0x4c, 0x8b, 0x14, 0x24, 0x48, 0xcf]);
    machine.vcpu.state.gdtr = DescriptorTable { base: GDT, limit: 0x3f };
    machine.vcpu.state.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    machine.vcpu.state_changed();
    if translates {
        machine = machine.translating_as(0, Config { verify: true, ..Config::default() });
    }
    machine
}

fn run(machine: &mut TestMachine, start: &Start) -> (Exit, VcpuState, Vec<u8>) {
    machine.put(CODE, &start.code);
    // What GS reaches from a base of its own.
    machine.put(0, &start.memory[..0x1000]);
    machine.put(STACK, &start.memory);
    let vcpu = &mut machine.vcpu;
    vcpu.state = start.state.clone();
    vcpu.shadow = Shadow::None;
    vcpu.system = crate::system::SystemExtras::default();
    vcpu.state_changed();
    vcpu.env = Box::new(OneInterrupt(start.interrupt.then_some(VECTOR)));
    vcpu.handle.take(Event::all());
    if start.interrupt {
        vcpu.handle.raise(Event::INTERRUPT);
    }
    let exit = vcpu.run();
    let memory = [machine.get(STACK, 0x2000), machine.get(0, 0x1000)].concat();
    (exit, machine.vcpu.state.clone(), memory)
}

#[test]
fn rows_of_them_are_translated_as_they_are_interpreted() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let rounds = std::env::var("LGUEST_PROPERTY_ROUNDS")
        .map_or(4000, |text| 100 * text.parse::<u64>().expect("a number"));
    let (mut interpreter, mut translator) = (machine(false), machine(true));
    let base = interpreter.vcpu.state.clone();
    let mut halts = 0;
    for round in 0..rounds {
        let start = start(&base, &mut random);
        let [(our_exit, ours, our_memory), (their_exit, theirs, their_memory)] =
            [&mut interpreter, &mut translator].map(|machine| run(machine, &start));
        halts += u64::from(our_exit == Exit::Halt);
        let told = format!("round {round}: {:02x?} from {:?}", start.code, start.state.rflags);
        assert_eq!((our_exit, ours.rip), (their_exit, theirs.rip), "{told}");
        assert_eq!(ours.gpr, theirs.gpr, "{told}");
        assert_eq!(ours.rflags, theirs.rflags, "{told}");
        assert_eq!((ours.seg, ours.msr), (theirs.seg, theirs.msr), "{told}");
        assert!(our_memory == their_memory, "{told}");
    }
    assert!(halts > rounds / 8, "{halts} of {rounds} came to their end");
    let counters = translator.vcpu.translator_counters().unwrap();
    assert!(counters.translated > rounds / 2, "{counters:?}");
}

/// Runs `code`, translated, in ring 0; says how many instructions were interpreted.
fn interpreted(code: &[u8], cr4: Cr4) -> u64 {
    let mut machine = TestMachine::long_mode();
    machine.put(CODE, code);
    let state = &mut machine.vcpu.state;
    state.cr4 |= cr4;
    state.gpr[4] = STACK;
    state.rip = CODE;
    machine.vcpu.state_changed();
    let mut machine = machine.translating(0);
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    machine.vcpu.translator_counters().unwrap().interpreted
}

#[test]
fn what_is_usual_calls_nobody_back() {
    let body = |extra: &[u8]| {
        // mov ecx, 1000; mov [rsp - 8], rcx; again: cli; pushfq; popfq; swapgs; pause; sti;
        let mut code = vec![0xb9, 0xe8, 3, 0, 0, 0x48, 0x89, 0x4c, 0x24, 0xf8];
        let again = code.len();
        code.extend([0xfa, 0x9c, 0x9d, 0x0f, 0x01, 0xf8, 0xf3, 0x90, 0xfb]);
        code.extend(extra);
        // dec ecx; jnz again; hlt
        code.extend([0xff, 0xc9, 0x75]);
        code.push((again as i64 - code.len() as i64 - 1) as u8);
        code.push(0xf4);
        code
    };
    // rdtsc; stac; clac; mov eax, ds
    let more = [0x0f, 0x31, 0x0f, 0x01, 0xcb, 0x0f, 0x01, 0xca, 0x8c, 0xd8];
    assert!(interpreted(&body(&more), Cr4::empty()) < 20);
    // rdfsbase rax; wrfsbase rax
    let bases = [0xf3, 0x48, 0x0f, 0xae, 0xc0, 0xf3, 0x48, 0x0f, 0xae, 0xd0];
    assert!(interpreted(&body(&bases), Cr4::FSGSBASE) < 20);
    // The time is not everybody's: there the interpreter asks.
    let asked = interpreted(&body(&more), Cr4::TSD);
    assert!((1000..1020).contains(&asked), "{asked}");
}

#[test]
fn time_in_line_is_the_guests() {
    // rdtscp; hlt
    let mut machine = TestMachine::long_mode().translating(0);
    machine.put(CODE, &[0x0f, 0x01, 0xf9, 0xf4]);
    machine.vcpu.state.msr.tsc_offset = 1 << 60;
    machine.vcpu.state.msr.tsc_aux = 77;
    for _ in 0..3 {
        machine.vcpu.state.gpr[..3].fill(u64::MAX);
        machine.vcpu.state.rip = CODE;
        let before = machine.vcpu.tsc();
        assert_eq!(machine.vcpu.run(), Exit::Halt);
        let [rax, rcx, rdx] = machine.vcpu.state.gpr[..3] else { unreachable!() };
        let time = rdx << 32 | rax;
        assert!(rax >> 32 == 0 && (before..machine.vcpu.tsc()).contains(&time));
        assert_eq!(rcx, 77);
    }
}
