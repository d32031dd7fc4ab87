//! Exceptions on their way to handlers: error codes, stacks, and faults on the way.

use super::*;
use crate::exception::Exception;
use crate::handle::Event;
use crate::state::control::{Cr0, Cr4, Efer};
use crate::state::rflags::RFlags;

/// `mov eax, [addr]` and `mov [addr], eax` in 64-bit code.
fn load(addr: u32) -> Vec<u8> {
    [&[0x8b, 0x04, 0x25][..], &addr.to_le_bytes()].concat()
}

fn store(addr: u32) -> Vec<u8> {
    [&[0x89, 0x04, 0x25][..], &addr.to_le_bytes()].concat()
}

/// The page-table entry of the 4 KiB page at `addr`, after `set_present` made it one.
fn entry(guest: &Guest, addr: u64) -> u64 {
    let l2 = (guest.machine.vcpu.state.cr3 & !0xfff) + 0x2000;
    (guest.word(l2) & !0xfff) + (addr >> 12) * 8
}

#[test]
fn page_faults_report_address_and_cause() {
    let pf = |code| End::Vector(14, Some(code));
    const WRITE: u64 = 2;
    const USER: u64 = 4;
    let not_present = |user: bool, code: &[u8]| {
        let mut guest = Guest::long();
        guest.machine.set_present(DATA, false);
        let end = if user { guest.run_user(code) } else { guest.run(code) };
        assert_eq!(guest.machine.vcpu.state.cr2, DATA + 8);
        end
    };
    let at = DATA as u32 + 8;
    assert_eq!(not_present(false, &load(at)), pf(0));
    assert_eq!(not_present(false, &store(at)), pf(WRITE));
    assert_eq!(not_present(true, &load(at)), pf(USER));
    assert_eq!(not_present(true, &store(at)), pf(USER | WRITE));

    // Present, but: read-only (bit 1 clear), supervisor (bit 2 clear), reserved, no-execute.
    let with_entry = |flags: u64, user: bool, code: &[u8]| {
        let mut guest = Guest::long();
        guest.machine.set_present(DATA, true);
        guest.machine.vcpu.state.efer |= Efer::NXE;
        if !user {
            // All other pages become the supervisor's, as SMEP and SMAP want them.
            for page in 0..512 {
                let at = entry(&guest, page << 12);
                guest.machine.put(at, &(page << 12 | 0x63).to_le_bytes());
            }
            guest.machine.vcpu.state.cr4 |= Cr4::SMEP | Cr4::SMAP;
        }
        let at = entry(&guest, DATA);
        guest.machine.put(at, &(DATA | flags).to_le_bytes());
        guest.machine.vcpu.state_changed();
        if user { guest.run_user(code) } else { guest.run(code) }
    };
    assert_eq!(with_entry(0x61, false, &store(at)), pf(1 | WRITE), "CR0.WP");
    assert_eq!(with_entry(0x63, true, &load(at)), pf(1 | USER));
    assert_eq!(with_entry(0x63 | 1 << 51, false, &load(at)), pf(1 | 8), "reserved bit");
    // mov eax, DATA; jmp rax
    let jump = [mov_eax(DATA as u32), vec![0xff, 0xe0]].concat();
    assert_eq!(with_entry(0x63 | 1 << 63, false, &jump), pf(1 | 16), "NX");
    assert_eq!(with_entry(0x67, false, &jump), pf(1 | 16), "SMEP");
    assert_eq!(with_entry(0x67, false, &load(at)), pf(1), "SMAP");
    // stac lifts SMAP, clac brings it back.
    let lifted = [vec![0x0f, 0x01, 0xcb], load(at)].concat();
    assert_eq!(with_entry(0x67, false, &lifted), End::Done);
    let back = [lifted, vec![0x0f, 0x01, 0xca], load(at)].concat();
    assert_eq!(with_entry(0x67, false, &back), pf(1));
}

#[test]
fn non_canonical_addresses_are_general_protection() {
    // mov rbx, 1<<47; mov eax, [rbx]
    let mut guest = Guest::long();
    guest.set(Gpr::Rbx, 1 << 47);
    assert_eq!(guest.run(&[0x8b, 0x03]), gp(0));
    // An instruction that faults on its second access has done nothing: the stack
    // pointer is as it was. push [rbx]
    let mut guest = Guest::long();
    guest.set(Gpr::Rbx, 1 << 47);
    assert_eq!(guest.run(&[0xff, 0x33]), gp(0));
    assert_eq!(guest.stack(4), STACK);
}

