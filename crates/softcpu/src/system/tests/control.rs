//! Control registers, MSRs and what only ring 0 may do.

use super::*;
use crate::state::control::{Cr0, Cr4};
use crate::system::msr::index;

/// `mov crN, rax`.
fn to_cr(number: u8) -> Vec<u8> {
    if number == 8 { vec![0x44, 0x0f, 0x22, 0xc0] } else { vec![0x0f, 0x22, 0xc0 | number << 3] }
}

fn write_cr(guest: &mut Guest, number: u8, value: u64) -> End {
    guest.set(Gpr::Rax, value);
    guest.run(&to_cr(number))
}

#[test]
fn control_registers_refuse_what_makes_no_mode() {
    let mut guest = Guest::long();
    let (cr0, cr3, cr4) = {
        let state = &guest.machine.vcpu.state;
        (state.cr0, state.cr3, state.cr4)
    };
    let refused = [
        (0, (cr0 - Cr0::PE).bits(), "PG without PE"),
        (0, (cr0 | Cr0::NW).bits(), "NW without CD"),
        (0, cr0.bits() | 1 << 32, "the upper half"),
        (0, (cr0 - Cr0::PG).bits(), "leaving long mode from 64-bit code"),
        (3, cr3 | 1 << 52, "beyond the physical address width"),
        (4, (cr4 - Cr4::PAE).bits(), "PAE in long mode"),
        (4, (cr4 | Cr4::VME).bits(), "a feature that is not offered"),
        (4, cr4.bits() | 1 << 12, "five-level paging"),
        (4, cr4.bits() | 1 << 63, "a reserved bit"),
        (8, 16, "a priority class of more than four bits"),
    ];
    for (number, value, why) in refused {
        assert_eq!(write_cr(&mut guest, number, value), gp(0), "CR{number}: {why}");
    }
    let state = &guest.machine.vcpu.state;
    assert_eq!((state.cr0, state.cr3, state.cr4), (cr0, cr3, cr4));
    assert_eq!(write_cr(&mut guest, 1, 0), UD);
    assert_eq!(write_cr(&mut guest, 0, (cr0 | Cr0::TS).bits()), End::Done);
    assert!(guest.machine.vcpu.state.cr0.contains(Cr0::TS));
    assert_eq!(guest.run(&[0x0f, 0x06]), End::Done);
    assert!(!guest.machine.vcpu.state.cr0.contains(Cr0::TS), "clts");
}

#[test]
fn pcids_want_a_clean_cr3() {
    let mut guest = Guest::long();
    let cr3 = guest.machine.vcpu.state.cr3;
    let with = (guest.machine.vcpu.state.cr4 | Cr4::PCIDE).bits();
    assert_eq!(write_cr(&mut guest, 3, cr3 | 8), End::Done);
    assert_eq!(write_cr(&mut guest, 4, with), gp(0));
    assert_eq!(write_cr(&mut guest, 3, cr3), End::Done);
    // Bit 63 is reserved without PCIDs, and not kept with them.
    assert_eq!(write_cr(&mut guest, 3, cr3 | 1 << 63), gp(0));
    assert_eq!(write_cr(&mut guest, 4, with), End::Done);
    assert_eq!(write_cr(&mut guest, 3, cr3 | 1 << 63 | 5), End::Done);
    assert_eq!(guest.machine.vcpu.state.cr3, cr3 | 5);
}

#[test]
fn pae_loads_its_directory_pointers_with_cr3() {
    let mut guest = Guest::protected();
    guest.machine.vcpu.state.cr4 |= Cr4::PAE;
    guest.machine.vcpu.state.cr3 = 0x10_0000;
    // One 2 MiB page, one to one; the second pointer has a reserved bit, but is absent.
    guest.machine.put(0x10_0000, &0x10_1001_u64.to_le_bytes());
    guest.machine.put(0x10_0008, &0x2_u64.to_le_bytes());
    guest.machine.put(0x10_1000, &0xe7_u64.to_le_bytes());
    let cr0 = (guest.machine.vcpu.state.cr0 | Cr0::PG).bits();
    guest.set(Gpr::Rax, cr0);
    assert_eq!(guest.run(&to_cr(0)), End::Done);
    // Now present, and the next load of CR3 must refuse it.
    guest.machine.put(0x10_0008, &0x3_u64.to_le_bytes());
    guest.set(Gpr::Rax, 0x10_0000);
    assert_eq!(guest.run(&to_cr(3)), gp(0));
}

