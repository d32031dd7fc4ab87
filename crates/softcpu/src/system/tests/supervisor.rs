//! A supervisor in place of the IDT: what it is told, what it may change, and that the
//! guest's own tables play no part.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::exception::{Exception, PageFaultCode, Vector};
use crate::handle::Event;
use crate::state::control::{Cr0, Cr4};
use crate::state::regs::Gpr;
use crate::state::rflags::RFlags;
use crate::state::segment::{DescriptorTable, SegReg, Segment};
use crate::supervisor::{Paging, Supervisor, Trap, Verdict, accessed};
use crate::testing::{RAM, TestMachine};
use crate::vcpu::{Exit, Vcpu};

const CODE: u64 = 0x1000;
const STACK: u64 = 0x8000;
const TABLE: u64 = 0x10_0000;
const PAGES: u64 = TABLE + 0x1000;

/// What a supervisor does when it is called for the n-th time.
type Answer = Box<dyn FnMut(&mut Vcpu) -> Verdict + Send>;

/// What a supervisor was told: the trap, and RIP then.
type Told = Arc<Mutex<Vec<(Trap, u64)>>>;

struct Script {
    answers: VecDeque<Answer>,
    told: Told,
}

impl Supervisor for Script {
    fn trap(&mut self, cpu: &mut Vcpu, trap: Trap) -> Verdict {
        self.told.lock().unwrap().push((trap, cpu.state.rip));
        match self.answers.pop_front() {
            Some(mut answer) => answer(cpu),
            None => Verdict::Stop,
        }
    }
}

const GDT: [u64; 8] = [
    0,
    0x00cf_bb00_0000_ffff, // 0x09: ring 1 code
    0x00cf_b300_0000_ffff, // 0x11: ring 1 data
    0x00cf_fb00_0000_ffff, // 0x1b: ring 3 code
    0x00cf_f300_0000_ffff, // 0x23: ring 3 data
    0x00cf_f300_1234_ffff, // 0x28: data at 0x1234
    0x00cf_1300_0000_ffff, // 0x30: not present, DPL 0
    0x00cf_3300_0000_ffff, // 0x39: not present, DPL 1
];

/// Ring 1, flat, with the interrupt flag set and no tables of its own.
fn guest(code: &[u8], answers: Vec<Answer>) -> (TestMachine, Told) {
    let mut machine = TestMachine::protected_mode();
    machine.put(CODE, code);
    let cpu = &mut machine.vcpu;
    let state = &mut cpu.state;
    state.gdtr = DescriptorTable { base: 0, limit: 0 };
    state.idtr = DescriptorTable { base: 0, limit: 0 };
    state.tr.limit = 0;
    state.ldtr = Segment::null(0);
    for reg in [SegReg::Es, SegReg::Ss, SegReg::Ds] {
        *state.segment_mut(reg) = Segment::from_descriptor(0x11, GDT[2]);
    }
    *state.segment_mut(SegReg::Cs) = Segment::from_descriptor(0x09, GDT[1]);
    state.rflags = RFlags::FIXED | RFlags::IF;
    state.set_reg(Gpr::Rsp, STACK);
    state.rip = CODE;
    cpu.state_changed();
    let told = Told::default();
    let script = Script { answers: answers.into(), told: Arc::clone(&told) };
    cpu.hold_descriptors(&GDT.map(accessed));
    cpu.supervise(Box::new(script));
    (machine, told)
}

fn then(answer: impl FnMut(&mut Vcpu) -> Verdict + Send + 'static) -> Answer {
    Box::new(answer)
}

fn told(told: &Told) -> Vec<(Trap, u64)> {
    std::mem::take(&mut told.lock().unwrap())
}

#[test]
fn exceptions_and_software_interrupts_go_to_the_supervisor() {
    // nop; ud2; int 0x80; int3; cli; vmcall; hlt
    let code = [0x90, 0x0f, 0x0b, 0xcd, 0x80, 0xcc, 0xfa, 0x0f, 0x01, 0xc1, 0xf4];
    let skip = |len: u64| {
        then(move |cpu| {
            cpu.state.rip += len;
            Verdict::Resume
        })
    };
    let answers = vec![skip(2), skip(0), skip(0), skip(1), skip(0)];
    let (mut machine, log) = guest(&code, answers);
    assert_eq!(machine.vcpu.run(), Exit::Stopped);
    let gp = Exception::general_protection(0);
    let expected = vec![
        (Trap::Exception(Exception::invalid_opcode()), CODE + 1),
        (Trap::Software { vector: 0x80, at: CODE + 3, checked: true }, CODE + 5),
        (Trap::Software { vector: 3, at: CODE + 5, checked: true }, CODE + 6),
        (Trap::Exception(gp), CODE + 6),
        (Trap::Hypercall { at: CODE + 7 }, CODE + 10),
        (Trap::Exception(gp), CODE + 10),
    ];
    assert_eq!(told(&log), expected);
}