#[test]
fn non_canonical_stack_addresses_are_stack_faults() {
    // mov eax, [rbp+0], which goes through SS.
    let mut guest = Guest::long();
    guest.set(Gpr::Rbp, 1 << 47);
    assert_eq!(guest.run(&[0x8b, 0x45, 0x00]), ss(0));
    // mov rsp, 1<<47; pop rax, with a good stack to deliver the fault on.
    let mut guest = Guest::long();
    guest.gate(12, 0, 1);
    guest.set(Gpr::Rsp, 1 << 47);
    assert_eq!(guest.run(&[0x58]), ss(0));
}

#[test]
fn misaligned_user_accesses_fault_once_alignment_is_checked() {
    let misaligned: &[u8] = &[0x8b, 0x44, 0x24, 0xfd]; // mov eax, [rsp-3]
    let aligned: &[u8] = &[0x8b, 0x44, 0x24, 0xfc]; // mov eax, [rsp-4]
    let byte: &[u8] = &[0x8a, 0x44, 0x24, 0xfd]; // mov al, [rsp-3]
    // lea rsi, [rsp-0x43]; lea rdi, [rsp-0x63]; mov ecx, 20; rep movsb
    let bytes: &[u8] = &[
        0x48, 0x8d, 0x74, 0x24, 0xbd, 0x48, 0x8d, 0x7c, 0x24, 0x9d, 0xb9, 20, 0, 0, 0, 0xf3, 0xa4,
    ];
    let check = || End::Vector(17, Some(0));
    for (am, ac, code, end) in [
        (true, true, misaligned, check()),
        (true, true, aligned, UD),
        (true, true, byte, UD),
        (true, true, bytes, UD),
        (false, true, misaligned, UD),
        (true, false, misaligned, UD),
    ] {
        let mut guest = Guest::long();
        guest.machine.vcpu.state.cr0.set(Cr0::AM, am);
        guest.machine.vcpu.state.rflags.set(RFlags::AC, ac);
        // Code that gets past its access meets an ud2.
        assert_eq!(
            guest.run_user(&[code, &[0x0f, 0x0b]].concat()),
            end,
            "AM {am}, AC {ac}, {code:x?}"
        );
    }
}

#[test]
fn interrupt_stacks_are_taken_and_aligned() {
    let mut guest = Guest::long();
    guest.gate(0x21, 0, 1);
    guest.set(Gpr::Rsp, STACK - 5);
    assert_eq!(guest.run(&[0xcd, 0x21]), End::Vector(0x21, None));
    assert_eq!(guest.reg(Gpr::Rsp), IST1_STACK - 40);
    assert_eq!(guest.stack(3), STACK - 5);
    // Without IST the current stack is aligned down to 16 bytes first.
    guest.gate(0x21, 0, 0);
    guest.set(Gpr::Rsp, STACK - 5);
    assert_eq!(guest.run(&[0xcd, 0x21]), End::Vector(0x21, None));
    assert_eq!(guest.reg(Gpr::Rsp), STACK - 16 - 40);
}

#[test]
fn two_contributory_faults_are_a_double_fault_and_three_a_shutdown() {
    for long in [false, true] {
        let mut guest = Guest::new(long);
        // #GP's gate is absent: #NP on the way.
        guest.gate_type(13, 0x0e);
        let mut bad = load_segment(SegReg::Ds, 0xfff8);
        assert_eq!(guest.run(&bad), End::Vector(8, Some(0)), "long={long}");
        guest.gate_type(8, 0x0e);
        assert_eq!(guest.run(&bad), End::Shutdown);
        // #UD is benign: what follows it stands for itself, with EXT.
        let mut guest = Guest::new(long);
        guest.gate_type(6, 0x0e);
        bad = vec![0x0f, 0x0b];
        assert_eq!(guest.run(&bad), np(6 << 3 | 2 | 1));
    }
}

#[test]
fn page_faults_on_the_way_follow_the_table() {
    // IST1 points at a page that is not there.
    let broken = |first: u8| {
        let mut guest = Guest::long();
        guest.machine.set_present(0x7000, false);
        guest.machine.put(TSS + 0x24, &0x7800_u64.to_le_bytes());
        guest.gate(first, 0, 1);
        guest
    };
    // #GP, then #PF: the page fault is delivered.
    let mut guest = broken(13);
    assert_eq!(guest.run(&load_segment(SegReg::Ds, 0xfff8)), End::Vector(14, Some(2)));
    // #PF, then #PF: double fault.
    let mut guest = broken(14);
    guest.machine.set_present(DATA, false);
    assert_eq!(guest.run(&load(DATA as u32)), End::Vector(8, Some(0)));
    // And if that has no stack either, shutdown.
    guest.gate(8, 0, 1);
    assert_eq!(guest.run(&load(DATA as u32)), End::Shutdown);
}

