//! Whatever a guest puts into its tables and registers, the CPU answers with a fault or
//! a result: never with a panic (overflow checks are on in tests), never with a hang.

use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::handle::Event;
use crate::state::rflags::RFlags;

/// Instructions whose behaviour depends on tables and system registers. Those with a
/// memory operand use [rdi] (or [edi]).
const INSTRUCTIONS: &[&[u8]] = &[
    &[0x8e, 0xd8],                   // mov ds, eax
    &[0x8e, 0xd0],                   // mov ss, eax
    &[0x8e, 0xe8],                   // mov gs, eax
    &[0x0f, 0x00, 0xd0],             // lldt ax
    &[0x0f, 0x00, 0xd8],             // ltr ax
    &[0x0f, 0x00, 0xe0],             // verr ax
    &[0x0f, 0x02, 0xc8],             // lar ecx, eax
    &[0x0f, 0x03, 0xc8],             // lsl ecx, eax
    &[0x0f, 0x01, 0x17],             // lgdt [rdi]
    &[0x0f, 0x01, 0x1f],             // lidt [rdi]
    &[0x0f, 0x01, 0x07],             // sgdt [rdi]
    &[0x0f, 0x01, 0x3f],             // invlpg [rdi]
    &[0x66, 0x0f, 0x38, 0x82, 0x1f], // invpcid rbx, [rdi]
    &[0xff, 0x2f],                   // jmp far [rdi]
    &[0xff, 0x1f],                   // call far [rdi]
    &[0xcb],                         // retf
    &[0xca, 0xff, 0xff],             // retf 0xffff
    &[0xcf],                         // iret
    &[0x48, 0xcf],                   // iretq (dec eax; iret)
    &[0xcd, 0x80],                   // int 0x80
    &[0xcc],                         // int3
    &[0xf1],                         // int1
    &[0x0f, 0x0b],                   // ud2
    &[0x9d],                         // popf
    &[0x0f, 0x05],                   // syscall
    &[0x48, 0x0f, 0x07],             // sysretq
    &[0x0f, 0x34],                   // sysenter
    &[0x0f, 0x35],                   // sysexit
    &[0x0f, 0x22, 0xc0],             // mov cr0, rax
    &[0x0f, 0x22, 0xd8],             // mov cr3, rax
    &[0x0f, 0x22, 0xe0],             // mov cr4, rax
    &[0x0f, 0x23, 0xc0],             // mov dr0, rax
    &[0x0f, 0x23, 0xf8],             // mov dr7, rax
    &[0x0f, 0x30],                   // wrmsr
    &[0x0f, 0x32],                   // rdmsr
    &[0x0f, 0x01, 0xd1],             // xsetbv
    &[0x0f, 0xa2],                   // cpuid
    &[0xe4, 0x60],                   // in al, 0x60
    &[0xf3, 0x6d],                   // rep insd
    &[0xf3, 0x6e],                   // rep outsb
    &[0xf4],                         // hlt
];

/// Repeatable noise: SplitMix64.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Numbers that meet many checks, and now and then any other.
    fn number(&mut self) -> u64 {
        const KNOWN: [u64; 10] =
            [DATA, GDT, TSS, CODE, STACK, 0xc000_0080, 0x200, 0x10, u64::MAX, 1 << 47];
        match self.below(7) {
            0..4 => self.below(0xa8),
            4..6 => KNOWN[self.below(10) as usize],
            _ => self.next(),
        }
    }
}

/// A guest may well loop for ever; it must still stop when told to.
fn run_with_watchdog(guest: &mut Guest) {
    let handle = guest.machine.vcpu.handle().clone();
    let (done, wait) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if wait.recv_timeout(Duration::from_millis(10)) == Err(mpsc::RecvTimeoutError::Timeout)
            {
                handle.raise(Event::STOP);
            }
        });
        let _exit = guest.machine.vcpu.run();
        drop(done);
    });
}

fn one_case(seed: u64) {
    let mut noise = Noise(seed);
    let mut guest = Guest::new(noise.below(2) == 0);
    for _ in 0..noise.below(40) {
        let at = GDT + noise.below(0x4000);
        let bytes = noise.next().to_le_bytes();
        guest.machine.put(at, &bytes);
    }
    let words: Vec<u8> = (0..8).flat_map(|_| noise.number().to_le_bytes()).collect();
    for at in [STACK, USER_STACK, DATA] {
        guest.machine.put(at, &words);
    }
    for slot in &mut guest.machine.vcpu.state.gpr[..16] {
        *slot = noise.number();
    }
    guest.set(Gpr::Rsp, STACK);
    let mut code = Vec::new();
    for _ in 0..1 + noise.below(5) {
        code.extend(INSTRUCTIONS[noise.below(INSTRUCTIONS.len() as u64) as usize]);
    }
    if noise.below(3) == 0 {
        guest.machine.put(USER, &code);
        guest.drop_to_ring3();
    } else {
        guest.load(&code);
    }
    run_with_watchdog(&mut guest);
    let state = &guest.machine.vcpu.state;
    assert!(state.rflags.contains(RFlags::FIXED), "seed {seed}");
    assert!(state.protected_mode() || state.cpl() == 0, "seed {seed}");
    assert_eq!(state.gpr[16], 0, "seed {seed}: the zero slot was written");
}

#[test]
fn tables_of_noise_never_break_the_cpu() {
    for seed in 0..500 {
        one_case(seed);
    }
}