#[test]
fn an_interrupt_is_offered_and_a_halt_ends_the_run() {
    // int 0x1f; jmp to self
    let (mut machine, log) = guest(
        &[0xcd, 0x1f, 0xeb, 0xfe],
        vec![
            then(|_| Verdict::Halt),
            then(|cpu| {
                cpu.state.set_reg(Gpr::Rax, 7);
                Verdict::Stop
            }),
        ],
    );
    assert_eq!(machine.vcpu.run(), Exit::Halt);
    assert_eq!(machine.vcpu.state.rip, CODE + 2);
    machine.vcpu.handle().raise(Event::INTERRUPT);
    assert_eq!(machine.vcpu.run(), Exit::Stopped);
    assert_eq!(told(&log)[1], (Trap::Interrupt, CODE + 2));
    assert_eq!(machine.vcpu.state.reg(Gpr::Rax), 7);
    assert_eq!(machine.vcpu.handle().pending(), Event::empty());
}

#[test]
fn segments_come_from_the_table_that_is_held() {
    // mov eax, 0x28; mov fs, eax; mov eax, fs:[4]; mov eax, sel; mov gs, eax; lar; hlt
    let load_gs = |selector: u8| {
        let mut code = vec![0xb8, 0x28, 0, 0, 0, 0x8e, 0xe0, 0x64, 0xa1, 4, 0, 0, 0];
        code.extend([0xba, selector, 0, 0, 0, 0x8e, 0xea, 0x0f, 0x02, 0xca, 0xf4]);
        let (mut machine, log) = guest(&code, Vec::new());
        machine.put(0x1238, &0xcafe_u32.to_le_bytes());
        assert_eq!(machine.vcpu.run(), Exit::Stopped);
        assert_eq!(machine.vcpu.state.reg(Gpr::Rax), 0xcafe);
        assert_eq!(machine.vcpu.state.segment(SegReg::Fs).base, 0x1234);
        let Trap::Exception(exception) = told(&log)[0].0 else { panic!("an exception") };
        exception
    };
    assert_eq!(load_gs(0x23), Exception::general_protection(0), "that is the hlt");
    assert_eq!(load_gs(0x30), Exception::general_protection(0x30));
    assert_eq!(load_gs(0x38), Exception::segment_not_present(0x38));
    assert_eq!(load_gs(0x40), Exception::general_protection(0x40), "beyond the table");
    assert_eq!(load_gs(0x0c), Exception::general_protection(0x0c), "there is no local table");
}

#[test]
fn iret_reaches_ring_3_and_keeps_the_interrupt_flag() {
    // iret; in ring 3: pushf; int 0x80
    let code = [&[0xcf, 0x90][..], &[0x9c, 0xcd, 0x80]].concat();
    let (mut machine, log) = guest(&code, Vec::new());
    let frame = [CODE as u32 + 2, 0x1b, 0x2, STACK as u32, 0x23];
    machine.put(STACK - 20, &frame.map(u32::to_le_bytes).concat());
    machine.vcpu.state.set_reg(Gpr::Rsp, STACK - 20);
    assert_eq!(machine.vcpu.run(), Exit::Stopped);
    assert!(matches!(told(&log)[0].0, Trap::Software { vector: 0x80, .. }));
    assert_eq!(machine.vcpu.state.cpl(), 3);
    assert_eq!(machine.get(STACK - 4, 4), 0x202_u32.to_le_bytes());
}

/// Maps the first 4 MiB to themselves but for the page at `absent`, two levels.
fn map(machine: &TestMachine, absent: u64) {
    for page in 0..RAM >> 12 {
        let present = u64::from(page << 12 != absent);
        machine.put(PAGES + page * 4, &((page << 12 | 6 | present) as u32).to_le_bytes());
    }
    machine.put(TABLE, &(PAGES as u32 | 7).to_le_bytes());
}