#[test]
fn external_interrupts_mark_their_errors() {
    let mut guest = Guest::long();
    guest.gate_type(0x30, 0x0e);
    guest.load(&[]);
    guest.machine.vcpu.deliver_interrupt(0x30).unwrap();
    assert_eq!(guest.go(), np(0x30 << 3 | 2 | 1));
    // The software's own interrupt through the same gate does not.
    assert_eq!(guest.run(&[0xcd, 0x30]), np(0x30 << 3 | 2));
}

#[test]
fn nmis_are_blocked_until_iret() {
    let mut guest = Guest::long();
    guest.handler(2, &[0x48, 0xcf]);
    guest.load(&[0x90]);
    let vcpu = &mut guest.machine.vcpu;
    vcpu.deliver_nmi().unwrap();
    assert!(vcpu.nmi_blocked);
    assert_eq!(guest.go(), End::Done);
    assert!(!guest.machine.vcpu.nmi_blocked);
}

#[test]
fn nmis_wait_out_the_shadow_of_sti() {
    let mut guest = Guest::long();
    // sti; nop; nop
    guest.load(&[0xfb, 0x90, 0x90]);
    assert!(guest.machine.vcpu.single_step().is_none());
    guest.machine.vcpu.handle.raise(Event::NMI);
    assert_eq!(guest.go(), End::Vector(2, None));
    assert_eq!(guest.stack(0), CODE + 2, "after the nop that follows the sti");
}

#[test]
fn exceptions_push_the_resume_flag_but_traps_do_not() {
    let mut guest = Guest::long();
    assert_eq!(guest.run(&[0x0f, 0x0b]), UD);
    assert_ne!(guest.stack(2) & RFlags::RF.bits(), 0);
    assert_eq!(guest.run(&[0xcc]), End::Vector(3, None));
    assert_eq!(guest.stack(2) & RFlags::RF.bits(), 0);
    assert_eq!(guest.stack(0), CODE + 1);
}

/// A guest whose ring-0 code has just gone to virtual-8086 mode at 0100:0000.
fn virtual_8086(iopl: u64, code: &[u8]) -> (Guest, End) {
    let mut guest = Guest::protected();
    guest.gate(0x80, 3, 0);
    guest.machine.put(CODE, code);
    let flags = RFlags::VM.bits() | 2 | iopl << 12;
    let frame = [0, 0x100, flags, 0x800, 0x900, 0xa00, 0xb00, 0xc00, 0xd00];
    let bytes: Vec<u8> = frame.iter().flat_map(|word| (*word as u32).to_le_bytes()).collect();
    guest.machine.put(STACK, &bytes);
    guest.machine.put(USER, &[0xcf]);
    guest.machine.vcpu.state.rip = USER;
    let end = guest.go();
    (guest, end)
}

#[test]
fn virtual_8086_code_is_interrupted_into_ring_0() {
    // mov ax, ds; int 0x80
    let (guest, end) = virtual_8086(3, &[0x8c, 0xd8, 0xcd, 0x80]);
    assert_eq!(end, End::Vector(0x80, None));
    assert_eq!(guest.reg(Gpr::Rax), 0xb00);
    // EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS.
    let words: Vec<u64> = (0..9).map(|index| guest.stack(index)).collect();
    assert_eq!(words[..2], [4, 0x100]);
    assert_ne!(words[2] & RFlags::VM.bits(), 0);
    assert_eq!(words[3..], [0x800, 0x900, 0xa00, 0xb00, 0xc00, 0xd00]);
    let state = &guest.machine.vcpu.state;
    assert!(!state.rflags.contains(RFlags::VM) && state.cpl() == 0);
    assert!(state.segment(SegReg::Ds).is_unusable());
}

#[test]
fn virtual_8086_code_needs_iopl_3_for_flags_and_interrupts() {
    let sensitive: [&[u8]; 5] = [&[0xcd, 0x80], &[0xfa], &[0xfb], &[0x9c], &[0x9d]];
    for code in sensitive {
        assert_eq!(virtual_8086(0, code).1, gp(0), "{code:x?}");
    }
    assert_eq!(virtual_8086(3, &[0x9c, 0x9d, 0xfa, 0xcd, 0x80]).1, End::Vector(0x80, None));
    // hlt and loads of system registers are never for it; ltr does not exist there.
    assert_eq!(virtual_8086(3, &[0xf4]).1, gp(0));
    assert_eq!(virtual_8086(3, &[0x0f, 0x00, 0xd8]).1, UD);
}