#[test]
fn the_machine_status_word_sets_but_never_clears_protection() {
    let mut guest = Guest::protected();
    guest.set(Gpr::Rax, Cr0::TS.bits());
    // lmsw ax; smsw ebx
    assert_eq!(guest.run(&[0x0f, 0x01, 0xf0, 0x0f, 0x01, 0xe3]), End::Done);
    let cr0 = guest.machine.vcpu.state.cr0;
    assert!(cr0.contains(Cr0::PE | Cr0::TS) && !cr0.contains(Cr0::MP));
    assert_eq!(guest.reg(Gpr::Rbx), cr0.bits());
}

#[test]
fn ring_3_may_not() {
    let privileged: [(&str, &[u8]); 13] = [
        ("hlt", &[0xf4]),
        ("clts", &[0x0f, 0x06]),
        ("invd", &[0x0f, 0x08]),
        ("wbinvd", &[0x0f, 0x09]),
        ("wrmsr", &[0x0f, 0x30]),
        ("rdmsr", &[0x0f, 0x32]),
        ("mov cr0", &[0x0f, 0x22, 0xc0]),
        ("mov from cr0", &[0x0f, 0x20, 0xc0]),
        ("mov dr0", &[0x0f, 0x23, 0xc0]),
        ("invlpg", &[0x0f, 0x01, 0x38]),
        ("lmsw", &[0x0f, 0x01, 0xf0]),
        ("ltr", &[0x0f, 0x00, 0xd8]),
        ("xsetbv", &[0x0f, 0x01, 0xd1]),
    ];
    for (name, code) in privileged {
        assert_eq!(Guest::long().run_user(code), gp(0), "{name}");
    }
    assert_eq!(Guest::long().run_user(&[0x0f, 0x01, 0xcb]), UD, "stac");
    // rdtsc is anyone's until CR4.TSD.
    assert_eq!(Guest::long().run_user(&[0x0f, 0x31, 0x0f, 0x0b]), UD);
    let mut guest = Guest::long();
    guest.machine.vcpu.state.cr4 |= Cr4::TSD;
    assert_eq!(guest.run_user(&[0x0f, 0x31]), gp(0));
    assert_eq!(guest.run(&[0x0f, 0x01, 0xc8]), UD, "monitor is not offered");
}

fn wrmsr(guest: &mut Guest, msr: u32, value: u64) -> End {
    guest.set(Gpr::Rcx, u64::from(msr));
    guest.set(Gpr::Rax, value & 0xffff_ffff);
    guest.set(Gpr::Rdx, value >> 32);
    guest.run(&[0x0f, 0x30])
}

fn rdmsr(guest: &mut Guest, msr: u32) -> Option<u64> {
    guest.set(Gpr::Rcx, u64::from(msr));
    let end = guest.run(&[0x0f, 0x32]);
    (end == End::Done).then(|| guest.reg(Gpr::Rdx) << 32 | guest.reg(Gpr::Rax))
}

#[test]
fn msrs_hold_what_they_take_and_refuse_the_rest() {
    let mut guest = Guest::long();
    let kept = [
        (index::STAR, 0x0023_0010_0000_0000),
        (index::LSTAR, 0xffff_ffff_8000_0000),
        (index::KERNEL_GS_BASE, 0xffff_8880_0000_0000),
        (index::FS_BASE, 0x7fff_0000_0000),
        (index::TSC_AUX, 0x1001),
        (index::IA32_PAT, 0x0007_0106_0007_0106),
        (index::IA32_MTRR_DEF_TYPE, 0xc06),
        (0x200, 0x8000_0000),
        (0x201, 0x3fff_8000_0800),
        (0x26f, 0x0606_0606_0606_0606),
        (index::IA32_SPEC_CTRL, 1),
    ];
    for (msr, value) in kept {
        assert_eq!(wrmsr(&mut guest, msr, value), End::Done, "{msr:#x}");
        assert_eq!(rdmsr(&mut guest, msr), Some(value), "{msr:#x}");
    }
    let refused = [
        (index::LSTAR, 1 << 47),
        (index::IA32_SYSENTER_EIP, 1 << 62),
        (index::GS_BASE, 1 << 48),
        (index::TSC_AUX, 1 << 32),
        (index::IA32_PAT, 2),
        (index::IA32_MTRR_DEF_TYPE, 3),
        (0x200, 2),
        (0x201, 1 << 50),
        (0x26f, 7),
        (index::IA32_SPEC_CTRL, 1 << 20),
        (0x10a, 0),
        (0x1234_5678, 0),
    ];
    for (msr, value) in refused {
        assert_eq!(wrmsr(&mut guest, msr, value), gp(0), "{msr:#x}");
    }
    assert_eq!(guest.machine.vcpu.refused().last_msr, 0x1234_5678);
    assert_eq!(rdmsr(&mut guest, 0x1234_5678), None);
    // Linux on this family wants HWCR's TSC bit, and drops workarounds into DE_CFG.
    assert_eq!(rdmsr(&mut guest, 0xc001_0015), Some(1 << 24));
    assert_eq!(wrmsr(&mut guest, 0xc001_1029, 0x202), End::Done);
}