#[test]
fn a_supervisor_reaches_memory_through_the_guests_tables() {
    let paging =
        Paging { cr0: Cr0::PE | Cr0::PG | Cr0::WP | Cr0::ET, cr3: TABLE as u32, cr4: Cr4::empty() };
    let answers = vec![
        then(move |cpu| {
            cpu.load_paging(paging).unwrap();
            Verdict::Resume
        }),
        then(|cpu| {
            let mut data = [0; 4];
            let fault = cpu.read_virtual(0x5ffe, &mut data).unwrap_err();
            assert_eq!((fault.vector, fault.payload), (Vector::PageFault, 0x6000));
            let fault = cpu.write_virtual(0x6000, &data).unwrap_err();
            assert_eq!(fault.error_code, Some(PageFaultCode::WRITE.bits()));
            // It becomes present, and the translation at 0x5000 another.
            let entry = |page: u64| crate::GuestPhysAddr(PAGES + page * 4);
            assert!(cpu.memory().store::<u32>(entry(6), 0x6003));
            assert!(cpu.memory().store::<u32>(entry(5), 0x7003));
            cpu.read_virtual(0x5ffe, &mut data[..2]).unwrap();
            assert_eq!(data[..2], [1, 1], "still cached");
            cpu.flush_page(0x5000);
            cpu.read_virtual(0x5ffe, &mut data).unwrap();
            assert_eq!(data, [3, 3, 2, 2]);
            cpu.load_cr3(TABLE as u32).unwrap();
            Verdict::Resume
        }),
    ];
    // int 0x1f; mov al, [0x5000]; int 0x1f; mov al, [0x5000]; hlt
    let load = [0xa0, 0, 0x50, 0, 0];
    let code = [&[0xcd, 0x1f][..], &load, &[0xcd, 0x1f], &load, &[0xf4]].concat();
    let (mut machine, _) = guest(&code, answers);
    map(&machine, 0x6000);
    for (page, value) in [(0x5000, 1), (0x6000, 2), (0x7000, 3)] {
        machine.put(page, &[value; 0x1000]);
    }
    assert_eq!(machine.vcpu.run(), Exit::Stopped);
    assert_eq!(machine.vcpu.state.reg(Gpr::Rax) & 0xff, 3);
}

#[test]
fn a_top_level_that_grew_is_noticed() {
    let (mut machine, _) = guest(&[0xf4], Vec::new());
    machine.put(TABLE, &(PAGES | 1).to_le_bytes());
    let cr0 = Cr0::PE | Cr0::PG | Cr0::ET;
    machine.vcpu.load_paging(Paging { cr0, cr3: TABLE as u32, cr4: Cr4::PAE }).unwrap();
    assert!(!machine.vcpu.top_level_is_stale());
    machine.put(TABLE + 8, &(PAGES | 1).to_le_bytes());
    assert!(machine.vcpu.top_level_is_stale());
    machine.vcpu.load_cr3(TABLE as u32).unwrap();
    assert!(!machine.vcpu.top_level_is_stale());
    // Reserved bits are refused and change nothing.
    machine.put(TABLE, &(PAGES | 7).to_le_bytes());
    assert!(machine.vcpu.load_cr3(TABLE as u32).is_err());
    assert!(!machine.vcpu.top_level_is_stale());
}

#[test]
fn system_calls_go_to_the_supervisor_where_they_exist() {
    use crate::state::control::Efer;
    // syscall
    let code = [0x0f, 0x05];
    let (mut machine, log) = guest(&code, Vec::new());
    assert_eq!(machine.vcpu.run(), Exit::Stopped);
    assert_eq!(told(&log), [(Trap::Exception(Exception::invalid_opcode()), CODE)]);
    let (mut machine, log) = guest(&code, Vec::new());
    machine.vcpu.state.efer = Efer::SCE;
    machine.vcpu.state_changed();
    machine.vcpu.state.set_reg(Gpr::Rcx, 5);
    assert_eq!(machine.vcpu.run(), Exit::Stopped);
    assert_eq!(told(&log), [(Trap::Syscall { at: CODE }, CODE + 2)]);
    assert_eq!(machine.vcpu.state.reg(Gpr::Rcx), 5, "nothing else has changed");
}

#[test]
fn an_iret_that_is_watched_is_followed_by_an_interrupt() {
    // iret, to a nop and an int3
    let target = CODE + 0x20;
    for watched in [false, true] {
        let (mut machine, log) = guest(&[0xcf], Vec::new());
        machine.put(target, &[0x90, 0xcc]);
        let frame = [target as u32, 0x09, 0x202].map(u32::to_le_bytes).concat();
        machine.put(STACK - 12, &frame);
        machine.vcpu.state.set_reg(Gpr::Rsp, STACK - 12);
        machine.vcpu.watch_iret(watched);
        assert_eq!(machine.vcpu.run(), Exit::Stopped);
        let int3 = Trap::Software { vector: 3, at: target + 1, checked: true };
        let expected = if watched { (Trap::Interrupt, target) } else { (int3, target + 2) };
        assert_eq!(told(&log), [expected]);
    }
}