#[test]
fn real_mode_uses_the_vector_table() {
    let mut machine = TestMachine::new();
    machine.put(0x21 * 4, &[0x00, 0x10, 0x20, 0x00]);
    // At 0020:1000 hlt; at 0000:0600 int 0x21.
    machine.put(0x1200, &[0xf4]);
    machine.put(0x600, &[0xcd, 0x21]);
    let vcpu = &mut machine.vcpu;
    *vcpu.state.segment_mut(SegReg::Cs) =
        Segment { access: Segment::code_at_reset().access, ..Segment::real_mode(0) };
    vcpu.state.rip = 0x600;
    vcpu.state.set_reg(Gpr::Rsp, 0x8000);
    vcpu.state.rflags |= RFlags::IF | RFlags::CF;
    vcpu.state_changed();
    assert_eq!(vcpu.run(), Exit::Halt);
    assert_eq!((vcpu.state.rip, vcpu.state.segment(SegReg::Cs).selector), (0x1001, 0x20));
    assert_eq!(vcpu.state.reg(Gpr::Rsp), 0x7ffa);
    assert!(!vcpu.state.rflags.contains(RFlags::IF));
    let flags = (RFlags::IF | RFlags::CF | RFlags::FIXED).bits() as u16;
    let frame = [0x602_u16, 0, flags].map(u16::to_le_bytes).concat();
    assert_eq!(machine.get(0x7ffa, 6), frame);
    // No error code is pushed, and with no table at all it is a shutdown.
    let vcpu = &mut machine.vcpu;
    vcpu.deliver_exception(Exception::general_protection(0)).unwrap();
    assert_eq!(vcpu.state.reg(Gpr::Rsp), 0x7ff4);
    vcpu.state.idtr.limit = 0;
    assert!(vcpu.deliver_exception(Exception::general_protection(0)).is_err());
}

#[test]
fn long_mode_is_entered_from_protected_mode_and_left() {
    let mut guest = Guest::protected();
    // Tables at 1 MiB: one 2 MiB page, one to one.
    guest.machine.put(0x10_0000, &0x10_1067_u64.to_le_bytes());
    guest.machine.put(0x10_1000, &0x10_2067_u64.to_le_bytes());
    guest.machine.put(0x10_2000, &0xe7_u64.to_le_bytes());
    guest.set(Gpr::Rbx, 0x10_0000);
    guest.machine.vcpu.state.cr4 |= Cr4::PAE;
    let set_lme =
        [&[0xb9, 0x80, 0, 0, 0xc0][..], &[0xb8, 0x00, 0x01, 0, 0, 0x31, 0xd2, 0x0f, 0x30]].concat();
    // mov cr3, ebx; mov eax, cr0; bts eax, 31; mov cr0, eax
    let paging = vec![0x0f, 0x22, 0xdb, 0x0f, 0x20, 0xc0, 0x0f, 0xba, 0xe8, 31, 0x0f, 0x22, 0xc0];
    // jmp far CODE64:USER
    let jump = [&[0xea, 0x00, 0x18, 0, 0][..], &sel::CODE64.to_le_bytes()].concat();
    // 64-bit: mov rax, 0x1122334455667788; hlt
    guest.machine.put(USER, &[0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xf4]);
    assert_eq!(guest.run(&[set_lme, paging, jump].concat()), End::Done);
    assert_eq!(guest.reg(Gpr::Rax), 0x1122_3344_5566_7788);
    let state = &guest.machine.vcpu.state;
    assert!(state.efer.contains(Efer::LMA) && state.cr0.contains(Cr0::PG));
    // Back to compatibility mode (retf), paging off: LMA goes.
    let mut code = vec![0x6a, sel::CODE32 as u8, 0x68, 0x00, 0x19, 0, 0, 0x48, 0xcb];
    guest
        .machine
        .put(USER + 0x100, &[0x0f, 0x20, 0xc0, 0x0f, 0xba, 0xf0, 31, 0x0f, 0x22, 0xc0, 0xf4]);
    code.push(0xf4);
    guest.machine.put(USER, &code);
    guest.machine.vcpu.state.rip = USER;
    assert_eq!(guest.go(), End::Done);
    let state = &guest.machine.vcpu.state;
    assert!(!state.efer.contains(Efer::LMA) && state.efer.contains(Efer::LME));
    assert_eq!(guest.machine.vcpu.state.rip, USER + 0x10b);
}