#[test]
fn efer_changes_only_as_allowed() {
    let mut guest = Guest::long();
    let efer = guest.machine.vcpu.state.efer.bits();
    assert_eq!(
        wrmsr(&mut guest, index::EFER, efer | 1 << 11 | 1 << 21),
        End::Done,
        "NXE, AUTOIBRS"
    );
    assert_eq!(wrmsr(&mut guest, index::EFER, efer & !(1 << 8)), gp(0), "LME under paging");
    assert_eq!(wrmsr(&mut guest, index::EFER, efer | 1 << 12), gp(0), "SVME");
    // LMA cannot be written.
    assert_eq!(wrmsr(&mut guest, index::EFER, efer & !(1 << 10)), End::Done);
    assert_eq!(rdmsr(&mut guest, index::EFER), Some(efer));
}

#[test]
fn the_tsc_can_be_moved() {
    let mut guest = Guest::long();
    assert_eq!(wrmsr(&mut guest, index::IA32_TSC, 1 << 60), End::Done);
    let tsc = rdmsr(&mut guest, index::IA32_TSC).unwrap();
    assert!(tsc >> 32 == 1 << 28, "{tsc:#x}");
    let adjust = rdmsr(&mut guest, index::IA32_TSC_ADJUST).unwrap();
    assert_eq!(adjust, guest.machine.vcpu.state.msr.tsc_offset);
    assert_eq!(wrmsr(&mut guest, index::IA32_TSC_ADJUST, adjust.wrapping_add(1 << 61)), End::Done);
    // rdtscp: TSC_AUX in ECX.
    guest.machine.vcpu.state.msr.tsc_aux = 42;
    assert_eq!(guest.run(&[0x0f, 0x01, 0xf9]), End::Done);
    assert_eq!(guest.reg(Gpr::Rdx) >> 28, 3);
    assert_eq!(guest.reg(Gpr::Rcx), 42);
}

#[test]
fn extended_control_registers_are_checked() {
    if !guest_has_avx() {
        return;
    }
    let xsetbv = |index: u64, value: u64| {
        let mut guest = Guest::long();
        guest.set(Gpr::Rcx, index);
        guest.set(Gpr::Rax, value);
        guest.set(Gpr::Rdx, 0);
        let end = guest.run(&[0x0f, 0x01, 0xd1]);
        (end, guest.machine.vcpu.state.xcr0)
    };
    assert_eq!(xsetbv(0, 3), (End::Done, 3));
    for (index, value) in [(0, 0), (0, 5), (0, 0xf), (1, 1)] {
        assert_eq!(xsetbv(index, value), (gp(0), 7), "XCR{index} = {value:#x}");
    }
    // CPUID follows CR4.OSXSAVE and XCR0.
    let mut guest = Guest::long();
    guest.set(Gpr::Rcx, 0);
    assert_eq!(guest.run(&[mov_eax(0xd), vec![0x0f, 0xa2]].concat()), End::Done);
    assert_eq!(guest.reg(Gpr::Rbx), 832);
    guest.machine.vcpu.state.xcr0 = 3;
    for subleaf in [0, 1] {
        guest.set(Gpr::Rcx, subleaf);
        assert_eq!(guest.run(&[mov_eax(0xd), vec![0x0f, 0xa2]].concat()), End::Done);
        assert_eq!(guest.reg(Gpr::Rbx), 576, "sub-leaf {subleaf}");
    }
    for osxsave in [true, false] {
        guest.machine.vcpu.state.cr4.set(Cr4::OSXSAVE, osxsave);
        assert_eq!(guest.run(&[mov_eax(1), vec![0x0f, 0xa2]].concat()), End::Done);
        assert_eq!(guest.reg(Gpr::Rcx) >> 27 & 1 == 1, osxsave);
    }
    assert_eq!(guest.run(&[0x0f, 0x01, 0xd0]), UD, "xgetbv without OSXSAVE");
}

fn guest_has_avx() -> bool {
    Guest::long().machine.vcpu.cpuid.allows(iced_x86::CpuidFeature::AVX)
}
